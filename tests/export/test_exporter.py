"""Exports: every format written, loaded again by diffusers, and generated image as the trained model does."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import diffusers
import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from sd_memguard import assets, cli
from sd_memguard.config import make_train_config
from sd_memguard.errors import UserError
from sd_memguard.export import exporter as exporter_module
from sd_memguard.export.exporter import Exporter, lora_tolerance
from sd_memguard.export.pipeline_folder import write_pipeline
from sd_memguard.export.target import ExportError
from sd_memguard.export.verify import difference
from sd_memguard.models.lora import LoraError
from sd_memguard.runs.folder import RunFolderError
from sd_memguard.runs.trained_run import read_trained_run

FIXTURES = Path(__file__).parents[1] / "fixtures"
CONFIGS = json.loads((FIXTURES / "stable_diffusion_configs.json").read_text(encoding="utf-8"))
NARROW_UNET = {
    "sd15": {"attention_head_dim": 4, "cross_attention_dim": 24},
    "sd21": {"attention_head_dim": [1, 2, 4, 4], "cross_attention_dim": 32},
}
NARROW_TEXT = {"intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
UNET = "unet/diffusion_pytorch_model.safetensors"


def narrow_pipeline(version: str, folder: Path) -> Path:
    """Write a pipeline with the blocks, heads and activations of a version of Stable Diffusion, but few channels."""
    torch.manual_seed(0)
    config = CONFIGS[version]
    narrow = {"block_out_channels": [8, 16, 16, 16], "norm_num_groups": 8}
    unet = config["unet"] | narrow | NARROW_UNET[version] | {"sample_size": 8}
    size = NARROW_UNET[version]["cross_attention_dim"]
    text = config["text_encoder"] | NARROW_TEXT | {"hidden_size": size, "eos_token_id": 49407}
    StableDiffusionPipeline(
        unet=UNet2DConditionModel(**unet),
        vae=diffusers.AutoencoderKL(**(config["vae"] | narrow | {"sample_size": 64})),
        text_encoder=CLIPTextModel(CLIPTextConfig(**text)),
        tokenizer=CLIPTokenizer.from_pretrained(assets.tiny_sd_path() / "tokenizer"),
        scheduler=diffusers.PNDMScheduler(**{k: v for k, v in config["scheduler"].items() if k != "clip_sample"}),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
    return folder


def finish_run(pipeline: Path, folder: Path, num_shards: int = 2, **settings) -> Path:
    """Write a run folder as training would, with every weight changed: layers by little more than rank 2."""
    unet = UNet2DConditionModel.from_pretrained(pipeline, subfolder="unet", torch_dtype=torch.float32)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in unet.parameters():
            shape = parameter.flatten(1).shape if parameter.ndim > 1 else (len(parameter), 1)
            down, up = torch.randn(2, shape[1], generator=generator), torch.randn(shape[0], 2, generator=generator)
            scale = 0.1 * parameter.std().nan_to_num(0.01) / 2**0.5 if parameter.ndim > 1 else 0.002
            change = up @ down + 0.2 * torch.randn(shape, generator=generator)
            parameter += scale * change.reshape(parameter.shape)
    write_pipeline(pipeline, unet, folder)
    config = make_train_config(
        pretrained_model_name_or_path=str(pipeline),
        train_data_dir="data",
        resolution=64,
        num_shards=num_shards,
        **settings,
    )
    (folder / "memguard").mkdir()
    (folder / "memguard" / "config.json").write_text(json.dumps(config.to_dict()))
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Return a run of each pipeline, with an exporter that keeps what it has drawn."""
    folder = tmp_path_factory.mktemp("runs")
    pipelines = {"bundled": assets.tiny_sd_path()}
    pipelines |= {version: narrow_pipeline(version, folder / f"base-{version}") for version in NARROW_UNET}
    made = {name: finish_run(pipeline, folder / name) for name, pipeline in pipelines.items()}
    return {
        name: SimpleNamespace(folder=run, base=pipelines[name], exporter=Exporter(read_trained_run(run)))
        for name, run in made.items()
    }


@pytest.fixture
def tiny(pipeline, tmp_path):
    """Return a run of the smallest pipeline, for tests that look at one thing."""
    return finish_run(pipeline, tmp_path / "tiny")


def predict(unet: UNet2DConditionModel) -> torch.Tensor:
    """Return what a UNet makes of fixed noise and text."""
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(2))
    text = torch.randn(2, 7, unet.config.cross_attention_dim, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        return unet(noise, 300, text).sample


def latents(pipeline: StableDiffusionPipeline) -> torch.Tensor:
    """Return what a pipeline makes of a prompt, by its own scheduler."""
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(4)
    return pipeline("a cat", num_inference_steps=2, output_type="latent", generator=generator).images


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    """Let every call to the hub fail."""

    def refuse(*args, **kwargs):
        raise AssertionError("asked the hub")

    monkeypatch.setattr("socket.getaddrinfo", refuse)


@pytest.mark.parametrize(("name", "dtype"), [("bundled", "fp16"), ("sd15", None), ("sd21", None)])
def test_single_file(runs, tmp_path, name, dtype):
    run = runs[name]
    export = run.exporter.export("single-file", tmp_path / "one.safetensors", dtype=dtype)
    loaded = StableDiffusionPipeline.from_single_file(
        str(export.path), config=str(run.folder), local_files_only=True, safety_checker=None
    ).to(torch.float32)
    trained = StableDiffusionPipeline.from_pretrained(run.folder, local_files_only=True).to(torch.float32)
    tolerance = 1e-5 if dtype is None else 0.05
    assert difference(latents(loaded), latents(trained)) <= tolerance
    assert export.difference <= tolerance
    with safe_open(export.path, framework="pt") as file:
        kinds = {file.get_tensor(key).dtype for key in file.keys()}  # noqa: SIM118 (no mapping)
        metadata = file.metadata()
        assert ("cond_stage_model.model.ln_final.bias" in file.keys()) == (name == "sd21")  # noqa: SIM118
    assert kinds == {torch.float16} if dtype else torch.float32 in kinds
    assert metadata["modelspec.prediction_type"] == ("v" if name == "sd21" else "epsilon")
    assert metadata["modelspec.architecture"] == f"stable-diffusion-{'v2-768-v' if name == 'sd21' else 'v1'}"


@pytest.mark.parametrize(("name", "dtype"), [("bundled", None), ("bundled", "fp32"), ("sd21", "bf16")])
def test_merged(runs, tmp_path, name, dtype):
    run = runs[name]
    export = run.exporter.export("merged", tmp_path / "merged", dtype=dtype)
    loaded = StableDiffusionPipeline.from_pretrained(export.path, local_files_only=True)
    trained = StableDiffusionPipeline.from_pretrained(run.folder, local_files_only=True)
    off = difference(latents(loaded.to(torch.float32)), latents(trained.to(torch.float32)))
    assert off == 0.0 if dtype != "bf16" else 0.0 < off < 0.3
    for part in ("vae/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors", UNET):
        written, source = export.path / part, (run.folder if part == UNET else run.base) / part
        if dtype is None:
            assert written.read_bytes() == source.read_bytes()
        else:
            expected = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
            assert {tensor.dtype for tensor in load_file(written).values()} == {expected}
    if dtype == "bf16":  # or transformers would load it by what the config says
        assert json.loads((export.path / "text_encoder" / "config.json").read_text())["dtype"] == "bfloat16"


@pytest.mark.parametrize(
    ("name", "format"), [("bundled", "lora-diffusers"), ("sd15", "lora-kohya"), ("sd21", "lora-diffusers")]
)
def test_lora_files(runs, tmp_path, name, format):
    run = runs[name]
    export = run.exporter.export(format, tmp_path / "lora.safetensors", lora_rank=4)
    base = StableDiffusionPipeline.from_pretrained(run.base, local_files_only=True).to(torch.float32)
    untrained = predict(base.unet)
    base.load_lora_weights(tmp_path, weight_name="lora.safetensors")
    adapted = predict(base.unet)
    trained = predict(UNet2DConditionModel.from_pretrained(run.folder, subfolder="unet"))
    missed = float((adapted - trained).norm() / (untrained - trained).norm())
    assert 0.0 < export.adapter.relative_error < 0.3
    assert missed <= 2 * export.adapter.relative_error
    assert 0.0 < export.difference <= lora_tolerance(export.adapter.relative_error) * export.base_difference + 1e-3


def test_the_stated_error_is_that_of_the_file(runs, tmp_path):
    run = runs["bundled"]
    export = run.exporter.export("lora-kohya", tmp_path, lora_error=0.25, dtype="fp16")
    assert export.path.name == "bundled-lora-kohya.safetensors"
    factors, before, after = load_file(export.path), load_file(run.base / UNET), load_file(run.folder / UNET)
    missed = total = 0.0
    for name, weight in after.items():
        change, layer = (
            weight.double() - before[name].double(),
            f"lora_unet_{name.removesuffix('.weight').replace('.', '_')}",
        )
        total += float(change.square().sum())
        if f"{layer}.lora_up.weight" in factors and name.endswith(".weight"):
            down, up = (factors[f"{layer}.lora_{side}.weight"].double().flatten(1) for side in ("down", "up"))
            assert factors[f"{layer}.alpha"] == len(down) == export.adapter.rank
            change = change.flatten(1) - up @ down
        missed += float(change.square().sum())
    assert export.adapter.relative_error == pytest.approx((missed / total) ** 0.5, rel=1e-6)
    assert export.adapter.relative_error <= 0.25
    lower = run.exporter.export("lora-kohya", tmp_path / "lower", lora_rank=export.adapter.rank - 1, dtype="fp16")
    assert lower.adapter.relative_error > 0.25
    with safe_open(export.path, framework="pt") as file:
        assert file.metadata()["ss_network_dim"] == str(export.adapter.rank)


def test_an_error_that_no_rank_keeps_is_refused_with_the_reason(runs, tmp_path):
    with pytest.raises(LoraError, match=r"`--lora_error` 0.001 cannot be kept by any rank: biases and norms.*%"):
        runs["bundled"].exporter.export("lora-kohya", tmp_path, lora_error=0.001)
    assert list(tmp_path.iterdir()) == []


def test_default_ranks(pipeline, tmp_path, monkeypatch):
    ranks = []
    monkeypatch.setattr(exporter_module, "low_rank", lambda *args, rank, **rest: ranks.append(rank) or 1 / 0)
    for settings in ({}, {"proxy": "lora", "rank": 3, "num_shards": 5}):
        run = finish_run(pipeline, tmp_path / str(len(ranks)), **settings)
        with pytest.raises(ZeroDivisionError):
            Exporter(read_trained_run(run)).export("lora-kohya", tmp_path / "out")
    assert ranks == [64, 15]


def test_a_checkpoint_is_exported_with_the_parts_of_the_base(tiny, pipeline, tmp_path):
    checkpoint = tiny / "checkpoint-9"
    shutil.copytree(tiny / "unet", checkpoint / "unet")
    weights = load_file(checkpoint / UNET)
    save_file({name: 2 * tensor for name, tensor in weights.items()}, checkpoint / UNET)
    size = (checkpoint / UNET).stat().st_size
    (checkpoint / "manifest.json").write_text(json.dumps({UNET: {"size": size, "blake2b": "0"}}))
    with pytest.raises(UserError, match="is damaged"):
        read_trained_run(checkpoint)
    (checkpoint / "manifest.json").write_text(json.dumps({"memguard/state.json": {"size": 1, "blake2b": "0"}}))
    export = Exporter(read_trained_run(checkpoint)).export("merged", tmp_path / "merged")
    assert torch.equal(load_file(export.path / UNET)["conv_in.bias"], 2 * weights["conv_in.bias"])
    text = "text_encoder/model.safetensors"
    assert (export.path / text).read_bytes() == (pipeline / text).read_bytes()
    assert read_trained_run(checkpoint).name == "tiny-checkpoint-9"


def test_a_file_that_is_not_what_was_meant_is_refused_and_removed(tiny, tmp_path, monkeypatch):
    honest = exporter_module.single_file_weights

    def swapped(*args):
        weights, version = honest(*args)
        names = [
            f"model.diffusion_model.middle_block.1.transformer_blocks.0.attn1.to_{letter}.weight" for letter in "qk"
        ]
        return weights | {names[0]: weights[names[1]], names[1]: weights[names[0]]}, version

    out = tmp_path / "out" / "one.safetensors"
    monkeypatch.setattr(exporter_module, "single_file_weights", swapped)
    with pytest.raises(ExportError, match=r"weights of unet \(1 in all\) are not those"):
        Exporter(read_trained_run(tiny)).export("single-file", out)
    assert list(out.parent.iterdir()) == []
    honest_names = exporter_module.kohya_names
    halved = lambda adapter, layers: {k: v / 2 if "alpha" in k else v for k, v in honest_names(adapter).items()}  # noqa: E731
    monkeypatch.setattr(exporter_module, "kohya_names", halved)
    with pytest.raises(ExportError, match="are not those"):
        Exporter(read_trained_run(tiny)).export("lora-kohya", out)
    assert list(out.parent.iterdir()) == []


@pytest.mark.parametrize("format", ["merged", "lora-diffusers"])
def test_a_generated_image_too_far_off_is_refused(tiny, tmp_path, monkeypatch, format):
    drawn = iter([torch.tensor([0.0, 1.0]), torch.tensor([0.5, 0.5]), torch.tensor([9.0, -9.0])])
    exporter = Exporter(read_trained_run(tiny))
    with monkeypatch.context() as patch:
        patch.setattr(exporter_module.check, "generate", lambda pipeline: next(drawn))
        exporter._generated_image, exporter._base_difference  # noqa: B018 (they are drawn here)
        with pytest.raises(ExportError, match=r"its generated image is .*% off the trained model's, and at most"):
            exporter.export(format, tmp_path / "out")
    assert not (tmp_path / "out").exists() or list((tmp_path / "out").iterdir()) == []


def test_what_exists_is_replaced_only_on_demand_and_never_if_it_is_more(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(Exporter, "_compare", lambda *args: 0.0)
    exporter, merged = Exporter(read_trained_run(tiny)), tmp_path / "merged"
    exporter.export("merged", merged)
    (merged / "note.txt").write_text("old")
    with pytest.raises(ExportError, match="exists; name another, or replace it by `--overwrite`"):
        exporter.export("merged", merged)
    exporter.export("merged", merged, overwrite=True)
    assert not (merged / "note.txt").exists()
    file = tmp_path / "one.safetensors"
    file.write_text("old")
    with pytest.raises(ExportError, match="exists"):
        exporter.export("single-file", file)
    exporter.export("single-file", file, overwrite=True)
    assert file.stat().st_size > 1000
    for folder in (tiny, tmp_path):
        with pytest.raises(ExportError, match="is no exported pipeline, or a run folder"):
            exporter.export("merged", folder, overwrite=True)
    with pytest.raises(ExportError, match="is a file, which `merged` is not"):
        exporter.export("merged", file, overwrite=True)
    (tmp_path / "folder.safetensors").mkdir()
    with pytest.raises(ExportError, match="is a folder, which `single-file` is not"):
        exporter.export("single-file", tmp_path / "folder.safetensors")
    with pytest.raises(ExportError, match="ending of a pickled file"):
        exporter.export("single-file", tmp_path / "model.ckpt")
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "folder.safetensors",
        "merged",
        "one.safetensors",
        "tiny",
    ]


def test_a_folder_that_is_no_run_is_refused(tiny, tmp_path):
    with pytest.raises(RunFolderError, match="is no run folder"):
        read_trained_run(tmp_path)
    (tiny / "model_index.json").unlink()
    with pytest.raises(RunFolderError, match="holds no finished model; finish the run"):
        read_trained_run(tiny)
    (tiny / "memguard" / "config.json").write_text('{"new_setting": 1}')
    (tiny / "model_index.json").write_text("{}")
    with pytest.raises(RunFolderError, match="cannot be read: unknown setting `new_setting`"):
        read_trained_run(tiny)


def test_the_command(tiny, pipeline, tmp_path, capsys):
    moved = tmp_path / "moved"
    shutil.copytree(pipeline, moved)
    record = tiny / "memguard" / "config.json"
    settings = json.loads(record.read_text())
    record.write_text(json.dumps({**settings, "pretrained_model_name_or_path": str(tmp_path / "gone")}))
    arguments = ["export", str(tiny), "--output", str(tmp_path / "out"), "--format"]
    cli.main([*arguments, "merged"])  # needs no base
    assert f'from_pretrained("{tmp_path / "out"}")' in capsys.readouterr().out
    with pytest.raises(SystemExit, match="2"):
        cli.main([*arguments[:-2], str(tmp_path / "lora"), "--format", "lora-kohya"])
    assert "gone' is no folder here and could not be had from the hub" in capsys.readouterr().err
    arguments[3] = str(tmp_path / "lora")
    cli.main([*arguments, "lora-kohya", "--pretrained", str(moved), "--lora_rank", "5", "--dtype", "bf16"])
    report = capsys.readouterr().out
    assert (tmp_path / "lora" / "tiny-lora-kohya.safetensors").is_file()
    assert ", bf16)\n  rank 5, misses " in report
    assert "% off that of the trained model (that of the model before training: " in report


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--format", "merged", "--lora_rank", "3"], "`--lora_rank` belongs to the formats lora-diffusers and"),
        (["--format", "lora-kohya", "--lora_rank", "0"], "must be a whole number from 1 on, got '0'"),
        (["--format", "lora-kohya", "--lora_error", "1.5"], "must be a number between 0 and 1, got '1.5'"),
        (["--format", "lora-kohya", "--lora_error", "x"], "must be a number between 0 and 1, got 'x'"),
        (["--format", "lora-kohya", "--lora_error", "0.1", "--lora_rank", "3"], "not allowed with argument"),
        (["--format", "ckpt"], "invalid choice: 'ckpt'"),
    ],
)
def test_wrong_flags_are_refused_before_anything_is_read(flags, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        cli.main(["export", "no-run", "--output", "out", *flags])
    assert message in capsys.readouterr().err


def test_a_run_ends_with_the_files_that_were_asked_for(run, caplog):
    caplog.set_level("INFO")
    settings = {"num_shards": 2, "max_train_steps": 8, "report_to": "tensorboard"}
    result = run("mine", **settings, export_formats=["merged", "lora-kohya", "single-file"])
    names = ("mine-lora-kohya.safetensors", "mine.safetensors")
    assert all((result.output_dir / name).is_file() for name in names)
    assert not list(result.output_dir.glob("writing-*"))
    for name in names:
        assert f"wrote {result.output_dir / name}" in caplog.text
    assert f"rank 64, misses {100 * result.summary['lora_relative_error']:.3g}%" in caplog.text


def test_an_export_that_fails_at_the_end_loses_nothing(run, tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO")
    monkeypatch.setattr(exporter_module, "single_file_weights", lambda *args: ({}, "v1"))
    with pytest.raises(ExportError, match="`single-file`: diffusers cannot load what was written"):
        run("mine", max_train_steps=8, report_to="tensorboard", export_formats=["single-file", "lora-kohya"])
    assert "the fine-tuned pipeline is in" in caplog.text
    assert (tmp_path / "mine" / "mine-lora-kohya.safetensors").is_file()
    assert not (tmp_path / "mine" / "mine.safetensors").exists()
    assert StableDiffusionPipeline.from_pretrained(tmp_path / "mine", local_files_only=True) is not None
