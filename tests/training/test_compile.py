"""A compiled UNet: the same training to rounding, in the same files, with proxies that are swapped in place."""

from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file
from torch import nn

from sd_memguard.training.interrupt import Interrupted
from sd_memguard.training.loop import Trainer
from tests.training.test_loop import results, stop_at

UNET = Path("unet/diffusion_pytorch_model.safetensors")


@pytest.fixture
def graphs(monkeypatch):
    """Compile without inductor, whose kernels take a minute, and return the graphs that were made."""
    made = []

    def backend(graph, inputs):
        made.append(graph)
        return graph.forward

    compile_with = nn.Module.compile
    monkeypatch.setattr(UNet2DConditionModel, "compile", lambda unet: compile_with(unet, backend=backend))
    torch._dynamo.reset()
    yield made
    torch._dynamo.reset()


@pytest.mark.parametrize("settings", [{"use_ema": True}, {"proxy": "lora", "rank": 2}], ids=["ema", "lora"])
def test_a_compiled_run_equals_one_that_is_not(run, graphs, pictures, monkeypatch, settings):
    settings = {**settings, "validation_data_dir": str(pictures), "checkpointing_steps": 12, "adam_epsilon": 1e-4}
    eager = run("eager", **settings)
    assert not graphs
    whole = run("compiled", **settings, compile=True)
    assert 1 <= len(graphs) <= 2  # the step's; a second one where a smaller batch made the sizes variable
    # The backend runs torch's own kernels, so that equality shows that nothing went by another way.
    assert results(whole.output_dir)[:2] == results(eager.output_dir)[:2]
    names = set(load_file(whole.output_dir / "checkpoint-12" / UNET))
    assert names == set(load_file(eager.output_dir / "checkpoint-12" / UNET))
    assert not [name for name in names if "_orig_mod" in name]
    StableDiffusionPipeline.from_pretrained(whole.output_dir, local_files_only=True)
    with monkeypatch.context() as patch:
        stop_at(patch, 9)
        with pytest.raises(Interrupted):
            run("parts", **settings, compile=True)
    parts = run("parts", **settings, compile=True, resume_from_checkpoint="latest")
    assert results(parts.output_dir)[:-1] == results(whole.output_dir)[:-1]  # the last names the folder


def test_every_forward_of_a_step_is_compiled(run, graphs, monkeypatch):
    forwards = []
    forward = UNet2DConditionModel.forward

    def count(unet, *args, **options):
        forwards.append(torch.compiler.is_compiling())
        return forward(unet, *args, **options)

    monkeypatch.setattr(UNet2DConditionModel, "forward", count)
    steps = []
    step = Trainer.step
    monkeypatch.setattr(Trainer, "step", lambda *args: (steps.append(1), step(*args))[1])
    run(compile=True, max_train_steps=6)
    assert len(steps) == 6
    assert len(forwards) <= 2
    assert all(forwards)
