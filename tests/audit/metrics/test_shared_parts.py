"""Parts of training images planted in images that are given to the audit."""

import json

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from sd_memguard.audit import AuditError
from sd_memguard.audit.arguments import parse_arguments
from sd_memguard.audit.command import run_audit
from sd_memguard.audit.metrics.shared_parts import choose_num_matches
from sd_memguard.core.local_features import MIN_MATCHES
from tests.core.test_local_features import scene

NUM_TRAINED, NUM_HELDOUT, NUM_COPIES = 12, 8, 3


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    place = tmp_path_factory.mktemp("parts")
    for name, seeds in (("train", range(NUM_TRAINED)), ("heldout", range(100, 100 + NUM_HELDOUT))):
        (place / name).mkdir()
        for seed in seeds:
            scene(seed).save(place / name / f"{seed}.png")
        lines = [{"file_name": f"{seed}.png", "text": f"scene {seed}"} for seed in seeds]
        (place / name / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (place / "given").mkdir()
    for number in range(NUM_COPIES):
        image = scene(200 + number)
        image.save(place / "given" / f"new-{number}.png")
        part = scene(number).resize((160, 128), Image.Resampling.BICUBIC)
        image.paste(part, (20 + 40 * number, 30))
        image.save(place / "given" / f"pasted-{number}.png")
    return place


def audit(folders, output, *flags):
    sets = ["--train_data_dir", folders / "train", "--reference_data_dir", folders / "heldout"]
    arguments = ["--images", folders / "given", *sets, "--output_dir", output, *flags]
    report = run_audit(parse_arguments([str(one) for one in arguments]))
    return report, {row["file"].rpartition("/")[2]: row for row in pq.read_table(output / "pairs.parquet").to_pylist()}


def test_pasted_parts_are_copies_where_local_features_are_asked_for(folders, tmp_path):
    pytest.importorskip("cv2")
    _, rows = audit(folders, tmp_path / "without")
    assert not any(row["is_copy"] for row in rows.values())
    assert all(row["num_matches"] is None for row in rows.values())
    report, rows = audit(folders, tmp_path / "with", "--local_features")
    copies = {file: row["nearest_file"] for file, row in rows.items() if row["is_copy"]}
    assert copies == {f"pasted-{number}.png": f"{number}.png" for number in range(NUM_COPIES)}
    assert all(rows[file]["num_matches"] >= MIN_MATCHES for file in copies)
    assert "matches of local features" in report.threshold.rule
    assert report.background.reference.share_above == 0
    assert "local features match" in (tmp_path / "with" / "report.html").read_text(encoding="utf-8")


def test_flags_that_exclude_each_other(folders, tmp_path):
    with pytest.raises(AuditError, match="give one"):
        audit(folders, tmp_path, "--local_features", "--copy_threshold", "0.5")


@pytest.mark.parametrize("rate", [0.005, 0.01, 0.2])
def test_at_most_the_share_that_is_allowed_has_as_many(rate):
    background = torch.from_numpy(np.random.default_rng(0).poisson(9, 300))
    limit = choose_num_matches(background, rate).num_matches
    assert (background >= limit).double().mean() <= rate
    assert limit == MIN_MATCHES or (background >= limit - 1).double().mean() > rate
    assert choose_num_matches(torch.zeros(0, dtype=torch.int64), rate).num_matches == MIN_MATCHES
