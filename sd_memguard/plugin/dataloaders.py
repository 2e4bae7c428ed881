"""Dataloaders that take the place of the loop's own: the same batches, with `sample_id` in those that are dicts.

`GuardedLoader` goes shard by shard and drives the rounds; `LabelledLoader`, for one shard, keeps the order and the
batches that the loop has chosen. Neither uses the global generator.
"""

from collections.abc import Callable, Iterator, MutableMapping
from typing import Any, NamedTuple

import torch
from torch.utils.data import DataLoader, Dataset

from sd_memguard.core.seeding import generator_for
from sd_memguard.ensemble import Ensemble
from sd_memguard.plugin.augment import Augmenter
from sd_memguard.plugin.backends import LoopBackend
from sd_memguard.plugin.loop_driver import LoopDriver

SAMPLE_ID = "sample_id"


class LabelledDataset(Dataset):
    """A dataset whose rows come with their number.

    Args:
        dataset: the dataset of the loop.
    """

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset
        if hasattr(dataset, "__getitems__"):  # a batch in one call; torch looks for the method, so it must not be faked
            self.__getitems__ = self._rows

    def __getattr__(self, name: str) -> Any:
        """Return the dataset's attribute."""
        if name == "dataset":  # while it is unpickled
            raise AttributeError(name)
        return getattr(self.dataset, name)

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.dataset)

    def __getitem__(self, sample_id: int) -> tuple[int, Any]:
        """Return a row's number and the row."""
        return sample_id, self.dataset[sample_id]

    def _rows(self, sample_ids: list[int]) -> list[tuple[int, Any]]:
        return list(zip(sample_ids, self.dataset.__getitems__(sample_ids), strict=True))


class LabelledBatch(NamedTuple):
    """A batch as the loop's own collate function makes it, and the numbers of its samples, which stay on the host."""

    batch: Any
    sample_ids: list[int]


class LabelledCollate:
    """Makes the loop's own batch of labelled rows, beside the labels.

    Args:
        collate: what makes a batch of rows.
    """

    def __init__(self, collate: Callable[[Any], Any]) -> None:
        self.collate = collate

    def __call__(self, rows: Any) -> LabelledBatch:
        """Return the labelled batch of a list of labelled rows, or of a single one where batches are not collated."""
        if isinstance(rows, tuple):
            sample_id, row = rows
            return LabelledBatch(self.collate(row), [sample_id])
        return LabelledBatch(self.collate([row for _, row in rows]), [sample_id for sample_id, _ in rows])


def label(batch: Any, sample_ids: list[int]) -> Any:
    """Put the sample ids in a batch that is a dict, as `sample_id`, (B,) int64, and return it."""
    if isinstance(batch, MutableMapping) and SAMPLE_ID not in batch:
        batch[SAMPLE_ID] = torch.tensor(sample_ids, dtype=torch.int64)
    return batch


def parts_of(loader: DataLoader) -> dict[str, Any]:
    """Return the arguments of a loader like this one over labelled rows, but for batch size and order."""
    parts: dict[str, Any] = {
        "dataset": LabelledDataset(loader.dataset),
        "collate_fn": LabelledCollate(loader.collate_fn),
        "num_workers": loader.num_workers,
        "pin_memory": loader.pin_memory,
        "timeout": loader.timeout,
        "worker_init_fn": loader.worker_init_fn,
        "multiprocessing_context": loader.multiprocessing_context,
    }
    if loader.num_workers > 0:
        parts["prefetch_factor"] = loader.prefetch_factor
    return parts


def labelled_loader(loader: DataLoader) -> DataLoader:
    """Return the same loader, in the loop's own order and from its own generator, with labelled batches."""
    parts = {**parts_of(loader), "generator": loader.generator, "persistent_workers": loader.persistent_workers}
    if loader.batch_sampler is None:
        return DataLoader(**parts, batch_size=None, sampler=loader.sampler)
    if loader.batch_size is None:
        return DataLoader(**parts, batch_sampler=loader.batch_sampler)
    return DataLoader(**parts, batch_size=loader.batch_size, sampler=loader.sampler, drop_last=loader.drop_last)


class WatchedLoader(DataLoader):
    """What both kinds share: they pass through a loader's attributes and tell the driver of every batch.

    Args:
        loader: the loop's loader, prepared by accelerate or not.
        driver: is told of each batch.
    """

    def __init__(self, loader: Any, driver: LoopDriver) -> None:
        # No call of the base class: it would make a second sampler; what a DataLoader knows is asked of the inner one.
        self.__dict__["inner"], self.__dict__["driver"] = loader, driver

    def __getattr__(self, name: str) -> Any:
        """Return the inner loader's attribute."""
        return getattr(self.__dict__["inner"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute here."""
        self.__dict__[name] = value

    def __len__(self) -> int:
        """Return the number of batches of an epoch, as before."""
        return len(self.inner)


class LabelledLoader(WatchedLoader):
    """The loop's own order; each batch is announced to the driver. The inner loader gives out labelled batches."""

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        """Iterate over one epoch."""
        try:
            for batch, sample_ids in self.inner:
                self.driver.advance_turn()
                self.driver.open_batch(sample_ids)
                yield label(batch, sample_ids)
            self.driver.on_epoch_end()
        finally:
            self.driver.on_loop_end()


class GuardedLoader(WatchedLoader):
    """Batches of one shard at a time, all of the full size, for as many batches as an epoch had before.

    An epoch that a checkpoint has interrupted is brought to its end first. With several worker processes, random
    transforms of the dataset use the workers' generators, which no checkpoint holds.

    Args:
        loader: the loop's loader.
        driver: of the loop.
        backend: of the loop.
        augmenter: makes batches of augmented copies, where that is possible.
    """

    def __init__(
        self, loader: DataLoader, driver: LoopDriver, backend: LoopBackend, augmenter: Augmenter | None
    ) -> None:
        super().__init__(loader, driver)
        self.backend, self.augmenter = backend, augmenter
        self.end_of_dataloader, self.remainder = False, -1
        self._batches: Iterator[Any] = iter(())
        self._turn: tuple[int, int, int] | None = None

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        """Iterate over one epoch, or over the rest of an interrupted one."""
        self.driver.advance_turn()
        self.driver.epoch_position %= len(self)
        self.end_of_dataloader = False
        self.backend.begin_epoch(self)
        try:
            while self.driver.epoch_position < len(self):
                batch = self._next()
                self.end_of_dataloader = self.driver.epoch_position == len(self)
                yield batch
            self.driver.on_epoch_end()
        finally:
            self.backend.end_epoch(self)
            self.driver.on_loop_end()

    def _next(self) -> Any:
        driver = self.driver
        driver.advance_turn()
        driver.epoch_position += 1
        augmented = self._augmented()
        if augmented is not None:
            return self.backend.place(augmented)
        if self._turn != driver.turn:
            self._turn, self._batches = driver.turn, iter(self._loader_of_turn())
        batch, sample_ids = next(self._batches)
        driver.take(next(self._ahead))
        return self.backend.place(label(batch, sample_ids))

    def _loader_of_turn(self) -> DataLoader:
        """Return a loader over the active shard; what its workers fetch ahead is dropped when the turn ends."""
        progress, guard = self.driver.ensemble.progress, self.driver.guard
        shard_index, size = guard.shard_index, self.inner.batch_size
        self._ahead = self.driver.ensemble.upcoming(size)
        address = (shard_index, progress.round_index, progress.global_step)
        return DataLoader(
            **parts_of(self.inner),
            batch_sampler=_Batches(self.driver.ensemble, size),
            generator=generator_for(guard.seed, "workers", *address),
        )

    def _augmented(self) -> Any:
        """Return a batch of augmented copies where enough samples of the active shard wait for one, else None."""
        driver = self.driver
        if self.augmenter is None or driver.ensemble.is_finished:
            return None
        waiting = driver.guard.take_augment_batch(self.inner.batch_size)
        if waiting is None:
            return None
        shard_index = driver.guard.shard_index
        address = (shard_index, driver.ensemble.progress.extra_steps[shard_index])
        batch = self.augmenter(waiting.sample_ids, waiting.magnitude, address)
        driver.open_batch(waiting.sample_ids, augmented=True)
        return label(batch, waiting.sample_ids)


class _Batches:
    """The sample ids of a turn's batches, without end: the loop decides when the turn is over."""

    def __init__(self, ensemble: Ensemble, size: int) -> None:
        self.ensemble, self.size = ensemble, size

    def __iter__(self) -> Iterator[list[int]]:
        return ([ref.sample_id for ref in refs] for refs in self.ensemble.upcoming(self.size))
