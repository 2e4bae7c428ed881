"""The caches on disk: exact, shared by runs, and never stale, mixed up or damaged without notice."""

import copy
import json
import logging
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from sd_memguard.config import ConfigError
from sd_memguard.core.sampler import SampleRef
from sd_memguard.data import encoding_cache
from sd_memguard.data.batches import BatchSource
from sd_memguard.data.captions import Captions
from sd_memguard.data.encoding_cache import CacheError, CacheSpec, cache_folder, choose_place
from sd_memguard.data.encoding_store import EncodingStore
from sd_memguard.data.transforms import NUM_AFFINE_VARIANTS
from sd_memguard.models.encoders import Encoders, fingerprint
from sd_memguard.models.pipeline import load_models
from sd_memguard.training.plan import make_plan

DISK = {"cache_latents": "disk", "cache_text_embeddings": "disk"}
OFF = {"cache_latents": "off", "cache_text_embeddings": "off"}


@pytest.fixture
def work(monkeypatch):
    """Count the images and captions that go through the networks, filled up batches counted in full."""
    counted = {"moments": 0, "embeddings": 0}
    for name in counted:
        compute = getattr(Encoders, name)

        def count(self, batch, name=name, compute=compute):
            counted[name] += len(batch)
            return compute(self, batch)

        monkeypatch.setattr(Encoders, name, count)

    def take():
        done = dict(counted)
        counted.update(dict.fromkeys(counted, 0))
        return done

    return take


@pytest.fixture(scope="module")
def loaded():
    """Return a function that loads a pipeline once."""
    models = {}

    def load(plan):
        if plan.pipeline not in models:
            models[plan.pipeline] = load_models(plan.pipeline, plan.config)
        return models[plan.pipeline]

    return load


@pytest.fixture
def make_source(configure, loaded, tmp_path):
    def make(dtype=torch.float32, **settings) -> BatchSource:
        settings = {"encoding_cache_dir": str(tmp_path / "cache"), **settings}
        plan = make_plan(configure(**settings))
        models = loaded(plan) if dtype == torch.float32 else copy.deepcopy(loaded(plan))  # which is cast
        encoders = Encoders(models, torch.device("cpu"), dtype)
        return BatchSource(plan.samples, encoders, plan.config, plan.seed)

    return make


@pytest.fixture
def own_images(images, tmp_path):
    return Path(shutil.copytree(images, tmp_path / "own"))


def all_batches(source):
    ids = source.samples.sample_ids.tolist()[:24]
    visits = [[SampleRef(sample_id, 0, epoch_index) for sample_id in ids] for epoch_index in range(2)]
    return [batch for _, batch in source.batches(visits)]


def assert_same(source, other, **tolerance):
    for one, another in zip(all_batches(source), all_batches(other), strict=True):
        torch.testing.assert_close(one, another, **(tolerance or {"rtol": 0, "atol": 0}))


def files(tmp_path, kind="latents"):
    return sorted((tmp_path / "cache").glob(f"{kind}-*/*.safetensors"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_disk_memory_and_no_cache_give_the_same(make_source, dtype):
    settings = {"random_flip": True, "caption_dropout": 0.3, "dtype": dtype}
    disk = make_source(**settings, **DISK)
    assert disk.caches_latents
    assert disk.caches_embeddings
    assert_same(disk, make_source(**settings, cache_latents="memory", cache_text_embeddings="memory"))
    error = 1e-5 if dtype == torch.float32 else 0.05
    assert_same(disk, make_source(**settings, **OFF), rtol=0, atol=error)


def test_a_later_run_computes_only_what_is_missing(make_source, own_images, work):
    first = make_source(**DISK, max_train_samples=10)
    assert work() == {"moments": 64, "embeddings": 64}
    assert all(make_source(**DISK, max_train_samples=10).samples.sample_ids == first.samples.sample_ids)
    assert work() == {"moments": 0, "embeddings": 0}
    make_source(**DISK, train_data_dir=str(own_images), max_train_samples=10)  # elsewhere, the same content
    assert work() == {"moments": 0, "embeddings": 0}
    whole = make_source(**DISK)
    assert work() == {"moments": 64, "embeddings": 64}
    rows = sum(len(load_file(file)["keys"]) for file in files(Path(whole.config.encoding_cache_dir).parent))
    assert rows == 24
    assert_same(whole, make_source(cache_latents="memory", cache_text_embeddings="memory"))


@pytest.mark.parametrize("place", ["memory", "disk"])
def test_copies_of_a_image_are_encoded_once(make_source, own_images, work, place):
    for number in range(1, 24):
        shutil.copy(own_images / "secret-00.png", own_images / f"secret-{number:02}.png")
    Image.effect_noise((32, 32), 80).convert("RGB").save(own_images / "secret-05.png")
    settings = {"train_data_dir": str(own_images), "random_affine": 0.05, "num_shards": 1}
    settings["cache_text_embeddings"] = "off"
    source = make_source(cache_latents=place, **settings)
    assert work()["moments"] == NUM_AFFINE_VARIANTS * 64  # one batch of two images, filled up
    assert_same(source, make_source(**settings, cache_latents="off"), rtol=0, atol=1e-5)


def test_what_is_kept_does_not_depend_on_what_was_missing(make_source, tmp_path):
    make_source(**DISK, max_train_samples=7)
    grown = make_source(**DISK)
    at_once = make_source(**DISK, encoding_cache_dir=str(tmp_path / "other"))
    assert_same(grown, at_once)


def test_a_changed_image_under_the_same_name_is_encoded_anew(make_source, own_images, work):
    settings = {**DISK, "train_data_dir": str(own_images)}
    before = make_source(**settings)
    work()
    Image.effect_noise((32, 32), 80).convert("RGB").save(own_images / "secret-05.png")
    after = make_source(**settings)
    assert work()["moments"] == 64
    assert_same(after, make_source(**{**settings, **OFF}), rtol=0, atol=1e-5)
    old, new = (all_batches(source)[0].latents for source in (before, after))
    assert [i for i in range(24) if not torch.equal(old[i], new[i])] == [5]


def test_swapped_images_bring_their_latents_along(make_source, own_images, work):
    settings = {**DISK, "train_data_dir": str(own_images)}
    make_source(**settings)
    work()
    one, other, aside = (own_images / name for name in ("secret-03.png", "secret-04.png", "aside"))
    one.rename(aside)
    other.rename(one)
    aside.rename(other)
    swapped = make_source(**settings)
    assert work()["moments"] == 0
    assert_same(swapped, make_source(**{**settings, **OFF}), rtol=0, atol=1e-5)


def test_changed_captions_are_embedded_anew(make_source, own_images, work):
    settings = {**DISK, "train_data_dir": str(own_images)}
    make_source(**settings)
    work()
    metadata = own_images / "metadata.jsonl"
    metadata.write_text(metadata.read_text().replace("image 7 of", "portrait 7 of"))
    changed = make_source(**settings)
    assert work() == {"moments": 0, "embeddings": 64}
    assert_same(changed, make_source(**{**settings, **OFF}), rtol=0, atol=1e-5)


def reweighted(pipeline, folder, part):
    """Copy the pipeline with one weight of a part changed."""
    shutil.copytree(pipeline, folder)
    (file,) = (folder / part).glob("*.safetensors")
    tensors = load_file(file)
    name = next(name for name in sorted(tensors) if name.endswith("weight"))
    tensors[name].view(-1)[0] += 0.5
    save_file(tensors, file, metadata={"format": "pt"})
    return str(folder)


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("moments", {"resolution": 24}),
        ("moments", {"image_interpolation_mode": "nearest"}),
        ("moments", {"dtype": torch.bfloat16}),
        ("moments", {"pretrained": "vae"}),
        ("embeddings", {"pretrained": "text_encoder"}),
        ("embeddings", {"dtype": torch.bfloat16}),
    ],
)
def test_nothing_is_shared_between_models_and_preprocessings(make_source, pipeline, tmp_path, work, kind, changes):
    make_source(**DISK)
    work()
    if "pretrained" in changes:
        changes = {"pretrained_model_name_or_path": reweighted(pipeline, tmp_path / "other", changes["pretrained"])}
    other = make_source(**DISK, **changes)
    assert work()[kind] == 64
    error = 0.05 if "dtype" in changes else 1e-5
    assert_same(other, make_source(**OFF, **changes), rtol=0, atol=error)


def test_mirrored_images_are_added_to_those_that_are_there(make_source, work, tmp_path):
    make_source(**DISK)
    before = files(tmp_path)
    flipped = make_source(**DISK, random_flip=True)
    assert set(before) < set(files(tmp_path))
    assert_same(flipped, make_source(**OFF, random_flip=True), rtol=0, atol=1e-5)


def test_moved_images_are_kept_by_their_content_and_by_how_far_they_move(make_source, own_images, work, tmp_path):
    make_source(**DISK)
    before = files(tmp_path)
    moved = make_source(**DISK, random_affine=0.05, seed=1)
    assert set(before) < set(files(tmp_path))
    assert_same(moved, make_source(**OFF, random_affine=0.05, seed=1), rtol=0, atol=1e-5)
    work()
    make_source(**DISK, random_affine=0.05, seed=2, train_data_dir=str(own_images))
    assert work()["moments"] == 0
    further = make_source(**DISK, random_affine=0.1, seed=1)
    assert work()["moments"] == NUM_AFFINE_VARIANTS * 64
    assert_same(further, make_source(**OFF, random_affine=0.1, seed=1), rtol=0, atol=1e-5)


def test_the_tokenizer_counts(make_source, pipeline, tmp_path, work):
    make_source(**DISK)
    work()
    shutil.copytree(pipeline, tmp_path / "other")
    file = tmp_path / "other/tokenizer/tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "model_max_length": 12}))
    other = make_source(**DISK, pretrained_model_name_or_path=str(tmp_path / "other"))
    assert work()["embeddings"] == 64
    assert all_batches(other)[0].condition.embeddings.shape[1] == 12


def test_a_fingerprint_is_of_weights_and_config(configure, pipeline, tmp_path):
    first, again = (load_models(pipeline, configure()) for _ in range(2))
    other = load_models(Path(reweighted(pipeline, tmp_path / "other", "vae")), configure())
    assert fingerprint(first.vae) == fingerprint(again.vae) != fingerprint(other.vae)
    assert fingerprint(first.text.encoders["text_encoder"]) == fingerprint(again.text.encoders["text_encoder"])
    again.vae.register_to_config(scaling_factor=1.0)
    assert fingerprint(again.vae) != fingerprint(first.vae)


# Damage.


def spoil(file, how):
    content = bytearray(file.read_bytes())
    if how == "truncated":
        file.write_bytes(content[:-100])
    elif how == "flipped bit":
        content[-1000] ^= 1
        file.write_bytes(content)
    elif how == "empty":
        file.write_bytes(b"")
    elif how == "swapped rows":
        tensors = load_file(file)
        keys = tensors["keys"].flip(0).contiguous()
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        save_file({**tensors, "keys": keys}, file, header["__metadata__"])
    else:
        file.write_bytes(b"no tensors in here, but text of some length")


@pytest.mark.parametrize("how", ["truncated", "flipped bit", "empty", "swapped rows", "other"])
def test_a_damaged_file_is_named_and_made_anew(make_source, tmp_path, work, caplog, how):
    whole = make_source(**DISK)
    work()
    expected = [batch.latents.clone() for batch in all_batches(whole)]
    (file,) = files(tmp_path)
    spoil(file, how)
    repaired = make_source(**DISK)
    assert work() == {"moments": 64, "embeddings": 0}
    assert f"{file} is not used" in caplog.text
    assert all(torch.equal(b.latents, e) for b, e in zip(all_batches(repaired), expected, strict=True))
    make_source(**DISK)
    assert work()["moments"] == 0


def test_a_file_in_the_folder_of_another_model_is_not_used(make_source, pipeline, tmp_path, work, caplog):
    make_source(**DISK)
    (file,) = files(tmp_path)
    settings = {**DISK, "pretrained_model_name_or_path": reweighted(pipeline, tmp_path / "other", "vae")}
    make_source(**settings)
    (added,) = set(files(tmp_path)) - {file}
    work()
    shutil.copyfile(file, added)
    other = make_source(**settings)
    assert work()["moments"] == 64
    assert "made in another way" in caplog.text
    assert_same(other, make_source(**{**settings, **OFF}), rtol=0, atol=1e-5)


def test_two_runs_at_once(make_source, configure, loaded, tmp_path):
    settings = {"encoding_cache_dir": str(tmp_path / "cache"), "train_data_dir": "bundled", "max_train_samples": 300}
    plans = [make_plan(configure(**settings, **DISK, output=name)) for name in ("a", "b")]
    models = [copy.deepcopy(loaded(plan)) for plan in plans]
    barrier = threading.Barrier(2)

    def run(number):
        encoders = Encoders(models[number], torch.device("cpu"), torch.float32)
        barrier.wait()
        return BatchSource(plans[number].samples, encoders, plans[number].config, 7)

    with ThreadPoolExecutor(2) as pool:
        one, other = pool.map(run, range(2))
    assert_same(one, other)
    assert not list((tmp_path / "cache").rglob("writing-*"))
    assert_same(one, make_source(**settings, **OFF), rtol=0, atol=1e-5)


# Where it goes.


def test_auto_takes_memory_then_disk_then_nothing(configure, monkeypatch, tmp_path):
    config = configure(encoding_cache_dir=str(tmp_path / "not/there/yet"))
    need = CacheSpec("cache_latents", 1000, 1000 * 8 * 64 * 64, torch.float32)
    assert need.size == 1000 * 8 * 64 * 64 * 4
    free = shutil.disk_usage(tmp_path)
    assert choose_place(need, config) == "memory"
    monkeypatch.setattr(encoding_cache, "MEMORY_SHARE", 0)
    assert choose_place(need, config) == "disk"
    monkeypatch.setattr(encoding_cache.shutil, "disk_usage", lambda _: free._replace(free=need.size))
    assert choose_place(need, config) == "off"
    assert choose_place(need, configure(cache_latents="disk")) == "disk"
    assert choose_place(need, configure(cache_latents="off")) == "off"
    monkeypatch.setattr(encoding_cache.shutil, "disk_usage", lambda _: free._replace(free=need.size - 1))
    with pytest.raises(CacheError, match="--encoding_cache_dir"):
        choose_place(need, configure(cache_latents="disk"))


def test_a_folder_that_cannot_be_used_is_named(make_source, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(CacheError, match=r"`--cache_latents` cannot use .*file.*--encoding_cache_dir"):
        make_source(**DISK, encoding_cache_dir=None)


def test_the_folder_is_the_users_cache_unless_set(configure, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder(configure()) == tmp_path / "sd_memguard"
    assert cache_folder(configure(encoding_cache_dir="mine")) == Path("mine")


def test_a_disk_cache_that_would_not_be_exact_is_refused(configure, wide_images):
    with pytest.raises(ConfigError, match="center_crop"):
        make_plan(configure(train_data_dir=str(wide_images), cache_latents="disk"))


def test_only_the_owner_can_look(make_source, tmp_path):
    make_source(**DISK)
    assert {path.stat().st_mode & 0o077 for path in (tmp_path / "cache").iterdir()} == {0}


# Its parts.


def test_no_rows_can_be_read(tmp_path):
    store = EncodingStore(tmp_path, "rows", {}, (2, 3), torch.float32)
    assert store.read(np.array([], dtype=np.int64)).shape == (0, 2, 3)


def test_keys_that_end_in_zeros_are_found(tmp_path):
    store = EncodingStore(tmp_path, "rows", {}, (2,), torch.float32)
    keys = np.array([bytes([7] * size) + bytes(16 - size) for size in range(17)], "S16")
    values = torch.arange(34.0).view(17, 2)
    store.add(keys.tolist()[:9], values[:9])
    store.flush()
    store.add(keys.tolist()[9:], values[9:])
    store.flush()
    assert torch.equal(store.read(store.find(keys)), values)
    again = EncodingStore(tmp_path, "rows", {}, (2,), torch.float32)
    order = np.array([16, 0, 8, 9, 3])
    assert torch.equal(again.read(again.find(keys[order])), values[order])
    assert again.find(np.array([bytes([8] * 16)], "S16")).tolist() == [-1]


def test_captions_are_those_of_the_samples(configure, images):
    plan = make_plan(configure(max_train_samples=13))
    samples = plan.samples
    captions = Captions(samples, plan.config, 1)
    drawn = {
        sample_id: {captions.text(captions(sample_id, (0, visit, sample_id))) for visit in range(40)}
        for sample_id in samples.sample_ids.tolist()
    }
    assert drawn == {sample_id: set(samples.captions(sample_id)) for sample_id in drawn}
    assert all(captions.text(captions.first(i)) == samples.captions(i)[0] for i in drawn)
    silent = Captions(samples, configure(caption_dropout=1.0), 1)
    assert silent.text(silent(int(samples.sample_ids[0]), (0, 0, 0))) == ""


def test_a_released_network_leaves_and_one_that_is_needed_stays(make_source, monkeypatch):
    encoders = make_source(**OFF).encoders
    moved = []
    monkeypatch.setattr(encoders.vae, "to", lambda device: moved.append(("vae", device)))
    (text_encoder,) = encoders.text.encoders.values()
    monkeypatch.setattr(text_encoder, "to", lambda device: moved.append(("text_encoder", device)))
    encoders.release(vae=False, text_encoders=True)
    assert moved == [("text_encoder", "cpu")]
    encoders.release(vae=True, text_encoders=False)
    assert moved == [("text_encoder", "cpu"), ("vae", "cpu")]


def test_runs_share_a_cache(run, tmp_path, work, caplog):
    settings = {**DISK, "encoding_cache_dir": str(tmp_path / "cache"), "max_train_steps": 6, "skip_threshold": 0.0}
    with caplog.at_level(logging.INFO, "sd_memguard"):
        first = run("first", **settings)
        assert work() == {"moments": 64, "embeddings": 64}
        second = run("second", **settings)
    assert work() == {"moments": 0, "embeddings": 0}
    name = "unet/diffusion_pytorch_model.safetensors"
    assert (first.output_dir / name).read_bytes() == (second.output_dir / name).read_bytes()
    assert "0 computed, the others found in" in caplog.text
