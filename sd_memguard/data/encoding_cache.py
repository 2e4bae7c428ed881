"""What the frozen networks make of images and captions, computed once: in memory, or in a folder that runs share.

A latent is exact to keep when the crop is the same every time: with `--center_crop`, or where all images have the
shape that they are trained in. Otherwise a sample has another crop each time, and the VAE runs every time: a few kept
crops would be seen again and again, which is what the guard is there to prevent. Mean and log variance are kept, so
that the latent itself is sampled again each time. Where images are flipped or moved, every view of each image is kept.

Every batch that goes through a network here has the same size, the last one too, so that what is kept depends on the
image or caption alone, not on what else was missing.
"""

import importlib.metadata
import logging
import math
import os
import shutil
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError
from torch import Tensor
from tqdm import tqdm

from sd_memguard.config import ConfigError, TrainConfig
from sd_memguard.data.captions import Captions
from sd_memguard.data.encoding_store import MISSING, EncodingStore
from sd_memguard.data.samples import SampleError
from sd_memguard.data.target_sizes import TargetSizes
from sd_memguard.data.transforms import Preprocess, View
from sd_memguard.distributed import ProcessGroup
from sd_memguard.errors import UserError
from sd_memguard.files import gigabytes, nearest_folder, user_cache_folder
from sd_memguard.host_memory import available_memory
from sd_memguard.models.encoders import Encoders, fingerprint, tokenizer_fingerprint

logger = logging.getLogger(__name__)

MEMORY_SHARE = 0.25
"""Share of the free host memory that each cache may take under ``auto``."""
DISK_SHARE = 0.5
"""Share of the free disk that each cache may take under ``auto``."""
CHANGED = "images were changed while they were read; start again when nothing writes to them"
CAPTIONS_AT_ONCE = 64
PIXELS_AT_ONCE = 2**21
"""Of the images that the VAE encodes at once, at most 64 of them: 8 of 512 pixels."""
VERSIONED = ("torch", "torchvision", "diffusers", "transformers", "pillow")

Rows = npt.NDArray[np.int64]


class CacheError(UserError):
    """The folder of the cache cannot be used."""


class Cache(Protocol):
    """Rows by number."""

    def read(self, rows: Rows) -> Tensor:
        """Return rows, (B, ...), on the CPU."""


class MemoryCache:
    """Rows in memory, in the precision of the network.

    Args:
        rows: (M, ...), equal ones once.
        place: (N,) where each row is among them.
    """

    def __init__(self, rows: Tensor, place: Rows) -> None:
        self.rows, self.place = rows, place

    def read(self, rows: Rows) -> Tensor:
        """Return rows, (B, ...)."""
        return self.rows[torch.from_numpy(self.place[rows])]


class DiskCache:
    """Rows in a store, found by the keys of what they were made of.

    Args:
        store: holds them all.
        place: (N,) where each row is in the store.
    """

    def __init__(self, store: EncodingStore, place: Rows) -> None:
        self.store, self.place = store, place

    def read(self, rows: Rows) -> Tensor:
        """Return rows, (B, ...)."""
        return self.store.read(self.place[rows])


class CacheSpec(NamedTuple):
    """A cache that is to be made: the setting that asks for it, its rows, the numbers in all of them, their precision.

    ``num_reads`` says how often a row will be read in all, where that is known.
    """

    setting: Literal["cache_latents", "cache_text_embeddings"]
    num_rows: int
    num_values: int
    dtype: torch.dtype
    num_reads: int | None = None

    @property
    def size(self) -> int:
        """Bytes of all rows."""
        return self.num_values * self.dtype.itemsize


def latents_are_exact(targets: TargetSizes, config: TrainConfig) -> bool:
    """Say whether an image is cropped the same way every time."""
    return config.center_crop or targets.need_no_crop


def refuse_inexact_cache(targets: TargetSizes, config: TrainConfig) -> None:
    """Refuse to keep latents that would not be exact.

    Raises:
        ConfigError: names the way out.
    """
    if config.cache_latents in {"memory", "disk"} and not latents_are_exact(targets, config):
        shape = "images of the shapes of their buckets" if config.enable_bucket else "square images"
        raise ConfigError(
            f"`--cache_latents {config.cache_latents}` needs `--center_crop` (or {shape}): with random crops "
            "an image has another latent each time; add `--center_crop`, or use `--cache_latents off`"
        )


def cache_folder(config: TrainConfig) -> Path:
    """Return the folder of the caches on disk: as set, else in the user's folder for caches."""
    if config.encoding_cache_dir is not None:
        return Path(config.encoding_cache_dir)
    return user_cache_folder()


def choose_place_together(
    need: CacheSpec, config: TrainConfig, exchange: ProcessGroup
) -> Literal["memory", "disk", "off"]:
    """Return where a cache goes in all processes: where the main one has room for it.

    Raises:
        CacheError: see ``choose_place``.
    """
    with exchange.raise_on_any_rank():
        place = choose_place(need, config)
    shared: Literal["memory", "disk", "off"] = exchange.broadcast_object(place, "cache")
    return shared


def own_part(rows: Rows, exchange: ProcessGroup) -> Rows:
    """Return what this process computes for the disk: the processes of a machine, which share it, divide the work."""
    if exchange.size == 1:
        return rows
    return rows[int(os.environ.get("LOCAL_RANK", "0")) :: processes_here()]


def processes_here() -> int:
    """Return the number of processes of the run on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def choose_place(need: CacheSpec, config: TrainConfig) -> Literal["memory", "disk", "off"]:
    """Return where a cache goes; ``auto`` takes memory while it suffices, for each process its own, then the disk.

    Where more would be computed for it than without it, every row counted though equal ones are computed once, ``auto``
    takes none.

    Raises:
        CacheError: ``disk`` was asked for and has no room.
    """
    mode: Literal["auto", "memory", "disk", "off"] = getattr(config, need.setting)
    if mode in {"memory", "off"}:
        return mode
    if mode == "auto" and need.num_reads is not None and need.num_reads < need.num_rows:
        return "off"
    if mode == "auto" and need.size * processes_here() <= MEMORY_SHARE * available_memory():
        return "memory"
    folder = cache_folder(config)
    free = shutil.disk_usage(nearest_folder(folder)).free
    if mode == "auto":
        return "disk" if need.size <= DISK_SHARE * free else "off"
    if need.size > free:
        raise CacheError(
            f"`--{need.setting} disk` needs up to {gigabytes(need.size)} in {folder}, which has {gigabytes(free)} "
            f"free; name another folder by `--encoding_cache_dir`, or use `--{need.setting} off`"
        )
    return "disk"


def latent_caches(
    targets: TargetSizes,
    encoders: Encoders,
    preprocess: Sequence[Preprocess],
    config: TrainConfig,
    exchange: ProcessGroup,
    *,
    num_samples_seen: int | None,
    progress: bool,
) -> list[list[Cache]]:
    """Return the moments of the images of each bucket in each of the views of ``preprocess``; empty without cache.

    The rows of each are those of ``TargetSizes.members``. All processes call it together.

    Args:
        targets: the images and their buckets.
        encoders: the frozen networks.
        preprocess: that of each bucket.
        config: where caches go.
        exchange: the processes.
        num_samples_seen: of the whole run, where known.
        progress: whether to show a bar.
    """
    if not latents_are_exact(targets, config):
        return []
    channels, factor = encoders.moments_shape
    shapes = [(channels, size.height // factor, size.width // factor) for size in targets.sizes]
    num_rows = [len(one.views) * count for one, count in zip(preprocess, targets.counts, strict=True)]
    num_values = sum(count * math.prod(shape) for count, shape in zip(num_rows, shapes, strict=True))
    need = CacheSpec("cache_latents", sum(num_rows), num_values, encoders.vae_dtype, num_samples_seen)
    place = choose_place_together(need, config, exchange)
    if place == "off":
        return []
    keys = targets.samples.content_keys()
    filled = [
        _BucketImages(targets, bucket, keys, encoders, one, shape, progress)
        for bucket, (one, shape) in enumerate(zip(preprocess, shapes, strict=True))
    ]
    if place == "memory":
        return [bucket.in_memory() for bucket in filled]
    return [bucket.on_disk(config, exchange) for bucket in filled]


class _BucketImages:
    """The images of a bucket, to be encoded in all views.

    Args:
        targets: the images and their buckets.
        bucket: which one.
        keys: hashes of the files of all usable samples.
        encoders: the frozen networks.
        preprocess: that of the bucket.
        shape: of the moments of an image.
        progress: whether to show a bar.
    """

    def __init__(
        self,
        targets: TargetSizes,
        bucket: int,
        keys: npt.NDArray[np.bytes_],
        encoders: Encoders,
        preprocess: Preprocess,
        shape: tuple[int, ...],
        progress: bool,
    ) -> None:
        self.samples, self.sample_ids, self.size = targets.samples, targets.members[bucket], targets.sizes[bucket]
        self.keys = keys[np.searchsorted(self.samples.sample_ids, self.sample_ids)]
        self.encoders, self.preprocess, self.shape, self.progress = encoders, preprocess, shape, progress
        self.batch = max(1, min(64, PIXELS_AT_ONCE // (self.size.width * self.size.height)))

    def in_memory(self) -> list[Cache]:
        """Return the moments in each view, in memory."""
        _, first, slots = np.unique(self.keys, return_index=True, return_inverse=True)
        views = self.preprocess.views
        rows = torch.empty(len(views), len(first), *self.shape, dtype=self.encoders.vae_dtype)
        for positions, read_keys, moments in self._encoded(np.sort(first)):
            if (self.keys[positions] != np.array(read_keys, self.keys.dtype)).any():
                raise SampleError(CHANGED)
            rows[:, torch.from_numpy(slots[positions])] = torch.stack(moments)
        return [MemoryCache(one, slots) for one in rows]

    def on_disk(self, config: TrainConfig, exchange: ProcessGroup) -> list[Cache]:
        """Return the moments in each view, on disk; all processes call it together."""
        context = {
            "vae": fingerprint(self.encoders.vae),
            "size": list(self.size),
            "interpolation": config.image_interpolation_mode,
            "crop": "center",
            **_circumstances(self.encoders, self.batch),
        }
        keys = self.keys.copy()
        with exchange.raise_on_any_rank(), _named_faults("cache_latents", config):
            folder, dtype = cache_folder(config), self.encoders.vae_dtype
            stores = [
                EncodingStore(folder, "latents", {**context, **_view_context(view, config)}, self.shape, dtype)
                for view in self.preprocess.views
            ]
            missing = np.any([store.find(keys) == MISSING for store in stores], axis=0)
            _, first = np.unique(keys, return_index=True)
            todo = own_part(np.sort(first[missing[first]]), exchange)
            for positions, read_keys, moments in self._encoded(todo):
                keys[positions] = read_keys  # of the very bytes that were encoded
                for store, rows in zip(stores, moments, strict=True):
                    store.add(read_keys, rows)
            for store in stores:
                store.flush()
        with _named_faults("cache_latents", config):
            return [_found(store, keys, len(todo), "latents", exchange) for store in stores]

    def _encoded(self, positions: Rows) -> Iterator[tuple[Rows, list[bytes], list[Tensor]]]:
        """Yield positions among the images, the hashes of their files, and the moments in each view, batch by batch."""
        for chunk, keys, pixels in self._read(positions):
            yield chunk, keys, [_in_full(self.encoders.moments, one, self.batch) for one in pixels]

    def _read(self, positions: Rows) -> Iterator[tuple[Rows, list[bytes], list[Tensor]]]:
        """Yield the images at positions in batches, read in threads and a batch ahead.

        Yields:
            Positions (B,), the hashes of the files, and for each view the images (B, 3, height, width).
        """

        def read(position: int) -> tuple[bytes, list[Tensor]]:
            key, image = self.samples.keyed_image(int(self.sample_ids[position]))
            return key, [self.preprocess.centered(image, key, view) for view in self.preprocess.views]

        chunks = np.split(positions, range(self.batch, len(positions), self.batch)) if len(positions) else []
        bar = tqdm(total=len(positions), desc=f"caching latents {self.size}", disable=not self.progress, leave=False)
        ahead: deque[tuple[Rows, Iterator[tuple[bytes, list[Tensor]]]]] = deque()
        with ThreadPoolExecutor() as pool, bar:
            for chunk in [*chunks, None, None]:
                if chunk is not None:
                    ahead.append((chunk, pool.map(read, chunk)))
                if ahead and (len(ahead) > 1 or chunk is None):
                    ready, results = ahead.popleft()
                    keys, pixels = zip(*results, strict=True)
                    yield ready, list(keys), [torch.stack(one) for one in zip(*pixels, strict=True)]
                    bar.update(len(ready))


def embedding_cache(
    captions: Captions, encoders: Encoders, config: TrainConfig, exchange: ProcessGroup, *, progress: bool
) -> Cache | None:
    """Return the embeddings of all captions by their numbers, None without cache. All processes call it together.

    There is none where captions are other texts each time they are seen.
    """
    if config.varies_tags:
        return None
    num_rows, shape = len(captions.texts), encoders.embedding_shape
    need = CacheSpec("cache_text_embeddings", num_rows, num_rows * math.prod(shape), encoders.dtype)
    place = choose_place_together(need, config, exchange)
    if place == "off":
        return None
    if place == "memory":
        rows = torch.empty(num_rows, *shape, dtype=need.dtype)
        for numbers, embedded in _embed(captions, np.arange(num_rows), encoders, progress):
            rows[torch.from_numpy(numbers)] = embedded
        return MemoryCache(rows, np.arange(num_rows))
    context = {
        **{part: fingerprint(network) for part, network in encoders.text.encoders.items()},
        **{
            encoders.kind.tokenizers[part]: tokenizer_fingerprint(tokenizer)
            for part, tokenizer in encoders.text.tokenizers.items()
        },
        **_circumstances(encoders, CAPTIONS_AT_ONCE),
    }

    with exchange.raise_on_any_rank(), _named_faults("cache_text_embeddings", config):
        store = EncodingStore(cache_folder(config), "captions", context, shape, need.dtype)
        keys = captions.keys()
        todo = own_part(np.flatnonzero(store.find(keys) == MISSING), exchange)
        for numbers, embedded in _embed(captions, todo, encoders, progress):
            store.add(keys[numbers].tolist(), embedded)
        store.flush()
    with _named_faults("cache_text_embeddings", config):
        return _found(store, keys, len(todo), "text embeddings", exchange)


def _view_context(view: View, config: TrainConfig) -> dict[str, object]:
    """Return what tells the latents of a view from those of others."""
    moved = {"random_affine": config.random_affine, "map": view.map} if config.random_affine else {}
    return {"flipped": view.flip, **moved}


def _circumstances(encoders: Encoders, batch: int) -> dict[str, object]:
    """Return what changes results by a rounding: device, batch and the versions of libraries."""
    return {
        "device": encoders.device.type,
        "tf32": bool(torch.backends.cuda.matmul.allow_tf32),
        "batch": batch,
        **{name: importlib.metadata.version(name) for name in VERSIONED},
    }


def _embed(captions: Captions, numbers: Rows, encoders: Encoders, progress: bool) -> Iterator[tuple[Rows, Tensor]]:
    starts = range(0, len(numbers), CAPTIONS_AT_ONCE)
    for start in tqdm(starts, desc="caching captions", disable=not progress, leave=False):
        chunk = numbers[start : start + CAPTIONS_AT_ONCE]
        texts = [captions.text(number) for number in chunk.tolist()]
        padded = texts + [""] * (CAPTIONS_AT_ONCE - len(texts))
        yield chunk, encoders.embeddings(padded)[: len(texts)].cpu()


def _in_full(encode: Callable[[Tensor], Tensor], pixels: Tensor, batch: int) -> Tensor:
    """Return what the network makes of a batch that is filled up to its usual size."""
    filled = torch.cat((pixels, pixels[-1:].expand(batch - len(pixels), *pixels.shape[1:])))
    return encode(filled)[: len(pixels)].cpu()


def _found(
    store: EncodingStore, keys: npt.NDArray[np.bytes_], num_computed: int, what: str, exchange: ProcessGroup
) -> DiskCache:
    if exchange.size > 1:
        store.refresh()
    place = store.find(keys)
    if (place == MISSING).any():
        raise SampleError(CHANGED)
    logger.info("%s: %d computed, the others found in %s", what, num_computed, store.folder)
    return DiskCache(store, place)


@contextmanager
def _named_faults(setting: str, config: TrainConfig) -> Iterator[None]:
    """Turn a folder that cannot be written, or is full, into an error that names the settings.

    Raises:
        CacheError: with the way out.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise CacheError(
            f"`--{setting}` cannot use {cache_folder(config)}: {error}; name another folder by "
            f"`--encoding_cache_dir`, or use `--{setting} off`"
        ) from error
