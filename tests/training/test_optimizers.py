"""Optimizers of other packages: what is refused, and that runs with them resume and average exactly."""

import signal

import pytest
import torch
from torch import nn
from torch.nn import Parameter

from sd_memguard.config import ConfigError
from sd_memguard.proxies.full import FullProxies
from sd_memguard.proxies.store import RamStore
from sd_memguard.proxies.swap import evaluated, group_numbers, load_optimizer_tensors, optimizer_tensors
from sd_memguard.training.learning_rate import learning_rate_schedule
from sd_memguard.training.optimizers import check_optimizer, moments_per_weight, read_arguments
from sd_memguard.training.plan import make_plan
from sd_memguard.training.signals import Interrupted
from sd_memguard.training.trainer import Trainer

PRODIGY = {"optimizer": "prodigyopt.Prodigy", "optimizer_args": ("d0=1e-4", "weight_decay=0.01"), "learning_rate": 1.0}
CAME = {"optimizer": "pytorch_optimizer.CAME", "learning_rate": 1e-4}
LION = {"optimizer": "pytorch_optimizer.Lion", "learning_rate": 1e-4}
FACTORED = ("scale_parameter=False", "relative_step=False", "warmup_init=False")
ADAFACTOR = {"optimizer": "transformers.optimization.Adafactor", "optimizer_args": FACTORED}
MUON = {"optimizer": "torch.optim.Muon", "proxy": "lora", "rank": 2}
SCHEDULE_FREE = {"optimizer": "schedulefree.AdamWScheduleFree", "num_shards": 1, "augment_threshold": 0.0}


class Hidden(torch.optim.SGD):
    """Counts its steps beside its state, and steps less far each time."""

    def __init__(self, params, lr):
        super().__init__(params, lr=lr)
        self.count = 0

    def step(self):
        self.count += 1
        with torch.no_grad():
            for parameter in self.param_groups[0]["params"]:
                parameter -= self.param_groups[0]["lr"] / self.count * parameter.grad


class Listed(torch.optim.SGD):
    """Keeps a list in its state."""

    def step(self):
        for parameter in self.param_groups[0]["params"]:
            self.state[parameter]["history"] = [1.0]


class Noisy(torch.optim.SGD):
    """Draws from torch's global generator."""

    def step(self):
        with torch.no_grad():
            for parameter in self.param_groups[0]["params"]:
                parameter += torch.randn_like(parameter)


@pytest.fixture
def own(monkeypatch):
    """Makes this module importable under a name, as an installed package is."""
    import sys
    from types import ModuleType

    module = ModuleType("my_optimizers")
    for kind in (Hidden, Listed, Noisy):
        setattr(module, kind.__name__, kind)
    monkeypatch.setitem(sys.modules, "my_optimizers", module)


def importable(settings) -> None:
    pytest.importorskip(settings["optimizer"].split(".")[0])
    module, _, name = settings["optimizer"].rpartition(".")
    if not hasattr(pytest.importorskip(module), name):
        pytest.skip(f"this version has no {name}")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"optimizer": "no_such_package.Adam"}, "got 'no_such_package.Adam': No module named"),
        ({"optimizer": "Adam"}, "must be the import path of a class that is installed"),
        ({"optimizer": "torch.optim.Adagrid"}, "has no attribute 'Adagrid'"),
        ({"optimizer": "torch.nn.Linear"}, "must be a subclass of `torch.optim.Optimizer`"),
        ({"optimizer": "torch.optim.RAdam", "optimizer_args": ("beta=1",)}, "does not take lr=0.001, beta=1: "),
        ({"optimizer": "torch.optim.RAdam", "optimizer_args": ("nesterov",)}, "`name=value`, got 'nesterov'"),
        ({"optimizer": "torch.optim.RAdam", "optimizer_args": ("lr=1",)}, "which is `--learning_rate`"),
        ({"optimizer": "torch.optim.LBFGS"}, r"cannot take a step: .*closure"),
        ({"optimizer": "my_optimizers.Hidden"}, "goes on differently after its state was saved and read"),
        ({"optimizer": "my_optimizers.Noisy"}, "goes on differently after its state was saved and read"),
        ({"optimizer": "my_optimizers.Listed"}, "cannot be saved: `history` of the optimizer's state is a list"),
    ],
)
def test_what_cannot_be_used_is_refused_before_models_and_images(configure, own, monkeypatch, settings, message):
    def refuse(*args, **options):
        raise AssertionError("the model or the images were looked at first")

    monkeypatch.setattr("sd_memguard.training.plan.find_pipeline", refuse)
    monkeypatch.setattr("sd_memguard.training.plan.load_samples", refuse)
    with pytest.raises(ConfigError, match=message):
        make_plan(configure(**settings))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"optimizer_args": ("weight_decay=0",)}, "`--optimizer_args` belong to `--optimizer`"),
        ({"optimizer": "torch.optim.RAdam", "use_8bit_adam": True}, "`--use_8bit_adam` belongs to AdamW"),
        ({"optimizer": "torch.optim.RAdam", "adam_beta1": 0.8}, "`--adam_beta1` belongs to AdamW"),
        ({"lr_scheduler": "piecewise_constant"}, "must be given together, got piecewise_constant and None"),
        ({"lr_step_rules": "1:10,0.1"}, "must be given together, got constant and 1:10,0.1"),
        ({"lr_scheduler": "piecewise_constant", "lr_step_rules": "1:10,0.1:5,0"}, "rising steps, got '1:10,0.1:5,0'"),
        ({"lr_scheduler": "piecewise_constant", "lr_step_rules": "1:10"}, "with rising steps, got '1:10'"),
    ],
)
def test_settings_at_odds_are_refused(configure, settings, message):
    with pytest.raises(ConfigError, match=message):
        configure(**settings)


def test_matrices_alone_are_taken_by_muon(configure):
    importable(MUON)
    check_optimizer(configure(**MUON))
    with pytest.raises(ConfigError, match=r"does not take lr=0.001: .*2D"):
        check_optimizer(configure(optimizer="torch.optim.Muon"))


def test_arguments_are_literals_or_texts():
    assert read_arguments(["betas=(0.9,0.99)", "name=a=b", "flag=None"]) == {
        "betas": (0.9, 0.99),
        "name": "a=b",
        "flag": None,
    }


def test_adamw_by_its_path_trains_as_the_default(run):
    path = {"optimizer": "torch.optim.AdamW", "optimizer_args": ("fused=True",)}
    default, named = run("default", max_train_steps=6), run("named", max_train_steps=6, **path)
    weights = "unet/diffusion_pytorch_model.safetensors"
    assert (default.output_dir / weights).read_bytes() == (named.output_dir / weights).read_bytes()


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param(PRODIGY, id="prodigy"),
        pytest.param({**PRODIGY, "proxy": "lora", "rank": 2}, id="prodigy-lora", marks=pytest.mark.slow),
        pytest.param({**CAME, "gradient_accumulation_steps": 2}, id="came", marks=pytest.mark.slow),
        pytest.param(LION, id="lion", marks=pytest.mark.slow),
        pytest.param(ADAFACTOR, id="adafactor", marks=pytest.mark.slow),
        pytest.param(MUON, id="muon-lora", marks=pytest.mark.slow),
        pytest.param(SCHEDULE_FREE, id="schedule-free"),
        pytest.param({**SCHEDULE_FREE, "proxy": "lora", "rank": 2}, id="schedule-free-lora", marks=pytest.mark.slow),
    ],
)
def test_a_resumed_run_equals_one_that_was_not_stopped(run, configure, monkeypatch, settings):
    importable(settings)
    whole = run("whole", **settings)
    take = Trainer.step

    def step_and_signal(trainer, *args):
        if trainer.progress.global_step + 1 == 9:
            signal.raise_signal(signal.SIGTERM)
        return take(trainer, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", step_and_signal)
        with pytest.raises(Interrupted):
            run("parts", **settings)
    parts = run("parts", **settings, resume_from_checkpoint="latest")
    for file in ("unet/diffusion_pytorch_model.safetensors", "memguard/rounds.jsonl", "memguard/samples.parquet"):
        assert (whole.output_dir / file).read_bytes() == (parts.output_dir / file).read_bytes()


def train(optimizer, parameters, numbers) -> None:
    for number in numbers:
        for index, parameter in enumerate(parameters):
            generator = torch.Generator().manual_seed(100 * number + index)
            # Nearly the same way each time, so that Prodigy's step size grows.
            parameter.grad = 1 + 0.1 * torch.randn(parameter.shape, generator=generator)
        optimizer.step()


def test_each_proxy_has_its_own_numbers_of_a_group():
    """Two proxies that take turns go the way that each goes alone, Prodigy's step size included."""
    importable(PRODIGY)
    from prodigyopt import Prodigy

    def new() -> tuple[nn.Module, Prodigy]:
        torch.manual_seed(0)
        model = nn.Linear(4, 3)
        return model, Prodigy(model.parameters(), lr=1.0, d0=1e-3)

    model, optimizer = new()
    proxies = FullProxies(dict(model.named_parameters()), optimizer, 2, RamStore())
    for turn in range(3):
        for shard_index in range(2):
            proxies.activate(shard_index)
            train(optimizer, list(model.parameters()), [1000 * shard_index + 5 * turn + step for step in range(5)])
    for shard_index in range(2):
        proxies.activate(shard_index)
        alone, own_optimizer = new()
        train(own_optimizer, list(alone.parameters()), [1000 * shard_index + step for step in range(15)])
        assert optimizer.param_groups[0]["d"] == own_optimizer.param_groups[0]["d"] != 1e-3
        assert optimizer.param_groups[0]["k"] == 15
        torch.testing.assert_close(dict(model.named_parameters()), dict(alone.named_parameters()), rtol=0, atol=0)


def test_a_proxy_that_has_not_trained_begins_with_the_numbers_of_the_beginning():
    importable(PRODIGY)
    from prodigyopt import Prodigy

    weight = Parameter(torch.ones(3))
    optimizer = Prodigy([weight], lr=1.0)
    begin = group_numbers(optimizer)
    train(optimizer, [weight], range(3))
    saved = optimizer_tensors({"w": weight}, optimizer, begin)
    assert {"w|exp_avg", ":group0|k:number", ":group0|d_hat:number"} <= saved.keys()
    assert saved[":group0|d:number"].item() == optimizer.param_groups[0]["d"]
    load_optimizer_tensors({}, {"w": weight}, optimizer, begin)
    assert group_numbers(optimizer) == begin
    assert not optimizer.state


def test_a_state_of_another_shape_is_replaced():
    weight = Parameter(torch.zeros(3))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    optimizer.state[weight] = {"first": torch.tensor(0.0), "nothing": 1}
    load_optimizer_tensors({"w|first": torch.ones(3), "w|nothing:none": torch.zeros(0)}, {"w": weight}, optimizer)
    assert optimizer.state[weight]["first"].tolist() == [1, 1, 1]
    assert optimizer.state[weight]["nothing"] is None


def test_schedule_free_exports_its_average_and_goes_on_from_its_own_weights():
    importable(SCHEDULE_FREE)
    from schedulefree import AdamWScheduleFree

    def trained() -> tuple[Parameter, AdamWScheduleFree]:
        weight = Parameter(torch.linspace(-1, 1, 7))
        optimizer = AdamWScheduleFree([weight], lr=0.1)
        optimizer.train()
        train(optimizer, [weight], range(4))
        return weight, optimizer

    weight, optimizer = trained()
    before = weight.detach().clone()
    with evaluated({"w": weight}, optimizer):
        inside = weight.detach().clone()
    assert torch.equal(weight, before)
    expected, other = trained()
    other.eval()
    assert torch.equal(inside, expected)
    assert not torch.equal(inside, before)
    train(optimizer, [weight], [4])  # still in training mode


def test_schedule_free_is_refused_with_several_shards_and_with_ema(configure):
    importable(SCHEDULE_FREE)
    with pytest.raises(ConfigError, match=r"is schedule-free: .* got 3 shards; set `--num_shards 1`"):
        make_plan(configure(**{**SCHEDULE_FREE, "num_shards": 3}))
    with pytest.raises(ConfigError, match="`--use_ema` must not be given together with `--optimizer schedulefree"):
        make_plan(configure(**SCHEDULE_FREE, use_ema=True))


def test_memory_is_that_of_the_optimizer(configure):
    assert moments_per_weight(configure()) == 2
    assert moments_per_weight(configure(optimizer="torch.optim.SGD")) == 0
    assert moments_per_weight(configure(optimizer="torch.optim.SGD", optimizer_args=("momentum=0.9",))) == 1


def test_step_rules_are_those_of_the_plain_run():
    rates = learning_rate_schedule("piecewise_constant", 2.0, 0, 100, 2, "1:10,0.1:20,0.01")
    assert [rates(step) for step in (0, 4, 5, 9, 10, 40)] == [2.0, 2.0, 0.2, 0.2, 0.02, 0.02]
