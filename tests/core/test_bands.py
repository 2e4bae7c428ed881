import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sd_memguard.core.bands import classify
from tests.reference.slow_guard import slow_band

# Numbers that float32 holds exactly, so that both sides of the comparison see the same thresholds.
exact = st.integers(0, 24).map(lambda eighths: eighths / 8)


@given(st.lists(exact, min_size=1), exact, exact)
def test_bands_equal_the_slow_rule(ratios, skip_threshold, augment_threshold):
    bands = classify(torch.tensor(ratios), skip_threshold, augment_threshold)
    for i, ratio in enumerate(ratios):
        found = {name: bool(mask[i]) for name, mask in zip(("skip", "augment", "clean"), bands, strict=True)}
        assert sum(found.values()) == 1
        assert found[slow_band(ratio, skip_threshold, augment_threshold)]


@pytest.mark.parametrize(
    ("skip_threshold", "augment_threshold", "expected"),
    [
        (0.8, 1.2, "ssaac"),
        (0.8, 0.8, "ssccc"),
        (0.8, 0.0, "ssccc"),
        (0.0, 1.2, "ccccc"),
        (0.0, 0.0, "ccccc"),
    ],
)
def test_golden_bands(skip_threshold, augment_threshold, expected):
    bands = classify(torch.tensor([0.0, 0.79, 0.8, 1.19, 1.2]), skip_threshold, augment_threshold)
    letters = ["s" if s else "a" if a else "c" for s, a in zip(bands.skip_mask, bands.augment_mask, strict=True)]
    assert "".join(letters) == expected


def test_where_no_decision_is_due_the_sample_is_clean():
    assert classify(torch.tensor([math.inf, math.nan]), 0.8, 1.2).clean_mask.all()
