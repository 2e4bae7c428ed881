"""What a check found is used again for the same files, and for no others."""

import numpy as np
import PIL.Image
import pytest

from sd_memguard.config import make_train_config
from sd_memguard.core.duplicates import THUMBNAIL_SIDE
from sd_memguard.data import image_check as sample_check
from sd_memguard.data.image_check_cache import CheckCache, CheckCacheError, GoodImage
from sd_memguard.data.samples import load_samples
from sd_memguard.training.plan import make_plan


def image(seed: int, size=(20, 14)) -> PIL.Image.Image:
    return PIL.Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for number, seed in enumerate([0, 1, 2, 1]):  # 1 and 3 are duplicates
        image(seed, (20 + seed, 14)).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text("an image")
    return folder


@pytest.fixture
def decoded(monkeypatch):
    """Collect what is decoded by its path."""
    found, decode = [], sample_check.decode_image

    def count(stored):
        found.append(str(stored["path"]))
        return decode(stored)

    monkeypatch.setattr(sample_check, "decode_image", count)
    return found


def load(folder, cache, **settings):
    defaults = {"dataset_name": None, "dataset_config_name": None, "cache_dir": None, "image_column": "image"}
    defaults |= {"caption_column": "text", "max_train_samples": None, "seed": 0, "on_bad_sample": "skip"}
    defaults |= {"find_duplicates": True, "num_workers": 1, "progress": False}
    return load_samples(train_data_dir=str(folder), cache=cache, **{**defaults, **settings})


def test_a_second_check_decodes_only_what_is_new_and_finds_the_same(folder, tmp_path, decoded):
    first = load(folder, CheckCache(tmp_path / "cache", thumbnails=True))
    assert sorted(decoded) == ["0.png", "1.png", "2.png", "3.png"]
    decoded.clear()
    second = load(folder, CheckCache(tmp_path / "cache", thumbnails=True))
    assert decoded == []
    for found in (first, second):
        assert found.sizes.tolist() == [[20, 14], [21, 14], [22, 14], [21, 14]]
        assert found.groups.tolist() == [0, 1, 2, 1]

    (folder / "0.png").rename(folder / "9.png")
    (folder / "0.txt").rename(folder / "9.txt")
    image(7, (30, 14)).save(folder / "2.png")
    third = load(folder, CheckCache(tmp_path / "cache", thumbnails=True))
    assert decoded == ["2.png"]
    assert third.sizes.tolist() == load(folder, None).sizes.tolist() == [[21, 14], [30, 14], [21, 14], [20, 14]]


def test_a_bad_image_is_looked_at_each_time(folder, tmp_path, decoded):
    (folder / "1.png").write_bytes((folder / "1.png").read_bytes()[:100])
    plain = load(folder, None)
    decoded.clear()
    found = [load(folder, CheckCache(tmp_path / "cache", thumbnails=True)) for _ in range(2)]
    assert decoded.count("1.png") == 2
    assert decoded.count("0.png") == 1
    assert found[0].bad == found[1].bad == plain.bad
    assert plain.bad[0].file == "1.png"


def test_sizes_alone_are_not_taken_for_thumbnails(folder, tmp_path, decoded):
    load(folder, CheckCache(tmp_path / "cache", thumbnails=False), find_duplicates=False)
    decoded.clear()
    assert load(folder, CheckCache(tmp_path / "cache", thumbnails=True)).groups.tolist() == [0, 1, 2, 1]
    assert len(decoded) == 4


def test_a_damaged_file_of_the_cache_is_named_and_made_anew(folder, tmp_path, decoded, caplog):
    load(folder, CheckCache(tmp_path / "cache", thumbnails=True))
    (file,) = (tmp_path / "cache").glob("checks-*/*.safetensors")
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    decoded.clear()
    assert load(folder, CheckCache(tmp_path / "cache", thumbnails=True)).groups.tolist() == [0, 1, 2, 1]
    assert len(decoded) == 4
    assert str(file) in caplog.text


def test_a_row_comes_back_as_it_was(tmp_path):
    cache = CheckCache(tmp_path, thumbnails=True)
    thumbnail = np.random.default_rng(0).integers(0, 256, (THUMBNAIL_SIDE, THUMBNAIL_SIDE, 3), dtype=np.uint8)
    cache.add(b"key", GoodImage((70_000, 3), thumbnail))
    cache.flush()
    found = CheckCache(tmp_path, thumbnails=True).find(b"key")
    assert found is not None
    assert found.size == (70_000, 3)
    np.testing.assert_array_equal(found.thumbnail, thumbnail)
    assert cache.find(b"other") is None


def test_a_folder_that_cannot_be_used_is_named_with_the_way_out(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckCacheError, match=r"file.*--encoding_cache_dir"):
        CheckCache(tmp_path / "file", thumbnails=True)


@pytest.mark.parametrize("shared", [False, True], ids=["run folder", "shared folder"])
def test_a_run_keeps_what_it_found_in_its_folder_or_a_named_one(folder, tmp_path, decoded, shared):
    def plan(output: str, **settings):
        named = {"encoding_cache_dir": str(tmp_path / "cache")} if shared else {}
        settings = {
            "train_data_dir": str(folder),
            "resolution": 64,
            "center_crop": True,
            "max_train_steps": 2,
        } | settings
        make_plan(
            make_train_config(
                pretrained_model_name_or_path="bundled", output_dir=str(tmp_path / output), **named, **settings
            )
        )

    plan("dry", dry_run=True)
    assert len(decoded) == 4
    assert not (tmp_path / "dry").exists()
    assert not (tmp_path / "cache").exists()
    plan("run")
    assert len(decoded) == 8
    plan("run")
    assert len(decoded) == 8
    plan("other")
    assert len(decoded) == (8 if shared else 12)
