"""Cached batches against computed ones, and the probe that looks at fixed ones."""

import pytest
import torch

from sd_memguard.core.sampler import Visit
from sd_memguard.data.batches import BatchSource, Encoders
from sd_memguard.data.transforms import NUM_MAPS
from sd_memguard.models.pipeline import load_models
from sd_memguard.training.loss import DenoisingLoss
from sd_memguard.training.plan import make_plan
from sd_memguard.training.validation import LossProbe

VISITS = [[Visit(3, 0, 0), Visit(8, 1, 2), Visit(3, 0, 1)], [Visit(20, 2, 5), Visit(0, 0, 0)]]


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
def test_caches_change_nothing(make_source, wide_pictures, shape, random_affine):
    data = {"train_data_dir": str(wide_pictures), "center_crop": True} if shape == "cropped" else {}
    data["random_affine"] = random_affine
    cached = make_source(cache_latents="memory", cache_text_embeddings="memory", **data)
    computed = make_source(cache_latents="off", cache_text_embeddings="off", **data)
    assert cached.caches_latents
    assert cached.caches_embeddings
    assert not computed.caches_latents
    assert not computed.caches_embeddings
    for (_, ours), (_, theirs) in zip(cached.batches(VISITS), computed.batches(VISITS), strict=True):
        torch.testing.assert_close(ours.latents, theirs.latents, rtol=0, atol=1e-5)
        torch.testing.assert_close(ours.embeddings, theirs.embeddings, rtol=0, atol=1e-5)


def test_random_crops_are_not_cached(make_source, wide_pictures):
    assert not make_source(train_data_dir=str(wide_pictures)).caches_latents


def test_pictures_seen_less_often_than_encoded_are_not_cached(configure):
    plan = make_plan(configure(random_affine=0.05))
    encoders = Encoders(load_models(plan.pipeline, plan.config), torch.device("cpu"), torch.float32)
    for num_visits, cached in ((24 * NUM_MAPS, True), (24 * NUM_MAPS - 1, False)):
        source = BatchSource(plan.samples, encoders, plan.config, plan.seed, num_visits=num_visits)
        assert source.caches_latents == cached


def test_augmented_copies_neither_come_from_the_cache_nor_enter_it(make_source):
    cached, computed = make_source(cache_latents="memory"), make_source(cache_latents="off")
    ((_, before),) = cached.batches(VISITS[:1])
    request = ([3, 8], [(0, 0, 0), (0, 0, 1)], 5)
    _, copies = cached.augmented(*request)
    torch.testing.assert_close(copies.latents, computed.augmented(*request)[1].latents, rtol=0, atol=1e-5)
    ((_, after),) = cached.batches(VISITS[:1])
    assert torch.equal(before.latents, after.latents)
    assert not torch.allclose(copies.latents, cached.augmented(*request[:2], 0)[1].latents)


def test_workers_change_nothing(make_source):
    alone = make_source(cache_latents="off")
    helped = make_source(cache_latents="off", dataloader_num_workers=1)
    for (_, ours), (_, theirs) in zip(alone.batches(VISITS), helped.batches(VISITS), strict=True):
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
