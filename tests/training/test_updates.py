"""A step with a gradient that is not finite changes nothing, and the host does not wait to learn of it."""

import copy

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

from sd_memguard.core import host_copy
from sd_memguard.training.faults import NonFiniteError
from sd_memguard.training.loop import Trainer
from sd_memguard.training.loss import Noising
from sd_memguard.training.setup import make_accelerator, make_plan
from sd_memguard.training.updates import Updates

ATEN = torch.ops.aten
READS = {ATEN._local_scalar_dense.default, ATEN.nonzero.default, ATEN.masked_select.default, ATEN.equal.default}


class Device(TorchDispatchMode):
    """Plays a device on the CPU: marks what is computed from marked tensors, and records what would make the host wait.

    A `HostCopy` is the sanctioned way out; what it gives is not marked.
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
    visits = trainer.progress.cursors[0].peek(trainer.guard.plan.members(0), count * size * accumulation, 0)
    batches = trainer.source.batches([visits[start : start + size] for start in range(0, len(visits), size)])
    for _ in range(count):
        trainer.step(batches, accumulation)
        trainer.progress.global_step += 1
        yield


@pytest.mark.parametrize("settings", [{}, {"gradient_accumulation_steps": 2}, {"snr_gamma": 5.0}])
def test_a_step_waits_for_the_device_once(make_trainer, monkeypatch, settings):
    trainer = make_trainer(num_shards=1, **settings)
    waited, backwards = [], []
    device = Device(trainer.unet.parameters())
    draw, wait, backward = Noising.draw, host_copy.HostCopy.wait, trainer.accelerator.backward

    def draw_on_device(*args):
        drawn = draw(*args)
        device.mark(drawn)
        return drawn

    def record_wait(copy):
        waited.append((copy._copy.shape, len(backwards)))
        return wait(copy).numpy().copy() if False else torch.tensor(wait(copy).tolist())

    monkeypatch.setattr(Noising, "draw", draw_on_device)
    monkeypatch.setattr(host_copy.HostCopy, "wait", record_wait)
    monkeypatch.setattr(trainer.accelerator, "backward", lambda loss: (backward(loss), backwards.append(1)))
    run = steps(trainer, 3)
    next(run)  # makes the optimizer's state
    waited.clear(), backwards.clear()
    with device:
        next(run)
    accumulation = settings.get("gradient_accumulation_steps", 1)
    assert device.waits == []
    batch, norm = torch.Size([4, 4]), torch.Size([])
    # All behind the last backward; the norm is that of the step before and has long arrived.
    assert sorted(waited) == sorted([(batch, accumulation)] * accumulation + [(norm, accumulation)])
