"""A step with a gradient that is not finite changes nothing, and the host does not wait to learn of it."""

import copy

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

from sd_memguard.core import async_copy as host_copy
from sd_memguard.training.build import make_accelerator
from sd_memguard.training.failures import NonFiniteError
from sd_memguard.training.loss import NoiseSampler
from sd_memguard.training.optimizer_step import ClippedStep
from sd_memguard.training.plan import make_plan
from sd_memguard.training.signals import StopRequest
from sd_memguard.training.trainer import Trainer

ATEN = torch.ops.aten
READS = {ATEN._local_scalar_dense.default, ATEN.nonzero.default, ATEN.masked_select.default, ATEN.equal.default}


class Device(TorchDispatchMode):
    """Plays a device on the CPU: marks what is computed from marked tensors, and records what would make the host wait.

    A `AsyncCPUCopy` is the sanctioned way out; what it gives is not marked.
    """

    def __init__(self, marked):
        super().__init__()
        self.marked = WeakTensorKeyDictionary()
        self.waits, self.sanctioned = [], 0
        self.mark(marked)

    def mark(self, tensors):
        for tensor in tensors:
            self.marked[tensor] = True

    def is_marked(self, values):
        return any(isinstance(leaf, torch.Tensor) and leaf in self.marked for leaf in tree_leaves(values))

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        picks = function is ATEN.index.Tensor and any(i is not None and i.dtype == torch.bool for i in args[1])
        on_device = self.is_marked((args, kwargs))
        if on_device and (function in READS or picks):
            self.waits.append(str(function))
        result = function(*args, **kwargs)
        if on_device:
            self.mark(leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor))
        return result


@pytest.fixture
def make_trainer(configure):
    def make(**settings):
        plan = make_plan(configure(**settings))
        return Trainer(plan, make_accelerator(plan.config))

    return make


def steps(trainer, count):
    """Yield after each of so many steps of the first shard."""
    size, accumulation = trainer.config.train_batch_size, trainer.config.gradient_accumulation_steps
    visits = trainer.progress.samplers[0].peek(trainer.guard.plan.members(0), count * size * accumulation, 0)
    batches = trainer.source.batches([visits[start : start + size] for start in range(0, len(visits), size)])
    for _ in range(count):
        trainer.step(batches, [size] * accumulation)
        trainer.progress.global_step += 1
        yield


@pytest.mark.parametrize("settings", [{}, {"gradient_accumulation_steps": 2}, {"snr_gamma": 5.0}])
def test_a_step_waits_for_the_device_once(make_trainer, monkeypatch, settings):
    trainer = make_trainer(num_shards=1, **settings)
    waited, backwards = [], []
    device = Device(trainer.unet.parameters())
    draw, wait, backward = NoiseSampler.sample, host_copy.AsyncCPUCopy.wait, trainer.accelerator.backward

    def draw_on_device(*args):
        drawn = draw(*args)
        device.mark(drawn)
        return drawn

    def record_wait(copy):
        waited.append((copy._copy.shape, len(backwards)))
        return torch.from_numpy(wait(copy).numpy().copy())  # on the host: not marked

    monkeypatch.setattr(NoiseSampler, "sample", draw_on_device)
    monkeypatch.setattr(host_copy.AsyncCPUCopy, "wait", record_wait)
    monkeypatch.setattr(trainer.accelerator, "backward", lambda loss: (backward(loss), backwards.append(1)))
    run = steps(trainer, 3)
    next(run)  # makes the optimizer's state
    waited.clear()
    backwards.clear()
    with device:
        next(run)
    accumulation = settings.get("gradient_accumulation_steps", 1)
    assert device.waits == []
    batch, norm = torch.Size([4, 4]), torch.Size([])
    # All behind the last backward; the norm is that of the step before and has long arrived.
    assert sorted(waited) == sorted([(batch, accumulation)] * accumulation + [(norm, accumulation)])


def test_the_played_device_notices_what_waits():
    with Device([tensor := torch.ones(3)]) as device:
        doubled = 2 * tensor
        _ = torch.ones(3).sum().item()
        assert device.waits == []
        _ = bool(doubled.sum() > 1), doubled[doubled > 1], doubled.nonzero()
    assert len(device.waits) == 3


class Parts:
    """A model of two parameters with its optimizer, for steps by hand."""

    def __init__(self, trainer, fused):
        generator = torch.Generator().manual_seed(0)
        self.parameters = [torch.nn.Parameter(torch.randn(3, 2, generator=generator)) for _ in range(2)]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=0.1, fused=fused)
        self.optimizer_step = ClippedStep(trainer.accelerator, self.optimizer, self.parameters, 1.0)

    def step(self, *, scale=1.0, bad=False):
        for number, parameter in enumerate(self.parameters):
            parameter.grad = torch.full_like(parameter, 0.5 + number)
        if bad:
            self.parameters[1].grad[0, 0] = torch.nan
        return self.optimizer_step.step(scale).wait()

    def state(self):
        moments = [self.optimizer.state[p] for p in self.parameters]
        return copy.deepcopy(([p.detach() for p in self.parameters], moments))


@pytest.mark.parametrize("fused", [True, False])
def test_a_gradient_that_is_not_finite_changes_nothing(make_trainer, fused):
    parts, other = (Parts(make_trainer(output=str(i)), fused) for i in range(2))
    for each in (parts, other):
        assert each.step().isfinite()
    before = parts.state()
    assert not parts.step(bad=True).isfinite()
    torch.testing.assert_close(parts.state(), before, rtol=0, atol=0)
    assert all(parameter.grad is None for parameter in parts.parameters)
    for each in (parts, other):
        each.step(scale=2.0)
    torch.testing.assert_close(parts.state(), other.state(), rtol=0, atol=0)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize(("scale", "max_norm"), [(1.0, 1.0), (4 / 3, 1.0), (4 / 3, 100.0), (0.5, float("inf"))])
def test_a_step_is_that_of_torch_on_scaled_and_clipped_gradients(make_trainer, fused, scale, max_norm):
    parts = Parts(make_trainer(), fused)
    parts.optimizer_step.max_grad_norm = max_norm
    plain = [torch.nn.Parameter(parameter.detach().clone()) for parameter in parts.parameters]
    optimizer = torch.optim.AdamW(plain, lr=0.1)
    for _ in range(3):
        norm = parts.step(scale=scale)
        for number, parameter in enumerate(plain):
            parameter.grad = torch.full_like(parameter, scale * (0.5 + number))
        torch.testing.assert_close(norm, torch.nn.utils.clip_grad_norm_(plain, max_norm))
        optimizer.step()
    torch.testing.assert_close([p.detach() for p in parts.parameters], [p.detach() for p in plain])


def test_bad_gradients_are_named_counted_and_end_the_run(make_trainer, monkeypatch, caplog):
    trainer = make_trainer(memguard="off")
    run = steps(trainer, 12)
    next(run)
    weights = {name: tensor.clone() for name, tensor in trainer.unet.state_dict().items()}
    backward = trainer.accelerator.backward

    def poisoned(loss):
        backward(loss)
        trainer.parameters[0].grad.view(-1)[0] = torch.inf

    monkeypatch.setattr(trainer.accelerator, "backward", poisoned)
    next(run)
    trainer.check_pending_norms()
    assert trainer.progress.nonfinite_steps == 1
    assert "step 2 is skipped: its gradient is not finite" in caplog.text
    assert caplog.text.count("secret-") == 4
    with pytest.raises(NonFiniteError, match="gradient of 5 steps in a row"):
        list(run)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in trainer.unet.state_dict().items())


# fp16, whose GradScaler also works on the CPU.


@pytest.fixture
def make_fp16_trainer(configure, monkeypatch):
    """Return a function that makes a trainer with fp16's GradScaler; the forward stays in float32."""

    def make(**settings):
        plan = make_plan(configure(**settings))
        accelerator = make_accelerator(plan.config)
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=3)
        monkeypatch.setattr(type(accelerator), "mixed_precision", "fp16")  # by which it takes the scale out again
        return plan, accelerator

    def trainer(**settings):
        plan, accelerator = make(**settings)
        with monkeypatch.context() as patch:
            patch.setattr(type(accelerator), "mixed_precision", "no")
            made = Trainer(plan, accelerator)
        accelerator.native_amp = True
        return made

    return trainer


def test_lasting_overflows_end_the_run_before_the_scale_is_nothing(make_fp16_trainer, monkeypatch, caplog):
    trainer = make_fp16_trainer(memguard="off", max_train_steps=60)
    run = steps(trainer, 60)
    next(run)
    weights = {name: tensor.clone() for name, tensor in trainer.unet.state_dict().items()}
    backward = trainer.accelerator.backward

    def poisoned(loss):
        backward(loss)
        trainer.parameters[0].grad.view(-1)[0] = torch.nan

    monkeypatch.setattr(trainer.accelerator, "backward", poisoned)
    with pytest.raises(NonFiniteError, match="gradient of 25 steps in a row"):
        list(run)
    assert caplog.text.count("is skipped: its gradient is not finite") == 1
    assert trainer.progress.nonfinite_steps == 25
    assert trainer.accelerator.scaler.get_scale() > 0
    assert all(torch.equal(tensor, weights[name]) for name, tensor in trainer.unet.state_dict().items())


def test_a_passing_overflow_is_counted_and_halves_the_scale(make_fp16_trainer, monkeypatch):
    trainer = make_fp16_trainer(memguard="off")
    run = steps(trainer, 3)
    backward, calls = trainer.accelerator.backward, []

    def poisoned(loss):
        backward(loss)
        calls.append(1)
        if len(calls) == 2:
            trainer.parameters[0].grad.view(-1)[0] = torch.inf

    monkeypatch.setattr(trainer.accelerator, "backward", poisoned)
    list(run)
    trainer.check_pending_norms()
    assert (trainer.progress.nonfinite_steps, trainer.nonfinite_in_a_row) == (1, 0)
    assert trainer.accelerator.scaler.get_scale() == 2.0**9


def test_each_proxy_has_a_scale_of_its_own_which_checkpoints_keep(make_fp16_trainer, tmp_path):
    trainer = make_fp16_trainer(num_shards=2, steps_per_round=4, max_train_steps=8)
    scaler = trainer.accelerator.scaler
    with StopRequest() as stop:
        trainer.records.begin(trainer.plan.record)
        trainer.train_shard(0, stop)
        assert scaler.get_scale() == 2.0**11  # three good steps in a row double it
        scaler.update(2.0**5)
        trainer.train_shard(1, stop)
        assert scaler.get_scale() == 2.0**11
        trainer.state.save_checkpoint()
    later = make_fp16_trainer(num_shards=2, steps_per_round=4, max_train_steps=8, resume_from_checkpoint="latest")
    later.resume()
    assert [state["scale"] for state in later.scalers.state()] == [2.0**5, 2.0**11]
    assert later.accelerator.scaler.get_scale() == 2.0**11
