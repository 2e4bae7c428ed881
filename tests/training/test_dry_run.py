"""``--dry_run`` measures the run that it stands for."""

import pytest
import torch
from diffusers import UNet2DConditionModel

from sd_memguard.core.schedule import RoundSchedule
from sd_memguard.files import gigabytes
from sd_memguard.training import dry_run
from sd_memguard.training.failures import OutOfMemoryError
from sd_memguard.training.loss import DenoisingLoss
from sd_memguard.training.progress_log import rounds_text


@pytest.fixture
def trained(monkeypatch):
    """Return the numbers of parameters that the timed steps train."""
    numbers, make = [], dry_run.ClippedStep

    def clipped_step(accelerator, optimizer, parameters, max_grad_norm):
        numbers.append(sum(parameter.numel() for parameter in parameters))
        assert sum(p.numel() for group in optimizer.param_groups for p in group["params"]) == numbers[-1]
        return make(accelerator, optimizer, parameters, max_grad_norm)

    monkeypatch.setattr(dry_run, "ClippedStep", clipped_step)
    return numbers


@pytest.mark.parametrize("settings", [{}, {"proxy": "lora", "rank": 2}])
def test_a_dry_run_times_steps_of_what_is_trained(run, pipeline, trained, settings):
    run(dry_run=True, **settings)
    unet = UNet2DConditionModel.from_pretrained(pipeline / "unet")
    attention = [p for n, p in unet.named_parameters() if n.endswith(("to_q.weight", "to_k.weight", "to_v.weight"))]
    attention += [p for n, p in unet.named_parameters() if n.endswith("to_out.0.weight")]
    adapter = sum(settings.get("rank", 0) * sum(weight.shape) for weight in attention)
    assert trained == [adapter or sum(parameter.numel() for parameter in unet.parameters())]


def test_a_dry_run_takes_the_settings_that_make_steps_faster(run, monkeypatch):
    compiled, forwards = [], []
    compute = DenoisingLoss.__call__
    matmul, before = torch.backends.cuda.matmul, torch.backends.cuda.matmul.allow_tf32
    monkeypatch.setattr(UNet2DConditionModel, "compile", lambda unet: compiled.append(unet))
    monkeypatch.setattr(
        DenoisingLoss,
        "__call__",
        lambda loss, *args: forwards.append(loss.dream_detail_preservation) or compute(loss, *args),
    )
    try:
        matmul.allow_tf32 = False
        run(dry_run=True, compile=True, allow_tf32=True, dream_training=True)
        assert matmul.allow_tf32
    finally:
        matmul.allow_tf32 = before
    assert len(compiled) == 1
    assert set(forwards) == {1.0}


def test_a_dry_run_that_does_not_fit_says_what_would(run, monkeypatch):
    def exhausted(*args, **options):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(DenoisingLoss, "__call__", exhausted)
    with pytest.raises(OutOfMemoryError, match="--train_batch_size 2"):
        run(dry_run=True)


def test_small_runs_are_told_in_numbers_that_say_something():
    assert gigabytes(7.2e6) == "7.2 MB"
    assert rounds_text(RoundSchedule.plan(40, 1, 50, redistributes=False)) == "1 round of 40 steps per proxy"
    assert rounds_text(RoundSchedule.plan(400, 2, 50, redistributes=False)) == "4 rounds of 50 steps per proxy"
