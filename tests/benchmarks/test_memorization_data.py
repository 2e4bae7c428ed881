"""The changed copies of the demo set that some arms of the benchmark are trained on."""

import hashlib
import json

from benchmarks.memorization.data import training_folder
from sd_memguard.assets import demo_data_path


def hashes(folder):
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text(encoding="utf-8").splitlines()]
    return [hashlib.sha256((folder / row["file_name"]).read_bytes()).hexdigest() for row in rows]


def test_the_distinct_set_has_every_image_once(tmp_path):
    everything, distinct = hashes(demo_data_path()), hashes(training_folder("distinct", tmp_path))
    assert len(everything) == 992
    assert sorted(distinct) == sorted(set(everything))
