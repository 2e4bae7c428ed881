"""TAA in a loop of others: a batch of augmented copies takes the place of the next one.

Either the loop gives a function that makes such a batch, or the dataset's own transform is used: RandAugment goes in
before the rest of it. A dataset that offers neither, or whose images are latents already, gets no TAA.
"""

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor

from sd_memguard.core.augmentation import NUM_OPERATIONS
from sd_memguard.core.seeding import Address, derive_seed

TRANSFORMS = ("transform", "image_transforms", "train_transforms")
"""Names under which datasets keep a torchvision `Compose`."""

AugmentFunction = Callable[[list[int], int], Any]
"""Makes a batch like the dataloader's of the augmented copies of samples, at a magnitude of RandAugment (of 30)."""


class Augmenter(Protocol):
    """Makes batches of augmented copies."""

    def __call__(self, sample_ids: list[int], magnitude: int, address: Address) -> Any:
        """Return a batch like the dataloader's, for an address."""


class GivenAugmenter:
    """The function that the loop has given.

    Args:
        function: see `AugmentFunction`.
        seed: seed of the run.
    """

    def __init__(self, function: AugmentFunction, seed: int) -> None:
        self.function, self.seed = function, seed

    def __call__(self, sample_ids: list[int], magnitude: int, address: Address) -> Any:
        """Return a batch of the function's."""
        with seeded(derive_seed(self.seed, "augment", *address)):
            return self.function(sample_ids, magnitude)


class TransformAugmenter:
    """The dataset's own transform with RandAugment in front.

    Args:
        dataset: the dataset of the loop.
        collate: makes a batch of its rows.
        seed: seed of the run.
    """

    def __init__(self, dataset: Any, collate: Callable[[list[Any]], Any], seed: int) -> None:
        self.dataset, self.collate, self.seed = dataset, collate, seed

    def __call__(self, sample_ids: list[int], magnitude: int, address: Address) -> Any:
        """Return a batch; every sample has random numbers of its own."""
        from torchvision.transforms import RandAugment

        randaugment = RandAugment(num_ops=NUM_OPERATIONS, magnitude=magnitude)
        rows = []
        for slot, sample_id in enumerate(sample_ids):
            with seeded(derive_seed(self.seed, "augment", *address, slot)):
                rows.append(self.row(sample_id, randaugment))
        return self.collate(rows)

    def row(self, sample_id: int, change: Callable[[Any], Any]) -> Any:
        """Return a row of the dataset whose images are changed before the transform sees them."""
        if _is_huggingface(self.dataset):
            return _huggingface_row(self.dataset, sample_id, change)
        with _put_in(_compose_of(self.dataset), change):
            return self.dataset[sample_id]


def find_augmenter(
    dataset: Any, collate: Callable[[list[Any]], Any], function: AugmentFunction | None, seed: int
) -> Augmenter | str:
    """Return what augments in this loop, or why nothing can."""
    if function is not None:
        return GivenAugmenter(function, seed)
    if not _is_huggingface(dataset) and _compose_of(dataset) is None:
        return "the dataset has no transform of torchvision's or of `datasets` that RandAugment could go into"
    augmenter = TransformAugmenter(dataset, collate, seed)
    try:
        plain, inverted = (_look(augmenter, change) for change in (_keep, _invert))
    except _SeveralInputsError:
        return (
            "the dataset's transform is given several images at once (a mask), which RandAugment would not move alike"
        )
    if any(len(value) > 1 for value in plain):
        return "a row of the dataset holds several images (class images), which would all be augmented"
    if all(torch.equal(a, b) for a, b in zip(plain, inverted, strict=True)):
        return "the images of the dataset were prepared before training, so that its transform changes nothing"
    return augmenter


def _look(augmenter: TransformAugmenter, change: Callable[[Any], Any]) -> list[Tensor]:
    """Return the images of the first sample under a change, always with the same random numbers."""
    with seeded(0):
        return _images(augmenter.collate([augmenter.row(0, change)]))


class _SeveralInputsError(Exception):
    """A transform of torchvision's v2 was called with more than one image."""


def _keep(*images: Any) -> Any:
    if len(images) > 1:
        raise _SeveralInputsError
    return images[0]


def _invert(image: Any) -> Any:
    return image.point(lambda value: 255 - value)


def _images(batch: Any) -> list[Tensor]:
    """Return the tensors of a batch that look like images or latents, (B, C, H, W)."""
    values = batch.values() if hasattr(batch, "values") else []
    return [value for value in values if isinstance(value, Tensor) and value.dim() == 4]


def _is_huggingface(dataset: Any) -> bool:
    """Say whether this is a dataset of `datasets` with a transform that makes its rows."""
    form = getattr(dataset, "format", None)
    return isinstance(form, dict) and form.get("type") == "custom" and "transform" in form.get("format_kwargs", {})


def _huggingface_row(dataset: Any, sample_id: int, augment: Callable[[Any], Any]) -> Any:
    raw = dataset.with_format(None)[sample_id]
    augmented = {
        name: [augment(value.convert("RGB"))] if hasattr(value, "convert") and hasattr(value, "size") else [value]
        for name, value in raw.items()
    }
    rows = dataset.format["format_kwargs"]["transform"](augmented)
    return {name: values[0] for name, values in rows.items()}


def _compose_of(dataset: Any) -> Any:
    """Return the torchvision `Compose` that a dataset applies to its images, None where there is none."""
    for name in TRANSFORMS:
        compose = getattr(dataset, name, None)
        if type(compose).__module__.startswith("torchvision.") and hasattr(compose, "transforms"):
            return compose
    return None


@contextmanager
def _put_in(compose: Any, augment: Callable[[Any], Any]) -> Iterator[None]:
    """Put RandAugment in a `Compose` for a while: after the resizing it begins with, before crop and flip."""
    steps = compose.transforms
    position = 1 if steps and type(steps[0]).__name__ == "Resize" else 0
    compose.transforms = [*steps[:position], augment, *steps[position:]]
    try:
        yield
    finally:
        compose.transforms = steps


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed the global generators of torch (CPU) and Python for a while and put them back."""
    state = random.getstate()
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # `torch.manual_seed` would seed the GPUs too, for good
        random.seed(seed)
        try:
            yield
        finally:
            random.setstate(state)
