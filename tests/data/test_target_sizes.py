"""Which size an image is trained at: against a slow peer, within its limits, and in turn with several resolutions."""

import logging
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sd_memguard.config import ConfigError
from sd_memguard.data.target_sizes import Size, TargetSizes, bucket_sizes
from tests.conftest import short_run
from tests.reference.slow_buckets import slow_bucket, slow_small_bucket

BUCKETS = {"enable_bucket": True, "bucket_reso_steps": 8}


def targets_of(own: list[tuple[int, int]], seed: int = 0, **given) -> TargetSizes:
    """Return the targets of images of these sizes; every other row is unusable."""
    sizes = np.zeros((2 * len(own), 2), np.int32)
    sizes[::2] = own
    samples = SimpleNamespace(
        sizes=sizes,
        sample_ids=np.arange(0, 2 * len(own), 2),
        num_rows=2 * len(own),
        file=lambda number: f"{number}.png",
    )
    return TargetSizes(samples, short_run("pipeline", "images", "run", **given), seed)


def chosen(targets: TargetSizes, epoch: int = 0) -> list[Size]:
    """Return the size of each image in an epoch."""
    return [targets.sizes[number] for number in targets.buckets(torch.from_numpy(targets.samples.sample_ids), epoch)]


IMAGES = st.lists(st.tuples(st.integers(1, 3000), st.integers(1, 3000)), min_size=1, max_size=12)


@settings(deadline=None, max_examples=100)
@given(IMAGES, st.integers(4, 20), st.sampled_from([8, 16, 24]), st.integers(1, 4), st.integers(1, 3))
def test_buckets_are_those_of_a_slow_peer(own, units, step, narrower, wider):
    side = 8 * units
    limits = {"min_bucket_reso": max(8, side // narrower), "max_bucket_reso": side * wider}
    given = {"resolution": side, "enable_bucket": True, "bucket_reso_steps": step, **limits}
    peer = [side, step, limits["min_bucket_reso"], limits["max_bucket_reso"]]
    try:
        expected = [slow_bucket(*size, *peer) for size in own]
    except ValueError:  # none is allowed
        with pytest.raises(ConfigError, match="finds no size"):
            targets_of(own, **given)
        return
    if any(min(size) < peer[2] or max(size) > peer[3] for size in expected):
        return  # the square of a side that is no multiple of the step
    assert chosen(targets_of(own, **given)) == expected


@settings(deadline=None, max_examples=100)
@given(IMAGES, st.integers(4, 20), st.sampled_from([8, 16, 24]), st.integers(1, 3))
def test_without_enlarging_they_are_too(own, units, step, wider):
    given = {"resolution": 8 * units, "enable_bucket": True, "bucket_reso_steps": step, "bucket_no_upscale": True}
    targets = targets_of(own, **given, max_bucket_reso=8 * units * wider)
    assert chosen(targets) == [slow_small_bucket(*size, 8 * units, step, 8 * units * wider) for size in own]
    for (width, height), size in zip(own, chosen(targets), strict=True):
        assert size.width <= max(width, step)
        assert size.height <= max(height, step)
        assert size.width * size.height <= max(8 * units, step) ** 2 or min(size) == step


def test_the_buckets_of_512_are_those_that_users_know():
    config = short_run("pipeline", "images", "run", resolution=512, enable_bucket=True)
    wide = [(512, 512), (576, 448), (640, 384), (704, 320), (768, 320), (832, 256), (896, 256), (960, 256), (1024, 256)]
    wide.remove((704, 320))
    found = [tuple(size) for size in bucket_sizes(512, config)]
    assert set(wide) <= set(found)
    assert [size[::-1] for size in found[::-1]] == found
    assert all(min(size) >= 256 and max(size) <= 1024 and size[0] * size[1] <= 512**2 for size in found)


def test_squares_are_one_bucket_and_the_default():
    targets = targets_of([(30, 50), (900, 10)])
    assert targets.sizes == [Size(32, 32)]
    assert chosen(targets) == [(32, 32)] * 2
    assert not targets.need_no_crop
    assert targets_of([(30, 30), (900, 900)]).need_no_crop


def test_images_of_the_shape_of_their_bucket_need_no_crop():
    assert targets_of([(40, 24), (80, 48), (24, 40), (640, 640)], **BUCKETS).need_no_crop
    assert not targets_of([(40, 24), (81, 48)], **BUCKETS).need_no_crop


def test_resolutions_take_turns_and_every_image_is_seen_at_each():
    own = [(64, 64)] * 60
    targets = targets_of(own, resolution=(48, 32, 64))
    assert targets.sizes == [Size(32, 32), Size(48, 48), Size(64, 64)]
    for block in range(4):
        epochs = [chosen(targets, 3 * block + turn) for turn in range(3)]
        assert all(set(turns) == set(targets.sizes) for turns in zip(*epochs, strict=True))
        for epoch in epochs:  # each of them about as often
            assert all(8 <= epoch.count(size) <= 32 for size in targets.sizes)
    assert chosen(targets, 0) != chosen(targets, 3)
    assert chosen(targets, 0) != chosen(targets_of(own, seed=1, resolution=(48, 32, 64)), 0)
    assert chosen(targets, 0) == chosen(targets_of(own, resolution=(64, 48, 32)), 0)
    assert [len(members) for members in targets.members] == [60] * 3


def test_members_are_the_images_of_a_bucket():
    targets = targets_of([(64, 64), (40, 24), (60, 60), (24, 40), (80, 48)], **BUCKETS)
    assert targets.sizes == [Size(24, 40), Size(32, 32), Size(40, 24)]
    assert [members.tolist() for members in targets.members] == [[6], [0, 4], [2, 8]]
    assert targets.places(2, [8, 2]).tolist() == [1, 0]
    assert str(targets) == "32x32 (2), 40x24 (2), 24x40 (1)"
    assert targets.largest == (32, 32)


def test_images_below_one_step_are_named(caplog):
    with caplog.at_level(logging.WARNING):
        targets_of([(64, 64), (40, 5), (4, 9)], **BUCKETS, bucket_no_upscale=True).warn_of_enlarged()
    assert "2 image(s) have a side shorter than --bucket_reso_steps" in caplog.text
    assert "2.png" in caplog.text


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"bucket_no_upscale": True}, "`--bucket_no_upscale` belongs to `--enable_bucket`"),
        ({"min_bucket_reso": 16}, "`--min_bucket_reso` belongs to `--enable_bucket`"),
        ({"resolution": (32, 32)}, "`--resolution` must name each side once"),
        ({**BUCKETS, "min_bucket_reso": 40}, "`--resolution` must lie between"),
        ({**BUCKETS, "resolution": (32, 64), "max_bucket_reso": 48}, "`--resolution` must lie between"),
        ({**BUCKETS, "bucket_no_upscale": True, "min_bucket_reso": 16}, "must not be given together"),
        ({"enable_bucket": True, "bucket_reso_steps": 12}, "must be a positive multiple of 8"),
        ({"resolution": (32, 36)}, "must be a positive multiple of 8, got 36"),
    ],
)
def test_what_cannot_be_is_refused(given, message):
    with pytest.raises(ConfigError) as caught:
        short_run("pipeline", "images", "run", **given)
    assert message in str(caught.value)


def test_steps_larger_than_the_square_are_refused():
    with pytest.raises(ConfigError, match="finds no size of 32x32 pixels"):
        targets_of([(64, 64)], enable_bucket=True)
