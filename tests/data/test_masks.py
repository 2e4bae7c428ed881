"""Masked losses: which masks are found and refused, how they follow their images, and what the loss makes of them."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from PIL import Image
from safetensors.torch import load_file

from sd_memguard.audit.collection import read_folder
from sd_memguard.config import ConfigError
from sd_memguard.core.sampler import SampleRef
from sd_memguard.data.batches import BatchSource
from sd_memguard.data.samples import SampleError
from sd_memguard.models.encoders import Encoders
from sd_memguard.models.kinds import Condition
from sd_memguard.models.pipeline import load_models
from sd_memguard.training.loss import DenoisingLoss
from sd_memguard.training.plan import make_plan

MASKED = {"masked_loss": True, "augment_threshold": 0.0}


def half(width=32, height=32, left=0.5):
    """Return a mask that is white from a share of the width on."""
    pixels = np.zeros((height, width), np.uint8)
    pixels[:, round(left * width) :] = 255
    return Image.fromarray(pixels)


@pytest.fixture
def folder(images, tmp_path) -> Path:
    """Return a folder of 24 images, without masks yet."""
    return Path(shutil.copytree(images, tmp_path / "masked"))


def save_mask(folder, number, mask):
    mask.save(folder / f"secret-{number:02}-masklabel.png")


@pytest.fixture
def make_source(configure, folder):
    def make(**settings) -> BatchSource:
        settings = {"train_data_dir": str(folder), **MASKED, **settings}
        plan = make_plan(configure(**settings))
        encoders = Encoders(load_models(plan.pipeline, plan.config), torch.device("cpu"), torch.float32)
        return BatchSource(plan.samples, encoders, plan.config, plan.seed)

    return make


def batches(source, epochs=3):
    ids = source.samples.sample_ids.tolist()
    return list(source.batches([[SampleRef(sample_id, 0, epoch) for sample_id in ids] for epoch in range(epochs)]))


# Which are found, and which are refused.


def test_masks_beside_images_and_alpha_channels_are_found(configure, folder, caplog):
    save_mask(folder, 3, half())
    save_mask(folder, 4, half().convert("RGB"))
    save_mask(folder, 5, Image.new("L", (32, 32), 255))  # white all over: the image counts whole
    for number, alpha in ((6, half()), (7, Image.new("L", (32, 32), 255))):
        image = Image.open(folder / f"secret-{number:02}.png")
        image.putalpha(alpha)
        image.save(folder / f"secret-{number:02}.png")
    with caplog.at_level("INFO", "sd_memguard"):
        plan = make_plan(configure(train_data_dir=str(folder), **MASKED))
    assert np.flatnonzero(plan.samples.masked).tolist() == [3, 4, 6]
    for sample_id in (3, 4, 6):
        assert plan.samples.mask(sample_id).tobytes() == half().tobytes()
    assert plan.samples.mask(5) is plan.samples.mask(7) is plan.samples.mask(0) is None
    assert "3 of 24 images have a mask; the others count whole" in caplog.text
    assert make_plan(configure(train_data_dir=str(folder))).samples.masked is None


@pytest.mark.parametrize(
    ("mask", "reason"),
    [
        (half(16, 32), "its mask has another size (16x32, the image 32x32); make both the same"),
        (Image.new("L", (32, 32), 0), "its mask is black, so nothing of it would be trained"),
        (b"nothing", "its mask secret-03-masklabel.png: is not an image that Pillow can read"),
    ],
)
def test_a_mask_that_cannot_be_used_is_refused_with_the_data(configure, folder, mask, reason):
    save_mask(folder, 2, half())
    if isinstance(mask, bytes):
        (folder / "secret-03-masklabel.png").write_bytes(mask)
    else:
        save_mask(folder, 3, mask)
    with pytest.raises(SampleError) as told:
        make_plan(configure(train_data_dir=str(folder), **MASKED))
    assert reason in str(told.value)
    assert [one.sample_id for one in told.value.bad] == [3]
    plan = make_plan(configure("other", train_data_dir=str(folder), on_bad_sample="skip", **MASKED))
    assert 3 not in plan.samples.sample_ids
    assert not plan.samples.masked[3]


def test_no_mask_at_all_is_refused_and_so_are_augmented_copies(configure, folder):
    with pytest.raises(SampleError, match=r"`--masked_loss` found no mask in .*put `name-masklabel.png` beside"):
        make_plan(configure(train_data_dir=str(folder), **MASKED))
    with pytest.raises(ConfigError, match="`--masked_loss` must not be given together with `--augment_threshold`"):
        configure(masked_loss=True, skip_threshold=0.8, augment_threshold=1.2)
    assert configure(masked_loss=True, memguard="off").masked_loss


def test_masks_are_no_images_of_a_folder_of_captions(configure, folder, tmp_path):
    """Neither for training nor for the audit, whether or not they count."""
    for line in (folder / "metadata.jsonl").read_text().splitlines():
        row = json.loads(line)
        text = row["text"] if isinstance(row["text"], str) else "\n".join(row["text"])
        (folder / row["file_name"]).with_suffix(".txt").write_text(text)
    (folder / "metadata.jsonl").unlink()
    save_mask(folder, 3, half())
    for settings in ({}, MASKED):
        plan = make_plan(configure(train_data_dir=str(folder), **settings))
        assert len(plan.samples.sample_ids) == 24
    assert read_folder(folder, "--train_data_dir").files == plan.samples.files().to_pylist()


# How they follow their images.


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"random_flip": True},
        {"random_flip": True, "random_affine": 0.1},
        {"random_flip": True, "cache_latents": "off"},
        {"random_affine": 0.1, "cache_latents": "off", "random_flip": True},
        {"center_crop": True, "size": (48, 40), "cache_latents": "memory"},
        {"size": (48, 40), "random_flip": True},
        {"size": (40, 56), "random_affine": 0.05, "random_flip": True},
    ],
)
def test_a_mask_goes_the_ways_of_its_image(make_source, folder, settings, monkeypatch):
    """An image that equals its mask is seen as that mask: through the same crops, flips and maps."""
    size = settings.pop("size", (32, 32))
    random = np.random.default_rng(1)
    for number in range(24):
        coarse = Image.fromarray(random.integers(0, 256, (4, 4), dtype=np.uint8))
        mask = coarse.resize(size, Image.Resampling.BICUBIC)
        save_mask(folder, number, mask)
        mask.convert("RGB").save(folder / f"secret-{number:02}.png")
    source = make_source(**settings)
    is_exact = size[0] == size[1] or "center_crop" in settings
    assert source.caches_latents == (is_exact and settings.get("cache_latents") != "off")
    seen = []
    # What the VAE is given, in the size of latents, stands in for what it makes of it.
    monkeypatch.setattr(
        source.encoders,
        "moments",
        lambda pixels: seen.append(pixels) or torch.zeros(len(pixels), 8, 8, 8),
    )
    if source.caches_latents:
        for refs, batch in batches(source):
            for ref, mask in zip(refs, batch.mask, strict=True):
                key, image = source.samples.keyed_image(ref.sample_id)
                address = (ref.shard_index, ref.epoch_index, ref.sample_id)
                pixels = source.preprocess[0](image, key, address)[:1]
                expected = torch.nn.functional.avg_pool2d((pixels + 1) / 2, 4)
                torch.testing.assert_close(mask, expected, rtol=0, atol=0.003)
        return
    for (_, batch), pixels in zip(batches(source), seen, strict=True):
        expected = torch.nn.functional.avg_pool2d((pixels[:, :1] + 1) / 2, 4)
        torch.testing.assert_close(batch.mask, expected, rtol=0, atol=0.003)


def test_images_without_a_mask_count_whole_and_a_batch_of_them_has_none(make_source, folder):
    save_mask(folder, 3, half())
    source = make_source()
    ((_, batch),) = batches(source, 1)
    assert batch.mask.shape == (24, 1, 8, 8)
    assert torch.equal(batch.mask[3, 0], torch.tensor([0.0] * 4 + [1.0] * 4).expand(8, 8))
    others = [position for position in range(24) if position != 3]
    assert bool((batch.mask[others] == 1).all())
    _, batch = next(iter(source.batches([[SampleRef(1, 0, 0), SampleRef(2, 0, 0)]])))
    assert batch.mask is None
    assert torch.equal(source.fixed([2, 3]).mask[1, 0], torch.tensor([0.0] * 4 + [1.0] * 4).expand(8, 8))


@pytest.mark.parametrize("cached", [True, False])
def test_a_crop_that_misses_the_mask_is_left_out_and_named_once(make_source, folder, cached, caplog):
    wide = Image.effect_noise((96, 32), 80).convert("RGB")
    for number in range(24):
        wide.save(folder / f"secret-{number:02}.png")
    save_mask(folder, 3, half(96, 32, 0.95))
    source = make_source(center_crop=cached, group_duplicates="off", num_shards=1)
    assert source.caches_latents == cached
    present = [[ref.sample_id for ref in refs] for refs, _ in batches(source, 8)]
    assert any(3 not in ids for ids in present)
    assert any(3 in ids for ids in present) == (not cached)
    assert all(set(range(24)) - {3} <= set(ids) for ids in present)
    assert caplog.text.count("secret-03.png: its mask is outside of a crop") == 1
    if cached:
        assert next(iter(source.batches([[SampleRef(3, 0, 0)]])))[0] == []


# What the loss makes of them.


class Wrong(torch.nn.Module):
    """A denoiser that errs by what it is told, at each element."""

    def __init__(self, errors):
        super().__init__()
        self.errors = errors

    def forward(self, noisy, timesteps, embeddings, return_dict):
        return (self.noise + self.errors,)


def losses(errors, mask=None, **options):
    unet = Wrong(errors)
    unet.noise = torch.randn(errors.shape)
    loss = DenoisingLoss(DDPMScheduler(num_train_timesteps=50), **options)
    condition = Condition(torch.zeros(len(errors), 1, 1))
    return loss(unet, torch.zeros(errors.shape), condition, torch.full((len(errors),), 3), unet.noise, mask=mask)


def test_the_loss_is_the_mean_over_the_area():
    errors = torch.randn(3, 4, 8, 8)
    mask = torch.rand(3, 1, 8, 8)
    mask[1] = 1
    expected = [
        sum(float(mask[i, 0, y, x] * errors[i, c, y, x] ** 2) for c in range(4) for y in range(8) for x in range(8))
        / sum(4 * float(mask[i, 0, y, x]) for y in range(8) for x in range(8))
        for i in range(3)
    ]
    torch.testing.assert_close(losses(errors, mask), torch.tensor(expected), rtol=1e-5, atol=0)
    torch.testing.assert_close(losses(errors, mask)[1], losses(errors)[1], rtol=1e-6, atol=0)


def test_the_loss_has_the_same_size_for_every_area_so_that_the_bank_can_compare():
    """An error that is everywhere alike has the same loss under any mask, a hard or a soft one."""
    errors = torch.randn(1, 4, 64, 64, generator=torch.Generator().manual_seed(0)).expand(4, -1, -1, -1)
    mask = torch.zeros(4, 1, 64, 64)
    mask[0], mask[1], mask[2, :, :32] = 1, 0.3, 1
    mask[3, :, :8, :8] = 1
    found = losses(errors, mask)
    assert found[0] == pytest.approx(float(found[1]), rel=1e-5)
    assert found.tolist() == pytest.approx([1.0] * 4, rel=0.2)


def test_what_is_black_has_no_gradient():
    errors = torch.randn(1, 4, 8, 8, requires_grad=True)
    mask = torch.zeros(1, 1, 8, 8)
    mask[..., 4:] = 1
    losses(errors, mask).sum().backward()
    assert bool((errors.grad[..., :4] == 0).all())
    assert bool((errors.grad[..., 4:] != 0).all())


# Whole runs.

UNET = "unet/diffusion_pytorch_model.safetensors"


def test_runs_with_and_without_cache_agree_and_a_resumed_one_is_the_same(run, folder):
    for number in range(0, 24, 2):
        save_mask(folder, number, half(left=0.25 + number / 48))
    settings = {"train_data_dir": str(folder), **MASKED, "random_flip": True, "max_train_steps": 12}
    settings["cache_latents"] = "memory"  # whatever the length of the run
    whole = run("whole", **settings, checkpointing_steps=100)
    run("parts", **{**settings, "max_train_steps": 6}, checkpointing_steps=6)
    parts = run("parts", **settings, checkpointing_steps=100, resume_from_checkpoint="latest")
    assert (whole.output_dir / UNET).read_bytes() == (parts.output_dir / UNET).read_bytes()
    uncached = run("uncached", **{**settings, "cache_latents": "off"}, adam_epsilon=1e-4)
    again = run("cached", **settings, adam_epsilon=1e-4)
    unmasked = run("unmasked", **{**settings, "masked_loss": False}, adam_epsilon=1e-4)
    found = [load_file(result.output_dir / UNET) for result in (uncached, again, unmasked)]
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-5)
    assert any(not torch.allclose(found[1][name], found[2][name], atol=1e-5) for name in found[1])
