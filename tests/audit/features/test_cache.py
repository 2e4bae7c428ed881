import pytest
import torch

from sd_memguard.audit.features import cache as store_module
from sd_memguard.audit.features.cache import Store


@pytest.fixture
def store(tmp_path, monkeypatch):
    monkeypatch.setattr(store_module, "BLOCK_ROWS", 4)
    return Store(tmp_path / "cache")


def squares(asked):
    def compute(rows):
        asked.append(list(rows))
        return torch.tensor([[row, row**2] for row in rows], dtype=torch.float32)

    return compute


KEYS = [f"image {number}" for number in range(10)]


def test_rows_are_computed_once_in_blocks(store):
    asked = []
    first, again = (store.rows("squares", KEYS, squares(asked)) for _ in range(2))
    assert asked == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert torch.equal(first, again)
    assert first[:, 1].tolist() == [number**2 for number in range(10)]


def test_other_kinds_and_other_contents_are_other_rows(store):
    asked = []
    store.rows("squares", KEYS, squares(asked))
    store.rows("squares", [*KEYS[:9], "changed"], squares(asked))
    assert asked[3:] == [[8, 9]]
    store.rows("cubes", KEYS, squares(asked))
    assert len(asked) == 7


def test_an_interrupted_computation_goes_on(store):
    def fail(rows):
        if rows.start == 8:
            raise KeyboardInterrupt
        return torch.zeros(len(rows), 2)

    with pytest.raises(KeyboardInterrupt):
        store.rows("zeros", KEYS, fail)
    asked = []
    store.rows("zeros", KEYS, squares(asked))
    assert asked == [[8, 9]]


@pytest.mark.parametrize("damage", [b"", b"\x93NUMPY", b"nonsense" * 50])
def test_a_damaged_block_is_computed_again(store, damage):
    store.rows("squares", KEYS, squares([]))
    files = sorted((store.folder / "rows").iterdir())
    assert len(files) == 3
    for file in files:
        file.write_bytes(damage)
    asked = []
    assert store.rows("squares", KEYS, squares(asked))[9, 1] == 81
    assert len(asked) == 3


def test_a_file_is_kept_whole_or_not_at_all(store, tmp_path):
    def write_half(path):
        path.write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        store.keep_file("key", write_half)
    assert not store.has_file("key")
    assert list((store.folder / "files").iterdir()) == []
    store.keep_file("key", lambda path: path.write_text("whole"))
    store.place_file("key", tmp_path / "sub" / "copy.txt")
    store.place_file("key", tmp_path / "sub" / "copy.txt")
    assert store.has_file("key")
    assert (tmp_path / "sub" / "copy.txt").read_text() == "whole"
