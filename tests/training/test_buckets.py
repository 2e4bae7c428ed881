"""Runs with images of several sizes: their batches, their gradients, their resuming, and what they say."""

import json
import logging
from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from sd_memguard.core.sampler import SampleRef
from sd_memguard.core.seeding import permutation
from sd_memguard.data.batches import NOTHING, AugmentedCopy, BatchSource, Encoders
from sd_memguard.models.pipeline import load_models
from sd_memguard.training.loss import DenoisingLoss
from sd_memguard.training.plan import make_plan
from sd_memguard.training.signals import Interrupted
from sd_memguard.training.validation import LossProbe
from tests.conftest import write_images
from tests.reference.bare_loop import bare_loop
from tests.reference.slow_buckets import slow_batches
from tests.training.test_trainer import EPSILON, RESULTS, results, stop_at, weights

BUCKETS = {"enable_bucket": True, "bucket_reso_steps": 8}
SHAPES = [(64, 64), (50, 32), (32, 48), (64, 64), (90, 40), (40, 24), (33, 64), (64, 60)]


@pytest.fixture(scope="module")
def shapes(tmp_path_factory) -> Path:
    """Return a folder of 24 images of four buckets."""
    return write_images(tmp_path_factory.mktemp("shapes") / "images", SHAPES * 3)


@pytest.fixture(scope="module")
def exact_images(tmp_path_factory) -> Path:
    """Return a folder of 22 images that have the sizes of three buckets, the first with one caption each."""
    sizes = [(32, 32)] * 9 + [(40, 24)] * 7 + [(24, 40)] * 6
    folder = write_images(tmp_path_factory.mktemp("exact") / "images", sizes)
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    for row in rows:
        row["text"] = row["text"] if isinstance(row["text"], str) else row["text"][0]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


@pytest.fixture
def make_source(configure):
    def make(**settings) -> BatchSource:
        plan = make_plan(configure(**{**BUCKETS, **settings}))
        models = load_models(plan.pipeline, plan.config)
        return BatchSource(plan.samples, Encoders(models, torch.device("cpu"), torch.float32), plan.config, plan.seed)

    return make


# Gradients.


def test_a_run_equals_a_loop_that_takes_one_image_at_a_time(run, pipeline, exact_images):
    """In batches of one size and of several, the gradient is the mean over the images."""
    rows = [json.loads(line) for line in (exact_images / "metadata.jsonl").read_text().splitlines()]
    captioned = [(exact_images / row["file_name"], row["text"]) for row in rows]
    settings = {"memguard": "off", "train_data_dir": str(exact_images), "max_train_steps": 11}
    trained = run(**settings, **BUCKETS, adam_epsilon=EPSILON)
    kinds = [0] * 9 + [1] * 7 + [2] * 6
    epochs = [permutation(7, "order", 0, epoch, length=22).tolist() for epoch in range(2)]
    batches = slow_batches(epochs, lambda sample, _: kinds[sample], 4)
    assert len(batches) == 11
    mixed = [len({kinds[sample] for _, sample in batch}) for batch in batches]
    assert 0 < sum(number == 1 for number in mixed) < 11
    visits = [visit for batch in batches for visit in batch]
    expected = bare_loop(pipeline, captioned, 11, 4, 1e-3, EPSILON, seed=7, visits=visits)
    torch.testing.assert_close(weights(trained.output_dir), expected, rtol=0, atol=1e-6)


def test_accumulation_changes_the_order_alone(run, pipeline, exact_images):
    rows = [json.loads(line) for line in (exact_images / "metadata.jsonl").read_text().splitlines()]
    captioned = [(exact_images / row["file_name"], row["text"]) for row in rows]
    settings = {"memguard": "off", "train_data_dir": str(exact_images), "max_train_steps": 5}
    trained = run(**settings, **BUCKETS, adam_epsilon=EPSILON, gradient_accumulation_steps=2, train_batch_size=3)
    kinds = [0] * 9 + [1] * 7 + [2] * 6
    epochs = [permutation(7, "order", 0, epoch, length=22).tolist() for epoch in range(2)]
    visits = [visit for batch in slow_batches(epochs, lambda sample, _: kinds[sample], 3) for visit in batch]
    expected = bare_loop(pipeline, captioned, 5, 6, 1e-3, EPSILON, seed=7, visits=visits)
    torch.testing.assert_close(weights(trained.output_dir), expected, rtol=0, atol=1e-6)


# Resuming.


@pytest.mark.parametrize(
    ("step", "settings"),
    [
        pytest.param(9, {"cache_latents": "off", "random_flip": True}, id="three-shards"),
        pytest.param(9, {"center_crop": True, "random_affine": 0.05}, id="cached"),
        pytest.param(10, {"num_shards": 1, "cache_latents": "off"}, id="one-shard"),
        pytest.param(9, {"memguard": "off", "cache_latents": "off"}, id="plain"),
        pytest.param(7, {"resolution": (32, 48)}, id="two-resolutions"),
        pytest.param(9, {"gradient_accumulation_steps": 2, "bucket_no_upscale": True}, id="accumulation"),
        pytest.param(9, {"proxy": "lora", "rank": 2, "learning_rate": 1e-2, "skip_threshold": 0.97}, id="lora"),
    ],
)
def test_a_run_resumed_in_the_middle_of_an_epoch_equals_one_that_was_not_stopped(
    run, shapes, monkeypatch, step, settings
):
    settings = {"train_data_dir": str(shapes), **BUCKETS, **settings}
    whole = run("whole", **settings)
    with monkeypatch.context() as patch:
        stop_at(patch, step)
        with pytest.raises(Interrupted):
            run("parts", **settings)
    parts = run("parts", **settings, resume_from_checkpoint="latest")
    # The summary names the file of a LoRA adapter, in a folder of another name.
    compared = len(RESULTS) - (settings.get("proxy") == "lora")
    assert results(parts.output_dir)[:compared] == results(whole.output_dir)[:compared]
    if settings.get("memguard") != "off":
        assert whole.summary["skipped_fraction"] > 0
        assert whole.summary["extra_steps"] > 0


@pytest.mark.parametrize("num_shards", [1, 3])
def test_every_image_is_seen_as_often_as_any_other(run, shapes, num_shards):
    settings = {"redistribute_fraction": 0.0, "num_shards": num_shards, "max_train_steps": 18, "cache_latents": "off"}
    result = run(train_data_dir=str(shapes), **BUCKETS, **settings)
    seen = pq.read_table(result.output_dir / "memguard/samples.parquet")["seen"].to_pylist()
    assert seen == [3] * 24


def test_squares_by_buckets_train_as_without(run, configure):
    """Square images have one bucket, the square: the same bytes, whatever buckets there could be."""
    plain, bucketed = run("plain"), run("bucketed", **BUCKETS)
    assert results(bucketed.output_dir) == results(plain.output_dir)


def test_duplicates_count_as_one_image(run, tmp_path):
    folder = write_images(tmp_path / "copies", SHAPES * 2)
    for copy, width in ((5, 48), (11, 40)):  # of another bucket than the original
        Image.open(folder / "secret-00.png").resize((width, 64)).save(folder / f"secret-{copy:02}.png")
    settings = {"train_data_dir": str(folder), "group_duplicates": "balance", "redistribute_fraction": 0.0}
    result = run(**settings, **BUCKETS, num_shards=1, max_train_steps=21, train_batch_size=4, skip_threshold=0.0)
    table = pq.read_table(result.output_dir / "memguard/samples.parquet").to_pydict()
    seen = Counter()
    for file, group, times in zip(table["file"], table["duplicate_group"], table["seen"], strict=True):
        seen[file if group is None else group] += times
    assert len(seen) == 14
    assert set(seen.values()) == {6}


# Batches.


def test_a_forward_holds_one_size(run, shapes, monkeypatch):
    forwards, copies = [], []
    compute, augmented = DenoisingLoss.__call__, BatchSource.augmented

    def loss(self, unet, latents, *args, **options):
        forwards.append(tuple(latents.shape))
        return compute(self, unet, latents, *args, **options)

    def augment(self, part, bucket, magnitude):
        copies.append({self.targets.sizes[copy.bucket] for copy in part})
        return augmented(self, part, bucket, magnitude)

    monkeypatch.setattr(DenoisingLoss, "__call__", loss)
    monkeypatch.setattr(BatchSource, "augmented", augment)
    result = run(train_data_dir=str(shapes), **BUCKETS)
    assert result.summary["extra_steps"] > 0
    assert len({shape[2:] for shape in forwards}) == 4
    assert all(len(sizes) == 1 for sizes in copies)
    assert sum(shape[0] for shape in forwards) == 24 * 4 + result.summary["extra_steps"] * 4


@pytest.mark.parametrize("place", ["memory", "disk"])
@pytest.mark.parametrize("settings", [{}, {"random_flip": True, "random_affine": 0.05}, {"resolution": (32, 48)}])
def test_caches_of_several_sizes_change_nothing(make_source, shapes, tmp_path, place, settings):
    settings = {"train_data_dir": str(shapes), "center_crop": True, **settings}
    cached = make_source(**settings, cache_latents=place, encoding_cache_dir=str(tmp_path / "cache"))
    again = make_source(**settings, cache_latents=place, encoding_cache_dir=str(tmp_path / "cache"))
    computed = make_source(**settings, cache_latents="off")
    assert cached.caches_latents
    for bucket, members in enumerate(cached.targets.members):
        refs = [SampleRef(sample_id, 0, epoch, bucket) for sample_id in members.tolist() for epoch in range(2)]
        batches = [next(source.batches([refs]))[1].latents for source in (cached, again, computed)]
        size = cached.targets.sizes[bucket]
        assert batches[0].shape[2:] == (size.height // 4, size.width // 4)
        assert torch.equal(batches[0], batches[1])
        torch.testing.assert_close(batches[0], batches[2], rtol=0, atol=1e-5)


def test_a_part_of_a_batch_that_is_empty_is_nothing(make_source, shapes):
    for settings in ({"center_crop": True}, {"cache_latents": "off"}):
        source = make_source(train_data_dir=str(shapes), **settings)
        refs = [[SampleRef(0, 0, 0, int(source.targets.table[0, 0]))], []]
        assert [batch is NOTHING for _, batch in source.batches(refs)] == [False, True]


def test_augmented_copies_have_the_size_of_their_bucket(make_source, shapes):
    source = make_source(train_data_dir=str(shapes))
    bucket = int(source.targets.table[0, 4])
    size = source.targets.sizes[bucket]
    addresses, batch = source.augmented([AugmentedCopy(4, (0, 0, 0), bucket)], bucket, 5)
    assert addresses == [(0, 0, 0)]
    assert batch.latents.shape[2:] == (size.height // 4, size.width // 4)


def test_the_probe_measures_each_image_in_its_bucket(make_source, shapes):
    source = make_source(train_data_dir=str(shapes))
    models = load_models(make_plan(source.config).pipeline, source.config)
    loss = DenoisingLoss(models.noise_scheduler)
    together, alone = (LossProbe(source, 1, 50, size).measure(models.unet, loss) for size in (5, 1))
    assert together.mean == pytest.approx(alone.mean, rel=1e-5)
    found = {tuple(batch.latents.shape[2:]) for _, batch in LossProbe(source, 1, 50, 5).batches}
    assert found == {(size.height // 4, size.width // 4) for size in source.targets.sizes}


def test_heldout_images_have_buckets_of_their_own(run, shapes, wide_images):
    settings = {"validation_data_dir": str(wide_images), "max_train_steps": 6, "cache_latents": "off"}
    summary = run(train_data_dir=str(shapes), **BUCKETS, **settings).summary
    assert summary["heldout_loss"] > 0


# What is said.


def test_a_dry_run_and_the_log_list_the_buckets(run, shapes, capsys, caplog):
    settings = {"train_data_dir": str(shapes), "cache_latents": "off", "max_train_steps": 3, **BUCKETS}
    run(dry_run=True, **settings)
    text = " ".join(capsys.readouterr().out.split())
    assert "sizes: 32x32 (9), 24x40 (6), 40x24 (6), 48x16 (3)" in text
    assert "update at " in text
    with caplog.at_level(logging.INFO):
        run(**settings)
    assert "sizes: 32x32 (9), 24x40 (6), 40x24 (6), 48x16 (3)" in caplog.text


def test_a_changed_bucket_setting_is_refused_on_resuming(run, shapes):
    from sd_memguard.runs.checkpoint import CheckpointError

    settings = {"train_data_dir": str(shapes), "cache_latents": "off", "max_train_steps": 3, "checkpointing_steps": 3}
    run(**settings, **BUCKETS)
    with pytest.raises(CheckpointError, match="bucket_reso_steps"):
        run(**settings, enable_bucket=True, bucket_reso_steps=16, resume_from_checkpoint="latest")
