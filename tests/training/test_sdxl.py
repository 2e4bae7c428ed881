"""SDXL through the whole program: its two text encoders, its sizes, and everything that SD 1.x has."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionXLPipeline
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from sd_memguard.core.sampler import SampleRef
from sd_memguard.data.batches import NOTHING, BatchSource, Encoders, sample_address
from sd_memguard.export.exporter import Exporter
from sd_memguard.models.pipeline import ModelError, load_models
from sd_memguard.runs.trained_run import read_trained_run
from sd_memguard.training.build import make_accelerator
from sd_memguard.training.dry_run import describe_plan
from sd_memguard.training.loss import DenoisingLoss
from sd_memguard.training.plan import make_plan
from sd_memguard.training.signals import Interrupted
from sd_memguard.training.trainer import Trainer, train
from tests.conftest import RESOLUTION, SCHEDULE, short_run

UNET = Path("unet/diffusion_pytorch_model.safetensors")
REFS = [SampleRef(3, 0, 0), SampleRef(8, 1, 2), SampleRef(21, 0, 1)]


@pytest.fixture
def configure(sdxl_pipeline, wide_images, tmp_path):
    """Return a function that makes the config of a short run with the tiny SDXL."""
    return lambda output="run", **settings: short_run(sdxl_pipeline, wide_images, tmp_path / output, **settings)


@pytest.fixture
def run(configure):
    """Return a function that trains the tiny SDXL."""
    return lambda *args, **settings: train(configure(*args, **settings))


@pytest.fixture
def make_source(configure):
    """Return a function that makes a source of batches from settings."""

    def make(**settings) -> BatchSource:
        plan = make_plan(configure(**settings))
        encoders = Encoders(load_models(plan.pipeline, plan.config), torch.device("cpu"), torch.float32)
        return BatchSource(plan.samples, encoders, plan.config, plan.seed)

    return make


# What the UNet is told.


def test_embeddings_are_those_of_the_pipeline(sdxl_pipeline, configure):
    pipeline = StableDiffusionXLPipeline.from_pretrained(sdxl_pipeline)
    captions = ["a red thing", "", "something else altogether"]
    expected = pipeline.encode_prompt(captions, do_classifier_free_guidance=False)
    encoders = Encoders(load_models(sdxl_pipeline, configure()), torch.device("cpu"), torch.float32)
    rows = encoders.embeddings(captions)
    assert rows.shape == (3, *encoders.embedding_shape)
    found = encoders.condition(rows, torch.zeros(3, 6))
    torch.testing.assert_close(found.embeddings, expected[0])
    torch.testing.assert_close(found.added["text_embeds"], expected[2])


def by_hand(image, address, source, bucket=0) -> list[float]:
    """Return sizes by following an image that holds the coordinates of its pixels through the preprocessing."""
    from PIL import Image

    columns, rows = torch.meshgrid(torch.arange(image.width), torch.arange(image.height), indexing="xy")
    painted = Image.fromarray(torch.stack([columns, rows, rows * 0], -1).to(torch.uint8).numpy())
    seen = ((source.preprocess[bucket](painted, b"", address) + 1) * 127.5).round()
    first, last = seen[0, 0, 0].item(), seen[0, 0, -1].item()
    left = first if first < last else image.width - 1 - first  # flipped: counted from the other side
    return [image.height, image.width, seen[1, 0, 0].item(), left, seen.shape[1], seen.shape[2]]


def test_sizes_are_those_of_the_image_and_of_its_crop_as_it_is_seen(make_source, tmp_path):
    from tests.conftest import write_images

    # One side is the resolution already, so that a pixel keeps its value and with it its place.
    folder = write_images(tmp_path / "narrow", [(RESOLUTION, 50), (47, RESOLUTION)] * 12)
    for settings in ({}, {"center_crop": True}, {"random_flip": True}):
        source = make_source(train_data_dir=str(folder), cache_latents="off", **settings)
        refs = [SampleRef(number, 0, epoch) for number in range(24) for epoch in range(2)]
        ((present, batch),) = source.batches([refs])
        expected = [
            by_hand(source.samples.image(ref.sample_id), (ref.shard_index, ref.epoch_index, ref.sample_id), source)
            for ref in present
        ]
        assert batch.condition.added["time_ids"].tolist() == expected
        if settings.get("random_flip"):
            assert len({tuple(row) for row in expected if row[1] > row[0]}) > 8  # crops and flips of all sorts


def test_in_buckets_the_crop_is_that_of_the_bucket(make_source, tmp_path):
    from tests.conftest import write_images

    # One side is that of the bucket already, so that a pixel keeps its value and with it its place.
    folder = write_images(tmp_path / "shapes", [(32, 35), (40, 29), (28, 40), (64, 17), (37, 32), (24, 44)] * 4)
    buckets = {"enable_bucket": True, "bucket_reso_steps": 8, "cache_latents": "off", "random_flip": True}
    source = make_source(train_data_dir=str(folder), **buckets)
    told = set()
    for bucket, members in enumerate(source.targets.members):
        refs = [SampleRef(number, 0, epoch, bucket) for number in members.tolist() for epoch in range(3)]
        ((present, batch),) = source.batches([refs])
        images = [source.samples.image(ref.sample_id) for ref in present]
        expected = [
            by_hand(image, sample_address(ref), source, bucket) for image, ref in zip(images, present, strict=True)
        ]
        assert batch.condition.added["time_ids"].tolist() == expected
        told |= {tuple(row[4:]) for row in expected}
    assert told == {(32, 32), (24, 40), (40, 24), (16, 64)}


def test_runs_with_buckets_can_be_resumed(run, tmp_path, monkeypatch):
    from tests.conftest import write_images
    from tests.training.test_trainer import results, stop_at

    folder = write_images(tmp_path / "shapes", [(32, 35), (40, 29), (28, 40), (64, 18)] * 6)
    settings = {"train_data_dir": str(folder), "enable_bucket": True, "bucket_reso_steps": 8, "cache_latents": "off"}
    whole = run("whole", **settings)
    with monkeypatch.context() as patch:
        stop_at(patch, 9)
        with pytest.raises(Interrupted):
            run("parts", **settings)
    parts = run("parts", **settings, resume_from_checkpoint="latest")
    assert results(parts.output_dir) == results(whole.output_dir)


def test_the_sizes_before_resizing_are_told(make_source):
    ((_, batch),) = make_source(center_crop=True).batches([REFS])
    sizes = batch.condition.added["time_ids"].tolist()
    # 48 x 40 becomes 38 x 32, 40 x 56 becomes 32 x 44; the middle begins at half of what is left over.
    assert sizes == [[56, 40, 6, 0, 32, 32], [40, 48, 0, 3, 32, 32], [56, 40, 6, 0, 32, 32]]


def test_an_affine_variant_moves_the_corner_of_its_crop(make_source):
    source = make_source(random_affine=0.1, center_crop=True, random_flip=True, cache_latents="off")
    keys = dict(zip(source.samples.sample_ids.tolist(), source.samples.content_keys().tolist(), strict=True))
    told = []
    for sample_id in range(24):
        for epoch in range(6):
            address = (0, epoch, sample_id)
            view = source.preprocess[0].views[int(source.preprocess[0].choose_views([address])[0])]
            right, down, _, scale = source.preprocess[0]._map(keys[sample_id].ljust(16, b"\0"), view.map)
            width, height = source.preprocess[0].resize(source.samples.image(sample_id)).size
            # Where the corner of the square comes from, without the rotation, in the enlarged image.
            corner = [
                (extent / 2 - 16 / (1 + 2 * scale) - round(shift * 32) / (1 + 2 * scale)) * (1 + 2 * scale)
                for extent, shift in ((width, right), (height, down))
            ]
            if view.flip:
                corner[0] = width * (1 + 2 * scale) - 32 - corner[0]
            told.append((sample_id, epoch, [max(0, corner[1]), max(0, corner[0])]))
    ((_, batch),) = source.batches([[SampleRef(sample_id, 0, epoch) for sample_id, epoch, _ in told]])
    expected = torch.tensor([corner for *_, corner in told])
    torch.testing.assert_close(batch.condition.added["time_ids"][:, 2:4], expected, rtol=0, atol=1.01)


@pytest.mark.parametrize("random_affine", [0.0, 0.05])
def test_caches_change_nothing(make_source, tmp_path, random_affine):
    data = {"center_crop": True, "random_affine": random_affine, "random_flip": True}
    computed = make_source(cache_latents="off", cache_text_embeddings="off", **data)
    for place in ("memory", "disk"):
        data["encoding_cache_dir"] = str(tmp_path / "cache")
        cached = make_source(cache_latents=place, cache_text_embeddings=place, **data)
        assert cached.caches_latents
        assert cached.caches_embeddings
        ((_, ours),), ((_, theirs),) = cached.batches([REFS]), computed.batches([REFS])
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


def test_the_second_text_encoder_counts_in_a_shared_cache(make_source, sdxl_pipeline, tmp_path):
    shared = {"cache_text_embeddings": "disk", "encoding_cache_dir": str(tmp_path / "cache")}
    first = make_source(**shared)
    other = Path(shutil.copytree(sdxl_pipeline, tmp_path / "other"))
    models = load_models(other, first.config)
    with torch.no_grad():
        models.text.encoders["text_encoder_2"].text_projection.weight *= 2
    models.text.encoders["text_encoder_2"].save_pretrained(other / "text_encoder_2")
    changed = make_source(pretrained_model_name_or_path=str(other), **shared)
    ((_, before),), ((_, after),) = first.batches([REFS]), changed.batches([REFS])
    assert torch.equal(before.condition.embeddings, after.condition.embeddings)
    assert not torch.allclose(before.condition.added["text_embeds"], after.condition.added["text_embeds"])


@pytest.mark.parametrize("dream", [None, 1.0])
def test_the_loss_is_that_of_a_unet_that_is_told_all(make_source, configure, dream):
    source = make_source()
    models = load_models(make_plan(configure()).pipeline, source.config)
    ((_, batch),) = source.batches([REFS])
    noise, timesteps = torch.randn_like(batch.latents), torch.tensor([5, 20, 40])
    loss = DenoisingLoss(models.noise_scheduler, dream_detail_preservation=dream)
    losses = loss(models.unet, batch.latents, batch.condition, timesteps, noise)
    noisy = models.noise_scheduler.add_noise(batch.latents, noise, timesteps)
    condition = batch.condition
    predicted = models.unet(noisy, timesteps, condition.embeddings, added_cond_kwargs=condition.added).sample
    expected = (predicted - noise).square().mean(dim=(1, 2, 3))
    if dream is None:
        torch.testing.assert_close(losses, expected)
    else:
        assert losses.isfinite().all()
        assert not torch.allclose(losses, expected)
    told_less = condition.added | {"time_ids": torch.zeros(3, 6)}
    without = loss(models.unet, batch.latents, condition._replace(added=told_less), timesteps, noise)
    assert not torch.allclose(losses, without)


# Whole runs.


@pytest.mark.parametrize(
    ("proxy", "num_shards"),
    [
        ("lora", 3),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in (("full", 1), ("full", 3), ("lora", 1))),
    ],
)
def test_a_run_is_resumed_exported_and_generates_alike(run, tmp_path, proxy, num_shards, images):
    """To the byte; the exports are loaded again and compared by the exporter itself."""
    settings = {"num_shards": num_shards, "proxy": proxy, "random_flip": True, "checkpointing_steps": 12}
    settings |= {"random_affine": 0.05, "train_batch_size": 2, "validation_data_dir": str(images)}
    formats = ("single-file", "lora-diffusers", "lora-kohya")
    whole = run("whole", **settings, export_formats=formats)
    cut = tmp_path / "cut"
    shutil.copytree(tmp_path / "whole" / "checkpoint-12", cut / "checkpoint-12")
    run("cut", **settings, resume_from_checkpoint="latest")
    assert (cut / UNET).read_bytes() == (whole.output_dir / UNET).read_bytes()
    assert whole.summary["heldout_loss"] is not None
    assert len(whole.summary["exports"]) == 3
    assert whole.summary["skipped_fraction"] > 0

    # The folder and the single file generate the same image.
    options = {"local_files_only": True, "add_watermarker": False}
    folder = StableDiffusionXLPipeline.from_pretrained(whole.output_dir, **options)
    file = StableDiffusionXLPipeline.from_single_file(
        str(whole.output_dir / "whole.safetensors"), config=str(whole.output_dir), **options
    )
    generated = [
        model("a thing", num_inference_steps=2, generator=torch.Generator().manual_seed(0), output_type="pt").images
        for model in (folder, file)
    ]
    assert torch.equal(*generated)


def test_all_of_it_at_once(run, images, sdxl_pipeline, tmp_path):
    """EMA, another VAE, a bias of the timesteps, losses by file name, and images of a validation prompt."""
    torch.manual_seed(3)
    vae = AutoencoderKL.from_pretrained(sdxl_pipeline / "vae")
    with torch.no_grad():
        vae.decoder.conv_out.bias += 0.25
    vae.save_pretrained(tmp_path / "vae")
    settings = {"use_ema": True, "timestep_bias_strategy": "later", "timestep_bias_multiplier": 2.0}
    settings |= {"pretrained_vae_model_name_or_path": str(tmp_path / "vae"), "debug_loss": True}
    settings |= {"validation_prompt": "a thing", "num_validation_images": 2, "max_train_steps": 8}
    done = run(**settings, checkpointing_steps=8, proportion_empty_prompts=0.5)
    name = "vae/diffusion_pytorch_model.safetensors"
    assert (done.output_dir / name).read_bytes() == (tmp_path / name).read_bytes()
    export = Exporter(read_trained_run(done.output_dir / "checkpoint-8")).export("single-file", tmp_path / "one")
    decoder = load_file(export.path)["first_stage_model.decoder.conv_out.bias"]
    assert torch.equal(decoder, vae.decoder.conv_out.bias)
    record = json.loads((done.output_dir / "memguard" / "config.json").read_text())
    assert (record["caption_dropout"], record["resolution"]) == (0.5, RESOLUTION)
    tags = [EventAccumulator(str(file)).Reload().Tags() for file in done.output_dir.rglob("events.out*")]
    assert any("validation" in one["images"] for one in tags)
    assert any("loss_for_secret-07.png" in one["scalars"] for one in tags)


def test_a_process_without_samples_takes_part_in_a_step(configure):
    """Where processes share a batch, the exchange of gradients waits for each of them."""
    config = configure()
    plan = make_plan(config)
    trainer = Trainer(plan, make_accelerator(plan.config))
    losses, timesteps = trainer._losses(NOTHING, [])
    assert losses.shape == timesteps.shape == (0,)
    losses.sum().backward()
    assert all(parameter.grad is not None for parameter in trainer.parameters)


def test_a_dry_run_counts_both_text_encoders(configure, sdxl_pipeline):
    plan = make_plan(configure(dry_run=True))
    parts = ("vae", "text_encoder", "text_encoder_2")
    assert plan.sizes.others == sum(
        file.stat().st_size for part in parts for file in (sdxl_pipeline / part).glob("*.safetensors")
    )
    text = describe_plan(plan, make_accelerator(plan.config))
    assert "frozen networks:" in text
    assert "s per step" in text


# Refusals.


def rewritten(source: Path, target: Path, file: str, **changes) -> str:
    """Copy a pipeline with changes in one of its configs, and return its folder."""
    shutil.copytree(source, target)
    path = target / file
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return str(target)


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        ("model_index.json", {"_class_name": "StableDiffusionXLImg2ImgPipeline"}, "docs/scripts.md"),
        ("unet/config.json", {"addition_embed_type": "image"}, "conditioned on `image`"),
        ("unet/config.json", {"in_channels": 9}, "takes 9 channels and latents have 4"),
        ("vae/config.json", {"latents_mean": [0.0, 0.0, 0.0, 0.0]}, "a mean and a deviation for each channel"),
        ("scheduler/scheduler_config.json", {"_class_name": "EDMEulerScheduler"}, "EDM preconditioning"),
    ],
)
def test_what_cannot_be_trained_is_refused_before_anything_is_loaded(
    configure, sdxl_pipeline, tmp_path, file, changes, message
):
    folder = rewritten(sdxl_pipeline, tmp_path / "other", file, **changes)
    with pytest.raises(ModelError, match=message):
        make_plan(configure(pretrained_model_name_or_path=folder))


def test_settings_that_do_not_fit_the_model_are_refused(configure, tmp_path):
    num_timesteps = SCHEDULE["num_train_timesteps"]
    with pytest.raises(Exception, match=rf"`--timestep_bias_end` must be at most .* \({num_timesteps}\), got 1000"):
        make_plan(configure(timestep_bias_strategy="range"))
    (tmp_path / "vae").mkdir()
    with pytest.raises(ModelError, match="so it is no VAE"):
        make_plan(configure(pretrained_vae_model_name_or_path=str(tmp_path / "vae")))
