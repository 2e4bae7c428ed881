"""The guard in loops that use accelerate: objects, windows, checkpoints, and the same result as the drop-in script."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from peft import LoraConfig, inject_adapter_in_model
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import DataLoader

from sd_memguard import MemorizationGuard
from sd_memguard.data.batches import BatchSource, Encoders, sample_address
from sd_memguard.errors import LoopError
from sd_memguard.models.lora import add_adapter
from sd_memguard.plugin.backends import AccelerateBackend
from sd_memguard.training.build import base_learning_rate, make_accelerator, make_optimizer, prepare_models
from sd_memguard.training.loss import DenoisingLoss, NoiseSampler
from sd_memguard.training.plan import make_plan
from tests.plugin.toy import BATCH_SIZE, Denoiser, losses_of, make_guard, make_loader, make_network, neutral_guard

TOTAL = 26


class AccelerateLoop:
    """A loop as diffusers' examples are: prepare, accumulate, EMA, save_state and load_state; global randomness."""

    def __init__(self, guard=None, *, lora=False, use_ema=False, accumulation=1, total_steps=TOTAL, **options):
        torch.manual_seed(3)
        self.guard = guard
        self.accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulation)
        self.network = make_network()
        if lora:
            with torch.random.fork_rng():
                self.network.requires_grad_(False)
                config = LoraConfig(r=2, lora_alpha=4, target_modules=["first", "second"], init_lora_weights="gaussian")
                self.network = inject_adapter_in_model(config, self.network)
        parameters = [p for p in self.network.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=1e-2)
        schedule = get_scheduler("linear", optimizer, num_warmup_steps=4, num_training_steps=total_steps)
        self.ema = EMAModel(parameters) if use_ema else None
        objects = (self.network, optimizer, make_loader(), schedule)
        if guard is None:
            prepared = self.accelerator.prepare(*objects)
        else:
            prepared = guard.prepare(self.accelerator, *objects, total_steps=total_steps, ema=self.ema, **options)
        self.unet, self.optimizer, self.loader, self.schedule = prepared
        self.step = self.epochs = 0
        self.windows = []

    def run(self, steps, save_at=None, folder=None):
        batches = 0
        while self.step < steps:
            self.epochs += 1
            for batch in self.loader:
                with self.accelerator.accumulate(self.unet):
                    losses, timesteps = losses_of(self.unet, batch["values"], None)
                    loss = losses.mean()
                    if self.guard is not None:
                        loss = self.guard.weigh(losses, timesteps, batch["sample_id"]).loss
                    self.accelerator.backward(loss)
                    self.optimizer.step()
                    self.schedule.step()
                    self.optimizer.zero_grad()
                batches += 1
                if self.accelerator.sync_gradients:
                    if self.ema is not None:
                        self.ema.step(self.unet.parameters())
                    self.windows.append(batches)
                    batches = 0
                    self.step += 1
                    if self.step == save_at:
                        self.accelerator.save_state(folder)
                if self.step >= steps:
                    break
        return self

    def weights(self):
        return torch.cat([p.detach().flatten() for p in self.unet.parameters()])


def test_prepare_returns_the_same_objects_and_wraps_no_model():
    loop = AccelerateLoop(make_guard())

    assert loop.unet is loop.network
    assert type(loop.unet) is Denoiser
    assert isinstance(loop.loader, DataLoader)
    assert len(loop.loader) == 6
    assert loop.optimizer in loop.accelerator._optimizers
    assert loop.schedule in loop.accelerator._schedulers


def test_windows_end_with_the_epoch_as_before():
    plain = AccelerateLoop(accumulation=4).run(8)
    guarded = AccelerateLoop(make_guard(num_shards=1, redistribute_fraction=0.0), accumulation=4).run(8)

    assert plain.windows == guarded.windows == [4, 2] * 4


def test_a_neutral_guard_changes_nothing_to_the_byte():
    plain, guarded = (AccelerateLoop(guard, accumulation=4).run(13) for guard in (None, neutral_guard()))
    state = torch.get_rng_state()
    AccelerateLoop(accumulation=4).run(13)

    assert torch.equal(plain.weights(), guarded.weights())
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize(
    ("step", "options"),
    [
        pytest.param(3, {}, id="mid-turn"),
        pytest.param(4, {}, id="turn-end"),
        pytest.param(6, {}, id="before-redistribution-and-epoch-end"),
        pytest.param(12, {}, id="before-averaging"),
        pytest.param(15, {"use_ema": True}, id="ema"),
        pytest.param(14, {"lora": True}, id="lora"),
        pytest.param(5, {"accumulation": 4}, id="accumulation"),
        pytest.param(7, {"on_disk": True}, id="disk-store"),
    ],
)
def test_a_resumed_loop_equals_one_that_was_not_stopped(tmp_path, step, options):
    on_disk = options.pop("on_disk", False)

    def loop(name):
        where = {"store_dir": tmp_path / name} if on_disk else {}
        return AccelerateLoop(make_guard(), **options, **where)

    whole = loop("whole").run(TOTAL, save_at=step, folder=tmp_path / "checkpoint")
    resumed = loop("resumed")
    resumed.accelerator.load_state(tmp_path / "checkpoint")
    resumed.step = step
    resumed.run(TOTAL)

    assert torch.equal(resumed.weights(), whole.weights())
    rounds = [each.loader.driver.ensemble.rounds for each in (whole, resumed)]
    assert rounds[0] == rounds[1]
    steps_per_epoch = -(-len(whole.loader) // options.get("accumulation", 1))
    assert resumed.epochs == whole.epochs - step // steps_per_epoch
    assert torch.equal(whole.guard.ledger.skips, resumed.guard.ledger.skips)
    if whole.ema is not None:
        assert all(torch.equal(a, b) for a, b in zip(whole.ema.shadow_params, resumed.ema.shadow_params, strict=True))


def test_checkpoints_hold_nothing_of_ours_that_is_unpickled(tmp_path):
    AccelerateLoop(make_guard()).run(3, save_at=3, folder=tmp_path)

    names = {path.suffix for path in (tmp_path / "memguard").rglob("*") if path.is_file()}
    assert names == {".json", ".safetensors"}
    assert not list(tmp_path.glob("custom_checkpoint*"))


def test_checkpoints_of_others_are_refused(tmp_path):
    AccelerateLoop(neutral_guard()).run(2, save_at=2, folder=tmp_path / "neutral")
    loop = AccelerateLoop(make_guard())
    with pytest.raises(LoopError, match=r"by another guard: .*'shards': 1"):
        loop.accelerator.load_state(tmp_path / "neutral")
    shutil.rmtree(tmp_path / "neutral" / "memguard")
    with pytest.raises(LoopError, match="was written without the guard"):
        loop.accelerator.load_state(tmp_path / "neutral")


@pytest.mark.parametrize(("kind", "message"), [("DEEPSPEED", "runs DEEPSPEED"), ("FSDP", "runs FSDP")])
def test_spread_models_are_refused(kind, message):
    accelerator = SimpleNamespace(distributed_type=SimpleNamespace(name=kind), num_processes=2)
    with pytest.raises(LoopError, match=message):
        AccelerateBackend(accelerator)


def test_proxies_do_not_take_turns_in_several_processes(monkeypatch):
    monkeypatch.setattr(AccelerateBackend, "num_processes", 2)
    with pytest.raises(LoopError, match="2 processes train together"):
        AccelerateLoop(make_guard())


def test_a_checkpoint_brings_the_guard_of_one_shard_back(tmp_path):
    loop = AccelerateLoop(make_guard(num_shards=1)).run(9, save_at=9, folder=tmp_path)
    resumed = AccelerateLoop(make_guard(num_shards=1))
    resumed.accelerator.load_state(tmp_path)
    resumed.loader.driver.advance_turn()

    assert torch.equal(resumed.guard.ledger.skips, loop.guard.ledger.skips)
    assert torch.equal(resumed.guard.rules[0].bank.sums, loop.guard.rules[0].bank.sums)
    assert int(loop.guard.ledger.skips.sum()) > 0


def test_a_longer_run_goes_on_in_the_rounds_it_was_begun_with(tmp_path):
    AccelerateLoop(make_guard(steps_per_round="auto"), total_steps=12).run(12, save_at=12, folder=tmp_path)
    longer = AccelerateLoop(make_guard(steps_per_round="auto"), total_steps=900)
    longer.schedule.step = lambda: None
    longer.accelerator.load_state(tmp_path)
    longer.loader.driver.advance_turn()
    assert longer.loader.driver.schedule.steps_per_round == 50  # 900 steps alone would be in rounds of 50 as well
    assert longer.loader.driver.ensemble.steps_left > 0

    with pytest.raises(LoopError, match=r"`--max_train_steps` \(`total_steps`\) 12 there, 11 here"):
        AccelerateLoop(make_guard(), total_steps=11).accelerator.load_state(tmp_path)
    with pytest.raises(LoopError, match="`--steps_per_round` 50 there, 2 here"):
        AccelerateLoop(make_guard(), total_steps=12).accelerator.load_state(tmp_path)


def test_lora_is_saved_as_one_adapter_on_the_base_as_it_was():
    loop = AccelerateLoop(make_guard(redistribute_fraction=0.0, skip_threshold=0.0), lora=True)
    before = {name: p.detach().clone() for name, p in loop.network.named_parameters() if "base_layer" in name}
    loop.run(13)  # in the middle of a turn, after two averagings
    values = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    proxies = loop.guard.attachment.ensemble.proxies
    changes = proxies.changes(loop.guard.aggregation_weights())
    own = loop.network(values)

    with loop.guard.averaged(loop.unet):
        for name, parameter in loop.network.named_parameters():
            if "base_layer" in name:
                assert torch.equal(parameter, before[name])
        assert loop.network.first.lora_A["default"].weight.shape == (6, 4)  # 2 x 3 is more than the layer has
        for layer, module in (("first", loop.network.first), ("second", loop.network.second)):
            change = module.scaling["default"] * module.lora_B["default"].weight @ module.lora_A["default"].weight
            expected = (changes[layer].up @ changes[layer].down).float()
            torch.testing.assert_close(change, expected, rtol=0, atol=1e-6)
            inputs = torch.randn(3, module.in_features)
            merged = nn.functional.linear(inputs, module.base_layer.weight + expected, module.base_layer.bias)
            torch.testing.assert_close(module(inputs), merged)
    assert torch.equal(loop.network(values), own)
    for name, parameter in loop.network.named_parameters():
        if "base_layer" in name:
            assert torch.equal(parameter, before[name])
    with loop.guard.averaged(loop.unet, rank=2):
        assert loop.network.second.lora_A["default"].weight.shape == (2, 8)
    loop.run(TOTAL)


def adapt(**settings):
    network = make_network().requires_grad_(False)
    config = {"r": 2, "target_modules": ["first", "second"], **settings}
    return inject_adapter_in_model(LoraConfig(**config), network)


@pytest.mark.parametrize(
    ("network", "message"),
    [
        (lambda: adapt(use_dora=True), "plain LoRA on linear layers alone"),
        (lambda: adapt(alpha_pattern={"second": 16}), "alpha / rank differs"),
        (
            lambda: inject_adapter_in_model(
                LoraConfig(r=2, target_modules=["0"]), nn.Sequential(nn.Conv2d(2, 2, 3)).requires_grad_(False)
            ),
            "which is no linear layer",
        ),
    ],
    ids=["dora", "alpha-pattern", "convolution"],
)
def test_adapters_that_cannot_be_averaged_are_refused(network, message):
    network = network()
    optimizer = torch.optim.AdamW([p for p in network.parameters() if p.requires_grad])
    with pytest.raises(LoopError, match=message):
        make_guard().attach(network, optimizer, make_loader(), total_steps=TOTAL)


@pytest.mark.parametrize("settings", [{}, {"gradient_accumulation_steps": 2}, {"proxy": "lora", "rank": 2}])
def test_the_drop_in_script_and_a_loop_of_ones_own_give_the_same(run, configure, settings):
    """Same data, seed and settings: the loop draws by core.seeding, as the script does."""
    settings = {
        **settings,
        "augment_threshold": 0.0,
        "adam_epsilon": 1e-4,  # with 1e-8 it blows up the rounding of sums in another order
        "snr_gamma": 5.0,
        "lr_scheduler": "linear",
        "lr_warmup_steps": 4,
    }
    script = run("script", **settings)
    config = configure("loop", **settings)
    plan = make_plan(config)
    accelerator = make_accelerator(plan.config)
    accelerator.gradient_accumulation_steps = config.gradient_accumulation_steps
    models = prepare_models(plan, accelerator)
    unet = models.unet
    if config.proxy == "lora":
        add_adapter(unet, config.rank, plan.seed, torch.float32)
    named = {name: p for name, p in unet.named_parameters() if p.requires_grad}
    optimizer = make_optimizer(named, plan.config, accelerator.device, plan.batch_size)
    optimizer.param_groups[0]["lr"] = base_learning_rate(config, plan.batch_size)
    schedule = get_scheduler("linear", optimizer, num_warmup_steps=4, num_training_steps=config.max_train_steps)
    source = BatchSource(plan.samples, Encoders(models, accelerator.device, torch.float32), plan.config, plan.seed)
    num_timesteps = models.noise_scheduler.config.num_train_timesteps
    noise_sampler = NoiseSampler(plan.seed, num_timesteps)
    denoising_loss = DenoisingLoss(models.noise_scheduler, snr_gamma=5.0)
    loader = DataLoader([{"row": torch.tensor(i)} for i in range(24)], batch_size=BATCH_SIZE, shuffle=True)

    guard = MemorizationGuard(plan.config.guard, 24, num_timesteps=num_timesteps)
    unet, optimizer, loader, schedule = guard.prepare(
        accelerator, unet, optimizer, loader, schedule, total_steps=config.max_train_steps
    )
    step = 0
    while step < config.max_train_steps:
        for batch in loader:
            with accelerator.accumulate(unet):
                visits = loader.driver.refs
                assert [visit.sample_id for visit in visits] == batch["sample_id"].tolist() == batch["row"].tolist()
                _, (latents, condition, _) = next(iter(source.batches([visits])))
                addresses = [sample_address(visit) for visit in visits]
                timesteps, noise, _ = noise_sampler.sample(addresses, latents.shape[1:], latents.device)
                losses = denoising_loss(unet, latents, condition, timesteps, noise)
                verdict = guard.weigh(losses, timesteps, batch["sample_id"], denoising_loss.weights(timesteps))
                accelerator.backward(verdict.loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(named.values(), config.max_grad_norm)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
            step += accelerator.sync_gradients
            if step == config.max_train_steps:
                break

    expected = load_file(script.output_dir / "unet/diffusion_pytorch_model.safetensors")
    with guard.averaged(unet, rank=64):
        for name, weight in merged_weights(unet).items():
            torch.testing.assert_close(weight, expected[name], rtol=0, atol=2e-5)
    rows = [(row["kind"], row["moves"]) for row in loader.driver.ensemble.rounds]
    assert rows == [(row["kind"], row["moves"]) for row in recorded_rounds(script.output_dir)]
    assert "redistribute" in dict(rows)


def merged_weights(unet):
    """Return the weights of a UNet under the names of a plain one, with its adapter merged in."""
    merged = {}
    for name, parameter in unet.named_parameters():
        if "lora_" in name:
            continue
        merged[name.replace(".base_layer", "")] = parameter.detach()
    for name, module in unet.named_modules():
        if hasattr(module, "base_layer"):
            up, down = (getattr(module, side)["default"].weight.detach() for side in ("lora_B", "lora_A"))
            merged[f"{name}.weight"] = merged[f"{name}.weight"] + module.scaling["default"] * up @ down
    return merged


def recorded_rounds(folder):

    lines = (folder / "memguard" / "rounds.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]
