import os

import pytest
import torch
from safetensors.torch import load_file, save_file

from sd_memguard.proxies.store import DiskStore, LazyTensors, RamStore, StoreError

TENSORS = {
    "weight": torch.arange(6.0).reshape(2, 3).t(),  # not contiguous
    "half": torch.tensor([0.1, float("nan")], dtype=torch.bfloat16),
    "step": torch.tensor(7.0),
    "empty": torch.empty(0, 2),
}


@pytest.fixture(params=["ram", "disk"])
def store(request, tmp_path):
    return RamStore() if request.param == "ram" else DiskStore(tmp_path / "store")


def assert_holds(entry, tensors):
    assert set(entry) == set(tensors)
    assert len(entry) == len(tensors)
    for name, tensor in tensors.items():
        assert entry[name].dtype == tensor.dtype
        assert torch.equal(entry[name].nan_to_num(9), tensor.nan_to_num(9))


def test_an_entry_comes_back_and_is_a_copy(store):
    tensors = {name: tensor.clone() for name, tensor in TENSORS.items()}
    store.put("a", tensors)
    store.put("nothing", {})
    tensors["weight"].zero_()
    assert_holds(store.get("a"), TENSORS)
    assert_holds(store.get("nothing"), {})
    with pytest.raises(KeyError):
        store.get("a")["missing"]


def test_both_stores_write_the_same_bytes(tmp_path):
    files = []
    for number, store in enumerate((RamStore(), DiskStore(tmp_path / "store"))):
        store.put("a", {"x": torch.randn(4, 5, generator=torch.Generator().manual_seed(0)), "n": torch.tensor(3)})
        store.write("a", tmp_path / f"{number}.safetensors")
        files.append((tmp_path / f"{number}.safetensors").read_bytes())
    assert files[0] == files[1]


def test_what_was_written_outlives_the_entry(store, tmp_path):
    store.put("a", TENSORS)
    store.write("a", tmp_path / "out.safetensors")
    store.drop("a")
    assert_holds(load_file(tmp_path / "out.safetensors"), TENSORS)
    with pytest.raises((KeyError, FileNotFoundError)):
        store.drop("a")


def test_what_is_adopted_stays_as_it_is(store, tmp_path):
    contiguous = {name: tensor.contiguous() for name, tensor in TENSORS.items()}
    save_file(contiguous, tmp_path / "in.safetensors")
    store.adopt("a", tmp_path / "in.safetensors")
    assert_holds(store.get("a"), TENSORS)
    store.drop("a")
    assert_holds(load_file(tmp_path / "in.safetensors"), TENSORS)


def test_disk_entries_are_linked_not_copied(tmp_path):
    store = DiskStore(tmp_path / "store")
    store.put("a", TENSORS)
    store.write("a", tmp_path / "out.safetensors")
    assert os.stat(tmp_path / "out.safetensors").st_nlink == 2
    store.adopt("b", tmp_path / "out.safetensors")
    assert os.stat(tmp_path / "out.safetensors").st_nlink == 3
    store.drop("a")
    assert os.stat(tmp_path / "out.safetensors").st_nlink == 2


def test_disk_entries_are_copied_where_there_are_no_links(tmp_path, monkeypatch):
    def refuse(source, target):
        raise OSError("no links here")

    monkeypatch.setattr(os, "link", refuse)
    store = DiskStore(tmp_path / "store")
    store.put("a", TENSORS)
    store.write("a", tmp_path / "out.safetensors")
    assert os.stat(tmp_path / "out.safetensors").st_nlink == 1
    assert_holds(load_file(tmp_path / "out.safetensors"), TENSORS)


def test_a_disk_store_begins_empty(tmp_path):
    first = DiskStore(tmp_path)
    first.put("left", TENSORS)
    second = DiskStore(tmp_path)
    second.put("new", TENSORS)
    assert [path.name for path in second.folder.glob("*.safetensors")] == ["new.safetensors"]


def test_a_disk_store_keeps_its_hands_off_what_the_user_has_in_the_folder(tmp_path):
    (tmp_path / "thesis").mkdir()
    for name in ("thesis/chapter.tex", "model.safetensors"):
        (tmp_path / name).write_text("years of work")
    store = DiskStore(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.safetensors", "thesis"]  # nothing to store yet
    store.put("a", TENSORS)
    assert (tmp_path / "thesis/chapter.tex").read_text() == (tmp_path / "model.safetensors").read_text()


@pytest.mark.parametrize("marked", [False, True])
def test_a_disk_store_refuses_a_folder_of_its_name_with_other_content(tmp_path, marked):
    if marked:
        DiskStore(tmp_path).put("a", TENSORS)
    folder = tmp_path / "memguard-proxies"
    folder.mkdir(exist_ok=True)
    mine = folder / ("notes.txt" if marked else "mine.safetensors")
    mine.write_text("mine")
    with pytest.raises(StoreError, match=mine.name):
        DiskStore(tmp_path)
    assert mine.read_text() == "mine"


def test_lazy_tensors_read_what_is_asked_for(tmp_path):
    save_file({"a": torch.ones(2)}, tmp_path / "x.safetensors")
    lazy = LazyTensors(tmp_path / "x.safetensors")
    assert "a" in lazy
    assert "b" not in lazy
    assert dict(lazy)["a"].tolist() == [1, 1]
