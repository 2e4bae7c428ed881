"""Folders as other trainers have them, read as they are."""

import numpy as np
import pytest
from PIL import Image

from sd_memguard.data.samples import SampleError, load_samples


def write(file, caption=None) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(sum(file.name.encode())).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize((64, 64)).save(file)
    if caption is not None:
        file.with_suffix(".txt").write_text(caption, encoding="utf-8")


def read(folder):
    return load_samples(
        train_data_dir=str(folder),
        dataset_name=None,
        dataset_config_name=None,
        cache_dir=None,
        image_column="image",
        caption_column="text",
        max_train_samples=None,
        seed=0,
        on_bad_sample="error",
    )


def test_a_folder_of_kohya_has_each_image_once_whatever_its_repeats(tmp_path):
    write(tmp_path / "img" / "10_mine" / "a.png", "1girl, red dress, mine")
    write(tmp_path / "img" / "10_mine" / "b.jpg", "1girl, mine")
    write(tmp_path / "img" / "1_other" / "c.webp", "landscape")
    samples = read(tmp_path / "img")
    assert samples.files().to_pylist() == ["10_mine/a.png", "10_mine/b.jpg", "1_other/c.webp"]
    assert samples.caption_lists().to_pylist() == [["1girl, red dress, mine"], ["1girl, mine"], ["landscape"]]


def test_a_concept_of_onetrainer_is_read_without_its_masks(tmp_path):
    write(tmp_path / "concept" / "a.png", "mine in the rain")
    write(tmp_path / "concept" / "part" / "b.png", "mine in the sun")
    assert len(read(tmp_path / "concept").sample_ids) == 2
    write(tmp_path / "concept" / "a-masklabel.png")
    assert read(tmp_path / "concept").files().to_pylist() == ["a.png", "part/b.png"]
    write(tmp_path / "concept" / "c-masklabel.png")  # the image is missing
    with pytest.raises(SampleError, match=r"c-masklabel.png: has no caption"):
        read(tmp_path / "concept")
