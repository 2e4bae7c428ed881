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


def test_the_model_is_under_25_mb():
    files = [path for path in tiny_sd_path().rglob("*") if path.is_file()]
    assert 10e6 < sum(path.stat().st_size for path in files) < 25e6


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


def test_a_plain_pipeline_generates(pipeline):
    images = pipeline("dylan light face", num_inference_steps=2, output_type="np").images
    assert images.shape == (1, 64, 64, 3)
    assert np.isfinite(images).all()
    assert images.std() > 0.02


def test_what_is_generated_follows_the_prompt(pipeline):
    """Red hair is redder than green hair, on a white page: the weights are trained ones."""
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    means = []
    for color in ("red", "green"):
        generator = [torch.Generator().manual_seed(seed) for seed in range(4)]
        prompt = f"dylan light face, {color} long curls hair"
        images = pipeline(
            [prompt] * 4, num_inference_steps=8, guidance_scale=2.5, generator=generator, output_type="np"
        ).images
        means.append(images[..., 0].mean() - images[..., 1].mean())
        assert images[:, [0, 0], [0, -1]].mean() > 0.9
    assert means[0] > means[1] + 0.05


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


def test_32_images_are_there_16_times_under_one_caption():
    rows, images = read_rows(demo_data_path()), pixels(demo_data_path())
    times = Counter(images)
    assert Counter(times.values()) == {16: 32, 1: 480}
    captions = {(image, row["text"]) for row, image in zip(rows, images, strict=True)}
    assert len(captions) == len(times)
    # The duplicated rows are spread over the folder, not one block.
    duplicated = [times[image] == 16 for image in images]
    assert 0.3 < np.mean(duplicated[: len(rows) // 2]) < 0.7


@pytest.mark.parametrize("folder", [demo_data_path(), demo_heldout_path()], ids=["train", "heldout"])
def test_captions_say_what_is_named_and_nothing_that_is_open(folder):
    lines = (folder / "attributes.jsonl").read_text(encoding="utf-8").splitlines()
    attributes = [json.loads(line) for line in lines]
    assert [row["file_name"] for row in attributes] == [row["file_name"] for row in read_rows(folder)]
    for row, known in zip(read_rows(folder), attributes, strict=True):
        assert not set(known["named"]) & set(known["open"])
        assert {"mouth", "body"} <= set(known["open"])
        assert all(value in row["text"] for value in known["named"].values()), row
        assert ("shirt" in known["named"]) == ("shirt" in row["text"]), row


def test_no_heldout_image_is_trained_on():
    heldout = pixels(demo_heldout_path())
    assert len(set(heldout)) == 256
    assert not set(heldout) & set(pixels(demo_data_path()))
