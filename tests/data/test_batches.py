"""Cached batches against computed ones, and the probe that looks at fixed ones."""

import pytest
import torch

from sd_memguard.core.sampler import SampleRef
from sd_memguard.data.batches import AugmentedCopy, BatchSource, Encoders
from sd_memguard.data.transforms import NUM_AFFINE_VARIANTS
from sd_memguard.models.pipeline import load_models
from sd_memguard.training.loss import DenoisingLoss
from sd_memguard.training.plan import make_plan
from sd_memguard.training.validation import LossProbe

TIMES_SEEN = [[SampleRef(3, 0, 0), SampleRef(8, 1, 2), SampleRef(3, 0, 1)], [SampleRef(20, 2, 5), SampleRef(0, 0, 0)]]


@pytest.fixture
def make_source(configure):
    """Return a function that makes a source of batches from settings."""

    def make(**settings) -> BatchSource:
        plan = make_plan(configure(random_flip=True, caption_dropout=0.3, **settings))
        models = load_models(plan.pipeline, plan.config)
        encoders = Encoders(models, torch.device("cpu"), torch.float32)
        return BatchSource(plan.samples, encoders, plan.config, plan.seed)

    return make


@pytest.mark.parametrize("random_affine", [0.0, 0.05])
@pytest.mark.parametrize("shape", ["square", "cropped"])
def test_caches_change_nothing(make_source, wide_images, shape, random_affine):
    data = {"train_data_dir": str(wide_images), "center_crop": True} if shape == "cropped" else {}
    data["random_affine"] = random_affine
    cached = make_source(cache_latents="memory", cache_text_embeddings="memory", **data)
    computed = make_source(cache_latents="off", cache_text_embeddings="off", **data)
    assert cached.caches_latents
    assert cached.caches_embeddings
    assert not computed.caches_latents
    assert not computed.caches_embeddings
    for (_, ours), (_, theirs) in zip(cached.batches(TIMES_SEEN), computed.batches(TIMES_SEEN), strict=True):
        torch.testing.assert_close(ours.latents, theirs.latents, rtol=0, atol=1e-5)
        torch.testing.assert_close(ours.condition, theirs.condition, rtol=0, atol=1e-5)


def test_random_crops_are_not_cached(make_source, wide_images):
    assert not make_source(train_data_dir=str(wide_images)).caches_latents


def test_images_seen_less_often_than_encoded_are_not_cached(configure):
    plan = make_plan(configure(random_affine=0.05))
    encoders = Encoders(load_models(plan.pipeline, plan.config), torch.device("cpu"), torch.float32)
    for num_samples_seen, cached in ((24 * NUM_AFFINE_VARIANTS, True), (24 * NUM_AFFINE_VARIANTS - 1, False)):
        source = BatchSource(plan.samples, encoders, plan.config, plan.seed, num_samples_seen=num_samples_seen)
        assert source.caches_latents == cached


def test_augmented_copies_neither_come_from_the_cache_nor_enter_it(make_source):
    cached, computed = make_source(cache_latents="memory"), make_source(cache_latents="off")
    ((_, before),) = cached.batches(TIMES_SEEN[:1])
    request = [AugmentedCopy(3, (0, 0, 0)), AugmentedCopy(8, (0, 0, 1))]
    _, copies = cached.augmented(request, 0, 5)
    torch.testing.assert_close(copies.latents, computed.augmented(request, 0, 5)[1].latents, rtol=0, atol=1e-5)
    ((_, after),) = cached.batches(TIMES_SEEN[:1])
    assert torch.equal(before.latents, after.latents)
    assert not torch.allclose(copies.latents, cached.augmented(request, 0, 0)[1].latents)


def test_workers_change_nothing(make_source):
    alone = make_source(cache_latents="off")
    helped = make_source(cache_latents="off", dataloader_num_workers=1)
    for (_, ours), (_, theirs) in zip(alone.batches(TIMES_SEEN), helped.batches(TIMES_SEEN), strict=True):
        assert torch.equal(ours.latents, theirs.latents)


def test_the_probe_depends_on_its_seed_and_the_model_alone(make_source):
    source = make_source()
    plan = make_plan(source.config)
    models = load_models(plan.pipeline, plan.config)
    loss = DenoisingLoss(models.noise_scheduler)
    probe = LossProbe(source, 1, 50, 4)
    first = probe.measure(models.unet, loss)
    torch.randn(5)
    assert probe.measure(models.unet, loss) == first
    assert LossProbe(source, 1, 50, 4).measure(models.unet, loss) == first
    assert LossProbe(source, 2, 50, 4).measure(models.unet, loss) != first
