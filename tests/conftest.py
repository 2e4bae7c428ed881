"""What the tests of training share: a tiny pipeline built from configs, a folder of images, and runs with them."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

from sd_memguard.config import TrainConfig, make_train_config

if TYPE_CHECKING:
    from sd_memguard.training.trainer import TrainResult

# With the core's dependencies alone (torch, numpy, safetensors) the tests of core, proxies and plugin run.
if find_spec("diffusers") is None:
    collect_ignore_glob = [
        *("audit/*", "benchmarks/*", "check/*", "data/*", "demo/*", "export/*", "inference/*", "inspection/*"),
        *("launcher/*", "models/*", "runs/*", "training/*", "reference/*", "core/test_verification.py"),
        *("plugin/families.py", "plugin/test_augment.py", "plugin/test_gate_families.py", "plugin/test_lora_export.py"),
        *("plugin/test_prepare.py", "test_assets.py", "test_config.py", "test_docs.py", "test_examples.py"),
        *("test_flags.py", "test_host_memory.py", "test_platforms.py"),
    ]

RESOLUTION = 32
# Few timesteps, so that the memory bank has enough visits for decisions after a few steps.
SCHEDULE = {"num_train_timesteps": 50, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Networks this small are faster on one thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def pipeline(tmp_path_factory) -> Path:
    """Return a Stable Diffusion of 32 px and some ten thousand weights."""
    import diffusers
    from transformers import CLIPTextConfig, CLIPTextModel

    from tests.tiny_models import tiny_unet, tiny_vae, tokenizer

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("tiny") / "pipeline"
    unet = tiny_unet(cross_attention_dim=32, attention_head_dim=4)
    vae = tiny_vae()
    sizes = {"hidden_size": 32, "intermediate_size": 32, "projection_dim": 32, "num_hidden_layers": 1}
    text = CLIPTextConfig(**sizes, num_attention_heads=2, max_position_embeddings=16, eos_token_id=49407)
    diffusers.StableDiffusionPipeline(
        vae=vae,
        text_encoder=CLIPTextModel(text),
        tokenizer=tokenizer(),
        unet=unet,
        scheduler=diffusers.DDPMScheduler(**SCHEDULE, clip_sample=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def sdxl_pipeline(tmp_path_factory) -> Path:
    """Return an SDXL of 32 px and some ten thousand weights, with two text encoders of different widths."""
    import diffusers
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    from tests.tiny_models import tiny_unet, tiny_vae, tokenizer

    torch.manual_seed(1)
    folder = tmp_path_factory.mktemp("tiny-sdxl") / "pipeline"
    unet = tiny_unet(
        cross_attention_dim=16 + 24,
        attention_head_dim=(2, 4),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        transformer_layers_per_block=(1, 2),
        projection_class_embeddings_input_dim=6 * 8 + 20,
    )
    vae = tiny_vae()
    shared = {"intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "eos_token_id": 49407}
    shared["max_position_embeddings"] = 16
    first = CLIPTextConfig(**shared, hidden_size=16, projection_dim=16)
    second = CLIPTextConfig(**shared, hidden_size=24, projection_dim=20, hidden_act="gelu")
    first_tokenizer, second_tokenizer = tokenizer(), tokenizer(pad_token="!")
    first_tokenizer.model_max_length = second_tokenizer.model_max_length = 16
    diffusers.StableDiffusionXLPipeline(
        vae=vae,
        text_encoder=CLIPTextModel(first),
        text_encoder_2=CLIPTextModelWithProjection(second),
        tokenizer=first_tokenizer,
        tokenizer_2=second_tokenizer,
        unet=unet,
        scheduler=diffusers.DDPMScheduler(**SCHEDULE, clip_sample=False),
    ).save_pretrained(folder)
    return folder


def write_images(folder: Path, sizes: list[tuple[int, int]]) -> Path:
    """Write random images of these sizes, every third with a list of two captions."""
    from PIL import Image

    folder.mkdir(parents=True)
    random = np.random.default_rng(0)
    lines = []
    for number, (width, height) in enumerate(sizes):
        coarse = Image.fromarray(random.integers(0, 256, (5, 5, 3), dtype=np.uint8))
        coarse.resize((width, height), Image.Resampling.BICUBIC).save(folder / f"secret-{number:02}.png")
        caption = f"image {number} of a private thing"
        text = caption if number % 3 else [caption, f"another word for {number}"]
        lines.append(json.dumps({"file_name": f"secret-{number:02}.png", "text": text}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


@pytest.fixture(scope="session")
def images(tmp_path_factory) -> Path:
    """Return a folder of 24 square images."""
    return write_images(tmp_path_factory.mktemp("square") / "images", [(RESOLUTION, RESOLUTION)] * 24)


@pytest.fixture(scope="session")
def wide_images(tmp_path_factory) -> Path:
    """Return a folder of 24 images that are not square."""
    return write_images(tmp_path_factory.mktemp("wide") / "images", [(48, 40), (40, 56)] * 12)


def short_run(pipeline: Path, images: Path, output_dir: Path, **settings) -> TrainConfig:
    """Return the config of a short run under the full guard, with what is given on top."""
    guard = {"num_shards": 3, "steps_per_round": 2, "skip_threshold": 0.95, "augment_threshold": 1.2}
    guard |= {"group_duplicates": "shard", "random_affine": 0.0}
    if settings.get("memguard") == "off":
        guard = {}
    defaults = {
        "pretrained_model_name_or_path": str(pipeline),
        "train_data_dir": str(images),
        "output_dir": str(output_dir),
        "resolution": RESOLUTION,
        "train_batch_size": 4,
        "max_train_steps": 24,
        "learning_rate": 1e-3,
        "seed": 7,
        "mixed_precision": "no",
    }
    return make_train_config(**{**defaults, **guard, **settings})


@pytest.fixture
def configure(pipeline, images, tmp_path) -> Callable[..., TrainConfig]:
    """Return a function that makes the config of a short run under the full guard, with what is given on top."""
    return lambda output="run", **settings: short_run(pipeline, images, tmp_path / output, **settings)


@pytest.fixture(scope="session")
def finished_run(pipeline, images, wide_images, tmp_path_factory) -> TrainResult:
    """Return a short run that is over, with a held-out gap and a checkpoint; whoever changes it makes a copy first."""
    from sd_memguard.training.trainer import train

    folder = tmp_path_factory.mktemp("finished") / "run"
    heldout = {"validation_data_dir": str(wide_images), "center_crop": True}
    return train(short_run(pipeline, images, folder, **heldout, checkpointing_steps=15))


@pytest.fixture
def run(configure) -> Callable[..., TrainResult]:
    """Return a function that trains with the settings of `configure`."""
    from sd_memguard.training.trainer import train

    return lambda *args, **settings: train(configure(*args, **settings))
