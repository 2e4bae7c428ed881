"""LoRA proxies: exact averaging, files that load elsewhere, and runs that resume."""

import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from diffusers.utils import convert_state_dict_to_kohya
from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict
from safetensors.torch import load_file

from sd_memguard.errors import ConfigError
from sd_memguard.models.lora import LoraError, diffusers_names, kohya_names, low_rank, smallest_rank
from sd_memguard.proxies.full import WEIGHTS
from sd_memguard.proxies.low_rank import best_factors
from sd_memguard.training.build import make_accelerator
from sd_memguard.training.plan import make_plan
from sd_memguard.training.trainer import Trainer, train

LORA = {"proxy": "lora", "rank": 2, "learning_rate": 1e-2, "report_to": "tensorboard"}
UNET = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture(params=["no", "bf16"])
def trainer(configure, request):
    """Return a run, on a base of either precision, with three adapters pushed apart by hand, before any averaging."""
    AcceleratorState._reset_state(reset_partial_state=True)  # it remembers the precision of the first run
    plan = make_plan(configure(**LORA, mixed_precision=request.param))
    trainer = Trainer(plan, make_accelerator(plan.config))
    for shard_index in range(3):
        trainer.proxies.activate(shard_index)
        generator = torch.Generator().manual_seed(shard_index)
        for parameter in trainer.parameters:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    expected = {"no": torch.float32, "bf16": torch.bfloat16}[request.param]
    assert {base_weight(trainer, layer).dtype for layer in trainer.proxies.layers} == {expected}
    yield trainer
    AcceleratorState._reset_state(reset_partial_state=True)


def product(proxies, shard_index, layer):
    """Return B A of one proxy in float64."""
    state = proxies._state(shard_index, WEIGHTS)
    up, down = (state[f"{layer}.lora_{factor}.default.weight"].double() for factor in "BA")
    return up @ down


def base_weight(trainer, layer):
    return trainer.unet.get_submodule(layer).base_layer.weight.detach()


def rounding(base, change):
    """Return the tolerance of two outputs in the base's precision, and of sums in float32."""
    return {"rtol": 0, "atol": max(1e-6, 2 * torch.finfo(base.dtype).eps * float(change.abs().max()))}


def active_change(trainer, layer):
    """Return what the two adapters make of a layer of the active model, by its outputs for unit vectors."""
    module = trainer.unet.get_submodule(layer)
    own = [(parameter, parameter.data) for parameter in module.base_layer.parameters()]
    units = torch.eye(module.base_layer.in_features).to(base_weight(trainer, layer))
    try:
        for parameter, data in own:
            parameter.data = torch.zeros_like(data)
        return module(units).detach().T.double()
    finally:
        for parameter, data in own:
            parameter.data = data


def test_the_aggregate_is_the_mean_of_the_merged_proxies(trainer):
    proxies, weights = trainer.proxies, [1.0, 2.0, 5.0]
    bases = {layer: base_weight(trainer, layer).clone() for layer in proxies.layers}
    total = {layer: torch.zeros(*base.shape, dtype=torch.float64) for layer, base in bases.items()}
    for _ in range(3):
        expected = {
            layer: change + sum(w * product(proxies, k, layer) for k, w in enumerate(weights)) / sum(weights)
            for layer, change in total.items()
        }
        factors = {layer: product(proxies, 0, layer) for layer in expected}
        distances = proxies.distances(weights)
        for k in range(3):
            square = sum(
                (product(proxies, k, layer) + total[layer] - mean).square().sum() for layer, mean in expected.items()
            )
            assert distances[k] == pytest.approx(float(square.sqrt()), rel=1e-9)
        assert proxies.average(weights) == distances
        for layer, change in expected.items():
            found = proxies.changes(weights)[layer]
            torch.testing.assert_close(found.up @ found.down, change, atol=1e-6, rtol=0)
            torch.testing.assert_close(active_change(trainer, layer), change, **rounding(bases[layer], change))
            assert not torch.allclose(product(proxies, 0, layer), factors[layer])
            assert torch.equal(base_weight(trainer, layer), bases[layer])
            total[layer] = change - product(proxies, 0, layer)
        for shard_index in range(3):  # apart again, for the next averaging
            proxies.activate(shard_index)
            for parameter in trainer.parameters:
                parameter.data = parameter.data + 0.05 * (shard_index + 1) * torch.randn(parameter.shape)


def test_looking_at_the_aggregate_changes_nothing(trainer):
    proxies, weights = trainer.proxies, [1.0, 1.0, 1.0]
    before = {layer: active_change(trainer, layer) for layer in proxies.layers}
    changes = proxies.changes(weights)
    with proxies.averaged(weights):
        for layer, change in changes.items():
            matrix = change.up @ change.down
            tolerance = rounding(base_weight(trainer, layer), matrix)
            torch.testing.assert_close(active_change(trainer, layer), matrix, **tolerance)
    for layer, change in before.items():
        assert torch.equal(active_change(trainer, layer), change)


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


def test_the_generated_of_validation_prompt_are_made(run, monkeypatch):
    drawn = []
    monkeypatch.setattr("sd_memguard.training.validation.generate_prompts", lambda *args: drawn.append(args[3]) or [])
    monkeypatch.setattr("sd_memguard.training.progress_log.RunLog.generated", lambda *args: None)
    run(**LORA, validation_prompt="a private thing", num_validation_images=2)
    assert drawn
    assert all(prompts == ["a private thing"] * 2 for prompts in drawn)


# The factors of a LoRA file.


def two_unets(unexplained=0.3):
    """Return weights before and after a change of rank 3 with something on top: a linear, a convolution, a bias."""
    generator = torch.Generator().manual_seed(0)
    before = {
        "a.weight": torch.randn(12, 7, generator=generator),
        "b.weight": torch.randn(6, 5, 3, 3, generator=generator),
    }
    before |= {"b.bias": torch.zeros(6), "same.weight": torch.ones(4, 4)}
    after = dict(before)
    for name in ("a.weight", "b.weight"):
        rows, columns = before[name].flatten(1).shape
        change = torch.randn(rows, 3, generator=generator) @ torch.randn(3, columns, generator=generator)
        change += unexplained * torch.randn(rows, columns, generator=generator)
        after[name] = before[name] + change.reshape(before[name].shape)
    after["b.bias"] = torch.full((6,), 0.1)
    return before, after


@pytest.mark.parametrize("shape", [(9, 4), (4, 9), (5, 5)])
@pytest.mark.parametrize("rank", [1, 3, 8])
def test_factors_are_those_of_the_svd(shape, rank):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(rank)).double()
    down, up = best_factors(matrix, rank)
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    best = left[:, :rank] * values[:rank] @ right[:rank]
    assert (down.shape, up.shape) == ((rank, shape[1]), (shape[0], rank))
    torch.testing.assert_close(up @ down, best, atol=1e-9, rtol=0)
    torch.testing.assert_close(down.norm(dim=1), up.norm(dim=0), atol=1e-9, rtol=0)


@pytest.mark.parametrize("error", [0.5, 0.2, 0.1])
def test_the_smallest_rank_that_keeps_the_error(error):
    before, after = two_unets()
    found = low_rank(before, after, error=error)
    assert found.relative_error <= error
    assert low_rank(before, after, rank=found.rank - 1).relative_error > error
    assert set(found.factors) == {f"{layer}.lora_{factor}.weight" for layer in "ab" for factor in "AB"}


def test_errors_that_no_rank_keeps_and_changes_that_are_none():
    before, after = two_unets()
    least = low_rank(before, after, rank=7)
    assert least.relative_error == pytest.approx(least.inexpressible, rel=1e-4)
    assert least.inexpressible > 0
    with pytest.raises(LoraError, match="cannot be kept by any rank: biases and norms"):
        low_rank(before, after, error=0.9 * least.inexpressible)
    with pytest.raises(LoraError, match="cannot be kept"):  # less than bfloat16's own rounding
        smallest_rank([torch.ones(3)], 0.0, error=0.005, rounding=torch.finfo(torch.bfloat16).eps)
    with pytest.raises(LoraError, match="has changed no layer"):
        low_rank(before, {**before, "b.bias": after["b.bias"]}, rank=2)


def test_kohya_names_are_those_of_diffusers_converter():
    adapter = low_rank(*two_unets(), rank=2)
    theirs = convert_state_dict_to_kohya(diffusers_names(adapter))
    ours = kohya_names(adapter)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name].to(ours[name].dtype)) for name in ours)


def test_peft_loads_the_factors(run, pipeline):
    result = run(**LORA)
    file = load_file(result.output_dir / "pytorch_lora_weights.safetensors")
    factors = {name.removeprefix("unet."): tensor for name, tensor in file.items()}
    unet = UNet2DConditionModel.from_pretrained(pipeline, subfolder="unet")
    targets = sorted({name.split(".lora_")[0] for name in factors})
    before = {layer: unet.get_submodule(layer).weight.detach().clone() for layer in targets}
    inject_adapter_in_model(LoraConfig(r=6, lora_alpha=6, target_modules=targets), unet)
    assert not set_peft_model_state_dict(unet, factors).unexpected_keys
    merged = load_file(result.output_dir / UNET)
    change = missed = 0.0
    for layer in targets:
        loaded = before[layer] + unet.get_submodule(layer).get_delta_weight("default").detach()
        missed += float((loaded - merged[f"{layer}.weight"]).square().sum())
        change += float((before[layer] - merged[f"{layer}.weight"]).square().sum())
    assert (missed / change) ** 0.5 == pytest.approx(result.summary["lora_relative_error"], abs=1e-4)
