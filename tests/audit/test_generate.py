import json
import shutil

import pytest
import torch

from sd_memguard.assets import tiny_sd_path
from sd_memguard.audit.generate import generate_images, load_pipeline

CAPTIONS = ["grinning face", "red apple", "grinning face"]


@pytest.fixture(scope="module")
def pipeline():
    return load_pipeline(tiny_sd_path(), torch.device("cpu"))


def test_batches_change_nothing(pipeline):
    together = generate_images(pipeline, CAPTIONS, [1, 2, 3], num_inference_steps=2, batch_size=3)
    apart = generate_images(pipeline, CAPTIONS, [1, 2, 3], num_inference_steps=2, batch_size=2)
    assert together.shape == (3, 64, 64, 3)
    assert together.dtype == torch.uint8
    assert (together.int() - apart.int()).abs().max() <= 1


def test_caption_and_seed_decide_the_image(pipeline):
    images = generate_images(pipeline, [*CAPTIONS, "grinning face"], [1, 1, 3, 1], num_inference_steps=2)
    assert (images[0].int() - images[3].int()).abs().max() <= 1
    assert (images[0].int() - images[1].int()).abs().max() > 10
    assert (images[0].int() - images[2].int()).abs().max() > 10


def test_latents_are_not_clipped_where_the_config_does_not_say(tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(tiny_sd_path(), folder)
    file = folder / "scheduler" / "scheduler_config.json"
    config = json.loads(file.read_text())
    config.pop("clip_sample", None)
    file.write_text(json.dumps(config))
    scheduler = load_pipeline(folder, torch.device("cpu")).scheduler
    assert type(scheduler).__name__ == "DDIMScheduler"
    assert scheduler.config.clip_sample is False
    assert scheduler.config.beta_schedule == "scaled_linear"
