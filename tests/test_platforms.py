"""What Windows and Apple silicon do differently, played on whatever system the tests run on."""

import errno
import os
import pickle
import stat
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from sd_memguard.audit.metrics import background
from sd_memguard.core.aggregation import aggregate, distance
from sd_memguard.data.transforms import PixelDataset, Preprocess
from sd_memguard.proxies.lora import DOWN, UP, LoraProxies
from sd_memguard.proxies.store import DiskStore, RamStore
from sd_memguard.runs.checkpoint import list_checkpoints, prune_checkpoints, save_checkpoint
from sd_memguard.training import failures
from sd_memguard.training.failures import OutOfMemoryError, explained_faults, is_disk_full
from sd_memguard.training.plan import make_plan

fcntl = pytest.importorskip("fcntl", reason="plays Windows by what POSIX tells of an open file")

# Windows.


@pytest.fixture
def windows_fsync(monkeypatch):
    """Let `fsync` refuse a file that is not open for writing, as Windows does."""
    flush = os.fsync

    def fsync(descriptor):
        is_read_only = fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY
        if is_read_only and stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(errno.EBADF, "Bad file descriptor")
        flush(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)


def test_a_run_needs_no_fsync_of_files_open_for_reading(run, windows_fsync):
    folder = run(max_train_steps=3, checkpointing_steps=3, cache_latents="disk").output_dir
    assert len(list_checkpoints(folder)) == 1
    assert (folder / "model_index.json").is_file()


def test_an_entry_taken_over_does_not_keep_the_checkpoint_mapped(tmp_path):
    file = tmp_path / "part.safetensors"
    save_file({"a": torch.ones(4096)}, file)
    store = RamStore()
    store.adopt("a", file)
    with file.open("rb+") as content:  # Windows refuses to remove a file that is mapped; here it shows like this
        content.write(bytes(file.stat().st_size))
    assert store.get("a")["a"].tolist() == [1.0] * 4096


def test_an_entry_that_somebody_still_reads_does_not_end_the_run(tmp_path, monkeypatch):
    store = DiskStore(tmp_path)
    store.put("a", {"a": torch.ones(1)})

    def refuse(path, **how):
        raise PermissionError(errno.EACCES, "The process cannot access the file because it is being used")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", refuse)
        store.drop("a")
    later = DiskStore(tmp_path)
    later.put("b", {"b": torch.ones(1)})
    assert [path.name for path in later.folder.glob("*.safetensors")] == ["b.safetensors"]


def test_a_checkpoint_that_somebody_reads_is_pruned_later(tmp_path, monkeypatch, caplog):
    for step in (1, 2, 3):
        save_checkpoint(tmp_path, step, lambda folder: (folder / "unet").mkdir())

    def refuse(folder):
        raise PermissionError(errno.EACCES, "in use")

    with monkeypatch.context() as patch:
        patch.setattr("sd_memguard.runs.checkpoint.shutil.rmtree", refuse)
        prune_checkpoints(tmp_path, 1)
    assert caplog.text.count("cannot be removed") == 2
    prune_checkpoints(tmp_path, 1)
    assert [folder.name for folder in list_checkpoints(tmp_path)] == ["checkpoint-3"]


def test_a_full_disk_is_known_by_the_system_s_own_number(monkeypatch):
    full, other = (SafetensorError(f"I/O error: ... (os error {number})") for number in (112, 28))
    assert [is_disk_full(error) for error in (full, other)] == [False, True]
    monkeypatch.setattr(failures.os, "name", "nt")
    assert [is_disk_full(error) for error in (full, other)] == [True, False]


def test_what_reads_images_in_workers_can_be_sent_to_processes_that_are_spawned(configure):
    config = configure()
    plan = make_plan(config)
    dataset = PixelDataset(plan.samples, [Preprocess(config, 3, size) for size in plan.targets.sizes])
    sent = pickle.loads(pickle.dumps(dataset))
    sample_id = int(plan.samples.sample_ids[4])
    assert torch.equal(sent.read(sample_id, (0, 0, 0)), dataset.read(sample_id, (0, 0, 0)))


# Apple silicon.


class OnMPS(Tensor):
    """A tensor of a device without float64: it must be on the host before it is cast."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        casts = func is Tensor.double or any(one is torch.float64 for one in [*args, *kwargs.values()])
        if casts and isinstance(args[0], OnMPS):
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64")
        if func is Tensor.copy_ and isinstance(args[0], OnMPS) and args[1].dtype == torch.float64:
            raise TypeError("Cannot copy float64 to a MPS Tensor")
        result = super().__torch_function__(func, types, args, kwargs)
        return result.as_subclass(Tensor) if func is Tensor.cpu else result


def on_mps(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).as_subclass(OnMPS)


def test_averages_need_no_float64_on_the_device():
    states = [{"a": on_mps(3, 2, seed=seed)} for seed in range(2)]
    mean = aggregate(states, [1.0, 3.0])
    plain = [state["a"].cpu().double() for state in states]
    torch.testing.assert_close(mean["a"], (plain[0] / 4 + plain[1] * 3 / 4).float())
    assert distance(states[0], mean) > 0


def matrix(change):
    return change.up @ change.down


def test_averages_of_adapters_need_no_float64_on_the_device():
    parameters = {
        f"layer{suffix}": torch.nn.Parameter(on_mps(*shape)) for suffix, shape in ((DOWN, (2, 5)), (UP, (4, 2)))
    }
    optimizer = torch.optim.SGD(parameters.values())
    layer = torch.nn.Identity()
    proxies = LoraProxies(parameters, optimizer, 2, RamStore(), {"layer": layer}, 1.0)
    proxies.activate(1)
    with torch.no_grad():
        parameters[f"layer{UP}"].mul_(2.0)
    change = matrix(proxies.changes([1.0, 1.0])["layer"])
    with proxies.averaged([1.0, 1.0]):
        shown = (parameters[f"layer{UP}"] @ parameters[f"layer{DOWN}"]).detach().cpu().double()
        shown += matrix(proxies.residuals["layer"].change())
    torch.testing.assert_close(shown, change, rtol=0, atol=1e-6)
    assert proxies.average([1.0, 1.0])[0] > 0
    torch.testing.assert_close(matrix(proxies.changes([1.0, 1.0])["layer"]), change, rtol=0, atol=1e-6)


def test_ratios_of_distances_need_no_float64_on_the_device(monkeypatch):
    """`Gallery.pixel_ratios` with a device that gives its scores in float32."""
    pixels = torch.randint(256, (7, 12), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    train = [pixels[2:].float()]
    gallery = SimpleNamespace(
        rows=range(5),
        pixels=train,
        keys=(),
        device="cpu",
        extract=lambda *_: [pixels[:2]],
        store=SimpleNamespace(rows=lambda _, hashes, compute: compute(range(len(hashes)))),
    )
    collection = type("Images", (list,), {"hashes": ["a", "b"]})([0, 1])
    on_cpu = background.Gallery.pixel_ratios(gallery, collection)
    find = background.best_matches

    def found_on_mps(*arguments):
        found = find(*arguments)
        return found._replace(scores=found.scores.as_subclass(OnMPS))

    monkeypatch.setattr(background, "best_matches", found_on_mps)
    for found, expected in zip(background.Gallery.pixel_ratios(gallery, collection), on_cpu, strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    "text",
    [
        "MPS backend out of memory (MPS allocated: 9.05 GB)",
        "[enforce fail at alloc_cpu.cpp:118] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to",
    ],
)
def test_exhausted_memory_of_other_devices_is_explained_too(configure, text):
    with pytest.raises(OutOfMemoryError, match="--train_batch_size 2"), explained_faults(configure()):
        raise RuntimeError(text)
    with pytest.raises(RuntimeError, match="shape"), explained_faults(configure()):
        raise RuntimeError("shape mismatch")


def test_loaded_adapters_keep_no_checkpoint_mapped(tmp_path):
    parameters = {f"layer{suffix}": torch.nn.Parameter(torch.ones(2, 2)) for suffix in (DOWN, UP)}
    optimizer = torch.optim.SGD(parameters.values())
    proxies = LoraProxies(parameters, optimizer, 2, RamStore(), {"layer": torch.nn.Identity()}, 1.0)
    proxies.residuals["layer"].maps = (torch.ones(1, 2), torch.ones(2, 1))
    proxies.load(tmp_path, proxies.save(tmp_path))
    file = tmp_path / "residual.safetensors"
    assert load_file(file)["layer|0"].tolist() == [[1, 1]]
    with file.open("rb+") as content:
        content.write(bytes(file.stat().st_size))
    assert [each.tolist() for each in proxies.residuals["layer"].maps] == [[[1, 1]], [[1], [1]]]
