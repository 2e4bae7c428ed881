"""What a run trains with, where the device matters that these tests have to play."""

from types import SimpleNamespace

import pytest
import torch
from diffusers.training_utils import EMAModel

from sd_memguard.models.pipeline import load_unet
from sd_memguard.proxies.swap import copy_tensors
from sd_memguard.training.build import make_ema, step_ema

CUDA, CPU = torch.device("cuda"), torch.device("cpu")


@pytest.fixture
def calls(monkeypatch):
    """Return what is asked of the EMA and of CUDA, in order; the shadows stay on the CPU."""
    calls = []
    monkeypatch.setattr(EMAModel, "to", lambda ema, device, **how: calls.append((str(device), how)))
    monkeypatch.setattr(EMAModel, "pin_memory", lambda ema: calls.append("pin"))
    monkeypatch.setattr(EMAModel, "step", lambda ema, parameters: calls.append("step"))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: calls.append("synchronize"))
    return calls


def test_an_offloaded_average_is_moved_to_the_host_before_it_is_pinned(configure, pipeline, calls):
    config = configure(use_ema=True, offload_ema=True)
    make_ema(load_unet(pipeline, config), config, CUDA)
    assert calls == [("cpu", {}), "pin"]  # pinning a tensor of the device raises


def test_an_offloaded_average_has_arrived_on_the_host_when_its_step_is_over(calls):
    step_ema(EMAModel([]), [], CUDA, offload=True)
    wait = {"non_blocking": True}
    assert calls == [("cuda", wait), "step", ("cpu", wait), "synchronize"]
    calls.clear()
    step_ema(EMAModel([]), [], torch.device("mps"), offload=True)  # copies and waits
    assert calls == [("mps", {"non_blocking": False}), "step", ("cpu", {"non_blocking": False})]


@pytest.mark.parametrize("is_cuda", [True, False])
def test_only_cuda_copies_from_the_host_without_waiting(is_cuda):
    copied = []
    target = SimpleNamespace(is_cuda=is_cuda, copy_=lambda tensor, non_blocking: copied.append((tensor, non_blocking)))
    copy_tensors({"a": 1}, {"a": target})
    assert copied == [(1, is_cuda)]
