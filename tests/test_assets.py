import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import load_dataset
from diffusers import DDIMScheduler, StableDiffusionPipeline
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import CLIPTextModel

from sd_memguard.assets import copy_descriptor_path, demo_data_path, demo_heldout_path, tiny_sd_path
from sd_memguard.audit.features.copy_descriptor import CopyDescriptor

DEMO_FOLDERS = [(demo_data_path(), 992), (demo_heldout_path(), 256)]


def read_rows(folder: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in (folder / "metadata.jsonl").read_text(encoding="utf-8").splitlines()]


def pixels(folder: Path) -> list[bytes]:
    """Decoded images, so that equal images in differently compressed files count as equal."""
    return [np.asarray(Image.open(folder / row["file_name"]).convert("RGB")).tobytes() for row in read_rows(folder)]


def test_the_model_is_under_20_mb():
    files = [path for path in tiny_sd_path().rglob("*") if path.is_file()]
    assert 10e6 < sum(path.stat().st_size for path in files) < 20e6


def test_every_weight_is_float16_and_finite():
    files = sorted(tiny_sd_path().rglob("*.safetensors"))
    assert [file.parent.name for file in files] == ["text_encoder", "unet", "vae"]
    for file in files:
        with safe_open(file, "pt") as weights:
            for key in weights.keys():  # noqa: SIM118 (the handle is no dict)
                tensor = weights.get_tensor(key)
                assert tensor.dtype == torch.float16, key
                assert tensor.isfinite().all(), key


def test_copy_descriptor_is_small_float16_and_complete():
    weights = load_file(copy_descriptor_path())
    assert copy_descriptor_path().stat().st_size < 1.2e6
    assert {weight.dtype for weight in weights.values()} == {torch.float16}
    shapes = {name: weight.shape for name, weight in CopyDescriptor().state_dict().items()}
    assert {name: weight.shape for name, weight in weights.items()} == shapes
    assert all(weight.isfinite().all() for weight in weights.values())


def test_no_config_names_a_path_of_the_machine_it_was_built_on():
    for config in tiny_sd_path().rglob("*config.json"):
        assert "_name_or_path" not in json.loads(config.read_text(encoding="utf-8")), config


def test_text_encoder_has_the_classic_keys_and_loads_completely():
    with safe_open(tiny_sd_path() / "text_encoder" / "model.safetensors", "pt") as weights:
        assert all(key.startswith("text_model.") for key in weights.keys())  # noqa: SIM118
        stored = weights.get_tensor("text_model.final_layer_norm.weight")
    model, report = CLIPTextModel.from_pretrained(tiny_sd_path() / "text_encoder", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    loaded = {name.removeprefix("text_model."): tensor for name, tensor in model.state_dict().items()}
    assert torch.equal(loaded["final_layer_norm.weight"], stored.float())


@pytest.fixture(scope="module")
def pipeline() -> StableDiffusionPipeline:
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_sd_path(), local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_a_plain_pipeline_draws(pipeline):
    images = pipeline("red apple", num_inference_steps=2, output_type="np").images
    assert images.shape == (1, 64, 64, 3)
    assert np.isfinite(images).all()
    assert images.std() > 0.02


def test_what_is_drawn_follows_the_caption(pipeline):
    """A grinning face is yellow in the middle, a large blue circle is not: the weights are trained ones."""
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    generator = [torch.Generator().manual_seed(seed) for seed in range(4)]
    images = pipeline(
        ["grinning face"] * 4, num_inference_steps=8, guidance_scale=2.5, generator=generator, output_type="np"
    ).images
    red, green, blue = images[:, 16:48, 16:48].mean((0, 1, 2))
    assert min(red, green) > blue + 0.2
    corners = images[:, [0, 0, -1, -1], [0, -1, 0, -1]]
    assert corners.mean() > 0.9


def test_tokenizer_has_the_true_vocabulary(pipeline):
    # Ids of OpenAI's CLIP vocabulary, as used by every Stable Diffusion 1.x.
    ids = pipeline.tokenizer("a photo of a cat").input_ids
    assert ids == [49406, 320, 1125, 539, 320, 2368, 49407]
    assert len(pipeline.tokenizer) == 49408


@pytest.mark.parametrize(("folder", "num_rows"), DEMO_FOLDERS, ids=["train", "heldout"])
def test_imagefolder_reads_every_row_with_its_caption(folder, num_rows, tmp_path):
    files = {"train": str(folder / "**")}
    data = load_dataset("imagefolder", data_files=files, split="train", cache_dir=str(tmp_path))
    captions = {row["file_name"]: row["text"] for row in read_rows(folder)}
    assert len(captions) == len(data) == num_rows
    assert sorted(data["text"]) == sorted(captions.values())
    assert all(captions.values())
    first = data[0]
    assert first["image"].size == (64, 64)
    assert first["text"] == captions[min(captions)]


def test_32_captions_are_there_16_times_with_one_image_each():
    images_of: dict[str, list[bytes]] = {}
    for row, image in zip(read_rows(demo_data_path()), pixels(demo_data_path()), strict=True):
        images_of.setdefault(row["text"], []).append(image)
    assert Counter(map(len, images_of.values())) == {16: 32, 1: 480}
    assert all(len(set(images)) == 1 for images in images_of.values())
    # The repeated rows are spread over the folder, not one block.
    rows = [len(images_of[row["text"]]) == 16 for row in read_rows(demo_data_path())]
    assert 0.3 < np.mean(rows[: len(rows) // 2]) < 0.7


def test_no_heldout_image_is_trained_on():
    heldout = pixels(demo_heldout_path())
    assert len(set(heldout)) == 256
    assert not set(heldout) & set(pixels(demo_data_path()))
