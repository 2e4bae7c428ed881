"""Adapters of other kinds than LoRA: merged as their formulas say, resumed, exported, refused where they must be."""

import shutil
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file

from sd_memguard.config import ConfigError
from sd_memguard.errors import UserError
from sd_memguard.export.exporter import Exporter
from sd_memguard.flags import parse_train_args
from sd_memguard.models.lora import (
    adapter_size,
    add_adapter,
    kohya_names,
    lycoris_weight,
    merge_adapter,
    whole_adapter,
)
from sd_memguard.runs.trained_run import read_trained_run
from sd_memguard.training.plan import make_plan
from sd_memguard.training.trainer import Trainer, train

UNET = "unet/diffusion_pytorch_model.safetensors"
KINDS = ("dora", "loha", "lokr")
SETTINGS = {"proxy": "lora", "rank": 2, "learning_rate": 1e-2, "num_shards": 1}


def moved(unet, kind, rank=3):
    """Add an adapter and move all of its parameters by hand; return them in float64 by layer."""
    layers = add_adapter(unet, rank, 1, torch.float32, kind)
    generator = torch.Generator().manual_seed(0)
    parameters = {name: parameter for name, parameter in unet.named_parameters() if parameter.requires_grad}
    for parameter in parameters.values():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    found = {layer: {} for layer in layers}
    for name, parameter in parameters.items():
        layer = next(layer for layer in layers if name.startswith(f"{layer}."))
        found[layer][name.removeprefix(f"{layer}.")] = parameter.detach().double()
    return parameters, found


def formula(kind, weight, own, scale=1.0):
    """Return the weight of a layer under an adapter by the definitions of the papers."""
    if kind == "dora":  # arXiv 2402.09353, equation 5
        whole = weight + scale * own["lora_B.default.weight"] @ own["lora_A.default.weight"]
        return own["lora_magnitude_vector.default.weight"][:, None] * whole / whole.norm(dim=1, keepdim=True)
    if kind == "loha":  # arXiv 2108.06098
        first = own["hada_w1_a.default"] @ own["hada_w1_b.default"]
        return weight + scale * first * (own["hada_w2_a.default"] @ own["hada_w2_b.default"])
    second = own.get("lokr_w2.default")  # arXiv 2212.10650
    if second is None:
        second = own["lokr_w2_a.default"] @ own["lokr_w2_b.default"]
    return weight + scale * torch.kron(own["lokr_w1.default"], second)


@pytest.fixture
def load(pipeline):
    return lambda: UNet2DConditionModel.from_pretrained(pipeline, subfolder="unet")


@pytest.mark.parametrize("kind", KINDS)
def test_the_merged_unet_is_what_the_formula_says_and_what_was_trained(load, kind):
    adapted, before = load(), load().state_dict()
    parameters, own = moved(adapted, kind)
    merged = merge_adapter(load(), parameters, 3, kind)
    assert merged.state_dict().keys() == before.keys()
    for layer, parts in own.items():
        expected = formula(kind, before[f"{layer}.weight"].double(), parts)
        found = merged.get_parameter(f"{layer}.weight").double()
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
        assert (found - before[f"{layer}.weight"]).norm() > 1e-3
    changed = {name for name, tensor in merged.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {f"{layer}.weight" for layer in own}
    noise, text = torch.randn(2, 4, 8, 8), torch.randn(2, 16, 32)
    with torch.no_grad():
        ours, trained = (unet(noise, 20, text).sample for unet in (merged, adapted))
    torch.testing.assert_close(ours, trained, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["lora", *KINDS])
def test_a_new_adapter_changes_nothing(load, kind, dtype):
    """Also DoRA's, whose magnitudes are norms of weights before these were rounded."""
    unet, before = load(), load().state_dict()
    add_adapter(unet, 2, 1, dtype, kind)
    parameters = {name: parameter for name, parameter in unet.named_parameters() if parameter.requires_grad}
    assert {parameter.dtype for parameter in parameters.values()} == {torch.float32}
    assert {p.dtype for p in unet.parameters() if not p.requires_grad} == {dtype}
    merged = merge_adapter(load(), parameters, 2, kind).state_dict()
    torch.testing.assert_close(merged, before, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("rank", [1, 2, 5, 40])
@pytest.mark.parametrize("kind", ["lora", *KINDS])
def test_the_size_is_known_before_the_adapter_is_there(load, kind, rank):
    unet = load()
    shapes = [module.base_layer.weight.shape for module in add_adapter(unet, rank, 1, torch.float32, kind).values()]
    trained = sum(parameter.numel() for parameter in unet.parameters() if parameter.requires_grad)
    assert sum(adapter_size(kind, rank, shape) for shape in shapes) == trained


def stopped_at(monkeypatch, step):
    take = Trainer.step

    def stop(self, *args):
        if self.progress.global_step == step:
            raise KeyboardInterrupt
        return take(self, *args)

    monkeypatch.setattr(Trainer, "step", stop)


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_is_resumed_to_the_byte_and_exported(run, configure, pipeline, monkeypatch, kind, tmp_path):
    whole = run("whole", **SETTINGS, adapter=kind, max_train_steps=8)
    with monkeypatch.context() as patch:
        stopped_at(patch, 6)
        with pytest.raises(KeyboardInterrupt):
            run("parts", **SETTINGS, adapter=kind, max_train_steps=8, checkpointing_steps=5)
    checkpoint = tmp_path / "parts/checkpoint-5"
    parts = train(configure("parts", **SETTINGS, adapter=kind, max_train_steps=8, resume_from_checkpoint="latest"))
    for file in (UNET, "memguard/rounds.jsonl", "memguard/adapter.safetensors"):
        assert (parts.output_dir / file).read_bytes() == (whole.output_dir / file).read_bytes()
    before, after = load_file(pipeline / UNET), load_file(whole.output_dir / UNET)
    assert after.keys() == before.keys()
    assert any(not torch.equal(after[name], before[name]) for name in before if "to_q" in name)
    StableDiffusionPipeline.from_pretrained(whole.output_dir, local_files_only=True)
    for folder in (whole.output_dir, checkpoint):
        exporter = Exporter(read_trained_run(folder))
        assert exporter.export("merged", tmp_path / "exports" / folder.name).difference < 1e-3
        if kind == "dora":
            export = exporter.export("lora-diffusers", tmp_path / "loras" / folder.name)
            assert export.difference < 1e-3 * export.base_difference + 1e-4
        else:
            with pytest.raises(ConfigError, match=f"`lora-diffusers` has no place for .* `--adapter {kind}`"):
                exporter.export("lora-diffusers", tmp_path / "loras" / folder.name)
        export = exporter.export("lora-kohya", tmp_path / "kohya" / folder.name)
        assert export.difference < 1e-3 * export.base_difference + 1e-4
        assert exporter.export("lora-kohya", tmp_path / "half" / folder.name, dtype="fp16").difference < 0.05
        with pytest.raises(UserError, match="omit `--lora_rank`"):
            exporter.export("lora-kohya", tmp_path / "other", lora_rank=3)
    assert (whole.output_dir / "pytorch_lora_weights.safetensors").exists() == (kind == "dora")
    assert (whole.output_dir / "whole-lora-kohya.safetensors").exists() == (kind != "dora")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rank", [2, 8])  # of LoKr's second factor, in two parts or whole
def test_a_file_in_lycoris_form_has_the_names_and_the_change_of_its_papers(load, kind, rank):
    unet = load()
    parameters, own = moved(unet, kind, rank)
    weights = kohya_names(whole_adapter(parameters, rank, torch.float32))
    before = load().state_dict()
    for layer, parts in own.items():
        prefix = "lora_unet_" + layer.replace(".", "_") + "."
        found = {name.removeprefix(prefix): weights.pop(name) for name in list(weights) if name.startswith(prefix)}
        expected = {"dora": {"lora_up.weight", "lora_down.weight", "dora_scale"}}
        expected["loha"] = {"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"}
        expected["lokr"] = (
            {"lokr_w1", "lokr_w2"} if "lokr_w2.default" in parts else {"lokr_w1", "lokr_w2_a", "lokr_w2_b"}
        )
        assert found.keys() == expected[kind] | {"alpha"}
        assert found["alpha"] == rank
        weight = before[f"{layer}.weight"].double()
        changed = lycoris_weight(weight, {name: tensor.double() for name, tensor in found.items()})
        torch.testing.assert_close(changed, formula(kind, weight, parts), rtol=0, atol=1e-6)
        if kind == "dora":
            assert found["dora_scale"].shape == (len(weight), 1)  # a row of the weight each: on the output
    assert not weights


def test_a_dora_file_of_a_run_loads_as_it_was_trained(run, pipeline):
    result = run(**SETTINGS, adapter="dora", max_train_steps=8)
    adapted = StableDiffusionPipeline.from_pretrained(pipeline, local_files_only=True)
    adapted.load_lora_weights(result.output_dir)
    merged = UNet2DConditionModel.from_pretrained(result.output_dir, subfolder="unet")
    noise, text = torch.randn(2, 4, 8, 8), torch.randn(2, 16, 32)
    with torch.no_grad():
        ours, theirs = (unet(noise, 20, text).sample for unet in (merged, adapted.unet))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_several_shards_are_refused_and_auto_is_one(configure, kind):
    with pytest.raises(ConfigError, match=f"`--adapter {kind}` needs `--num_shards 1`, got 3: .*add `--num_shards 1`"):
        configure(**{**SETTINGS, "num_shards": 3}, adapter=kind)
    plan = make_plan(configure(**{**SETTINGS, "num_shards": "auto"}, adapter=kind))
    assert plan.schedule.num_shards == 1
    assert configure(**{**SETTINGS, "num_shards": 1}, adapter=kind, memguard="off").adapter == kind


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"adapter": "dora", "proxy": "full"}, "`--adapter` belongs to `--proxy lora`, got `--proxy full`"),
        ({"adapter": "lora", "proxy": "full"}, "`--adapter` belongs to `--proxy lora`, got `--proxy full`"),
        ({"adapter": "lycoris"}, "`--adapter` must be one of lora, dora, loha, lokr, got 'lycoris'"),
        ({"adapter": "loha", "export_formats": ["lora-diffusers"]}, "`lora-diffusers` has no place for"),
        ({"adapter": "lokr", "export_formats": ["merged", "lora-diffusers"]}, "`single-file`, `lora-kohya` instead"),
        ({"adapter": "dora", "preset": "paper", "num_shards": 4}, "`--adapter dora` needs `--num_shards 1`, got 4"),
    ],
)
def test_what_a_kind_does_not_have_is_refused_before_training(configure, settings, message):
    with pytest.raises(ConfigError) as caught:
        configure(**{"proxy": "lora", "num_shards": 1, **settings})
    assert message in str(caught.value)


def test_diffusers_own_flag_is_told_by_its_name_here(capsys, tmp_path):
    for argv in (["--use_dora"], ["--config", str(tmp_path / "run.yaml")]):
        Path(tmp_path / "run.yaml").write_text("use_dora: true\n")
        with pytest.raises(SystemExit):
            parse_train_args(["--pretrained", "model", "--train_data_dir", "data", *argv])
        assert "`--adapter dora`" in capsys.readouterr().err
    shutil.rmtree(tmp_path)


def test_the_adapter_beside_the_best_model_is_that_of_its_round(run, images, pipeline, monkeypatch):
    """Its file is checked against the merged model when it is written, and once more here."""
    monkeypatch.setattr("sd_memguard.training.trainer.best_round", lambda rounds, gap: rounds[0] if rounds else None)
    settings = {**SETTINGS, "adapter": "dora", "max_train_steps": 6, "steps_per_round": 2}
    result = run(**settings, validation_data_dir=str(images), load_best_model_at_end=True)
    assert result.summary["kept_step"] < result.summary["global_step"]
    adapter = load_file(result.output_dir / "memguard/adapter.safetensors")
    base = UNet2DConditionModel.from_pretrained(pipeline, subfolder="unet")
    merged = merge_adapter(base, adapter, SETTINGS["rank"], "dora").state_dict()
    torch.testing.assert_close(merged, load_file(result.output_dir / UNET), rtol=0, atol=1e-6)


def test_a_file_for_sdxl_has_the_original_names_of_layers(run, sdxl_pipeline):
    """It is checked as it is written: its weights must be the trained ones."""
    result = run(pretrained_model_name_or_path=str(sdxl_pipeline), **SETTINGS, adapter="loha", max_train_steps=2)
    names = load_file(result.output_dir / "run-lora-kohya.safetensors").keys()
    assert all(
        name.startswith(("lora_unet_input_blocks_", "lora_unet_output_blocks_", "lora_unet_middle_")) for name in names
    )
    assert any(name.endswith("attn2_to_out_0.hada_w2_b") for name in names)
