"""A compiled UNet: the same training to rounding, in the same files, with proxies that are swapped in place."""

from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file
from torch import nn

from tests.training.test_trainer import results

pytestmark = pytest.mark.slow

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


# With rounds of two steps, all three proxies have their turn within the six steps of one round.
@pytest.mark.parametrize(
    "settings",
    [{"use_ema": True, "max_train_steps": 12}, {"proxy": "lora", "rank": 2, "max_train_steps": 6}],
    ids=["ema", "lora"],
)
def test_a_compiled_run_equals_one_that_is_not(run, graphs, images, settings):
    settings = {**settings, "validation_data_dir": str(images), "checkpointing_steps": 6}
    eager = run("eager", **settings)
    assert not graphs
    whole = run("compiled", **settings, compile=True)
    assert 1 <= len(graphs) <= 2  # the step's, and not the probes'; a second one would be of variable sizes
    # The backend runs torch's own kernels, so that equality shows that nothing went by another way.
    assert results(whole.output_dir)[:4] == results(eager.output_dir)[:4]
    names = set(load_file(whole.output_dir / "checkpoint-6" / UNET))
    assert names == set(load_file(eager.output_dir / "checkpoint-6" / UNET))
    assert not [name for name in names if "_orig_mod" in name]
    StableDiffusionPipeline.from_pretrained(whole.output_dir, local_files_only=True)
    if "use_ema" in settings:
        checkpoint = str(whole.output_dir / "checkpoint-6")
        parts = run("parts", **settings, compile=True, resume_from_checkpoint=checkpoint)
        assert results(parts.output_dir) == results(whole.output_dir)
