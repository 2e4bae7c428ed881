"""LoRA proxies: exact averaging, files that load elsewhere, and runs that resume."""

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file

from sd_memguard.errors import ConfigError
from sd_memguard.proxies.full import WEIGHTS
from sd_memguard.training.loop import Trainer, train
from sd_memguard.training.setup import make_accelerator, make_plan

LORA = {"proxy": "lora", "rank": 2, "learning_rate": 1e-2, "report_to": "tensorboard"}
UNET = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture
def trainer(configure):
    """Return a run with three adapters that have been pushed apart by hand, before any averaging."""
    plan = make_plan(configure(**LORA))
    trainer = Trainer(plan, make_accelerator(plan.config))
    for shard_index in range(3):
        trainer.proxies.activate(shard_index)
        generator = torch.Generator().manual_seed(shard_index)
        for parameter in trainer.parameters:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    return trainer


def product(proxies, shard_index, layer):
    """Return B A of one proxy in float64."""
    state = proxies._state(shard_index, WEIGHTS)
    up, down = (state[f"{layer}.lora_{factor}.default.weight"].double() for factor in "BA")
    return up @ down


def effective(proxies, layer):
    """Return the weight that the resident model really multiplies with."""
    return proxies.base[layer].detach().double() + product(proxies, proxies.resident, layer)


def test_the_aggregate_is_the_mean_of_the_merged_proxies(trainer):
    proxies, weights = trainer.proxies, [1.0, 2.0, 5.0]
    for _ in range(3):
        expected = {
            layer: master.double() + sum(w * product(proxies, k, layer) for k, w in enumerate(weights)) / sum(weights)
            for layer, master in proxies.master.items()
        }
        factors = {layer: product(proxies, 0, layer) for layer in expected}
        proxies.average(weights)
        for layer, weight in expected.items():
            torch.testing.assert_close(effective(proxies, layer), weight, atol=1e-6, rtol=0)
            assert not torch.allclose(product(proxies, 0, layer), factors[layer])
        for shard_index in range(3):  # apart again, for the next averaging
            proxies.activate(shard_index)
            for parameter in trainer.parameters:
                parameter.data = parameter.data + 0.05 * (shard_index + 1)


def test_looking_at_the_aggregate_changes_nothing(trainer):
    proxies = trainer.proxies
    before = {layer: effective(proxies, layer) for layer in proxies.master}
    merged = proxies.merged([1.0, 1.0, 1.0])
    with proxies.averaged([1.0, 1.0, 1.0]):
        for layer, weight in merged.items():
            torch.testing.assert_close(effective(proxies, layer), weight.double(), atol=1e-6, rtol=0)
    for layer, weight in before.items():
        assert torch.equal(effective(proxies, layer), weight)


@pytest.mark.parametrize("num_shards", [1, 3])
def test_the_lora_file_on_the_source_draws_like_the_merged_folder(run, pipeline, num_shards):
    result = run(**LORA, num_shards=num_shards)
    assert result.summary["lora_rank"] == 2 * num_shards
    assert result.summary["lora_relative_error"] < (1e-3 if num_shards == 1 else 0.5)
    adapted = StableDiffusionPipeline.from_pretrained(pipeline, local_files_only=True)
    adapted.load_lora_weights(result.output_dir)
    merged = UNet2DConditionModel.from_pretrained(result.output_dir, subfolder="unet")
    source = UNet2DConditionModel.from_pretrained(pipeline, subfolder="unet")
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    text = torch.randn(2, 16, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        ours, theirs, untouched = (unet(noise, 20, text).sample for unet in (merged, adapted.unet, source))
    change = (ours - untouched).norm()
    assert change > 0
    tolerance = 1e-3 if num_shards == 1 else result.summary["lora_relative_error"] * 2
    assert (ours - theirs).norm() <= tolerance * change


def test_only_the_attention_projections_change(run, pipeline):
    trained, source = load_file(run(**LORA).output_dir / UNET), load_file(pipeline / UNET)
    changed = {name for name in source if not torch.equal(trained[name], source[name])}
    assert changed
    assert all(any(f".{target}." in name for target in ("to_q", "to_k", "to_v", "to_out.0")) for name in changed)


def test_a_neutral_guard_trains_like_none(run):
    off = {"skip_threshold": 0.0, "augment_threshold": 0.0, "redistribute_fraction": 0.0, "num_shards": 1}
    guarded, plain = run("guarded", **LORA, **off), run("plain", **LORA, memguard="off")
    assert (guarded.output_dir / UNET).read_bytes() == (plain.output_dir / UNET).read_bytes()


def test_a_resumed_run_equals_one_that_was_not_stopped(run, configure, monkeypatch):
    whole = run("whole", **LORA)
    step = Trainer.step

    def stop_at_14(self, *args):
        if self.progress.global_step == 14:
            raise KeyboardInterrupt
        return step(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", stop_at_14)
        with pytest.raises(KeyboardInterrupt):
            run("stopped", **LORA, checkpointing_steps=13)
    resumed = train(configure("stopped", **LORA, resume_from_checkpoint="latest"))
    for file in (UNET, "pytorch_lora_weights.safetensors", "memguard/rounds.jsonl"):
        assert (resumed.output_dir / file).read_bytes() == (whole.output_dir / file).read_bytes()


def test_an_ema_is_refused(configure):
    with pytest.raises(ConfigError, match="use_ema"):
        configure(**LORA, use_ema=True)


def test_the_drawings_of_validation_prompt_are_made(run, monkeypatch):
    drawn = []
    monkeypatch.setattr("sd_memguard.training.loop.draw_prompts", lambda *args: drawn.append(args[2]) or [])
    monkeypatch.setattr("sd_memguard.training.logs.RunLog.drawings", lambda *args: None)
    run(**LORA, validation_prompt="a private thing", num_validation_images=2)
    assert drawn
    assert all(prompts == ["a private thing"] * 2 for prompts in drawn)
