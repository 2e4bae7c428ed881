"""IET: the samples are split in disjoint shards, one for each proxy (arXiv 2407.15328, section 4.1)."""

import heapq
import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from sd_memguard.core.seeding import permutation

NO_SHARD = -1
EPOCHS_PER_SHARD = 200
"""Epochs over the images for each of which `auto` takes another shard: up to 160 one is measured to be best."""


@dataclass(frozen=True)
class ShardPlan:
    """Which shard each sample belongs to.

    Args:
        assignment: (num_samples,) int16, the shard of each sample id; -1 for a sample that is not trained on.
        num_shards: number of shards.
    """

    assignment: Tensor
    num_shards: int

    def members(self, shard_index: int) -> Tensor:
        """Return the sample ids of a shard, ascending, (size,) int64."""
        return torch.nonzero(self.assignment == shard_index).flatten()

    def sizes(self, groups: Tensor | None = None) -> list[int]:
        """Return the number of samples in each shard, or of groups of duplicates where these are given."""
        if groups is not None:
            return [len(torch.unique(groups[self.members(shard_index)])) for shard_index in range(self.num_shards)]
        placed = self.assignment[self.assignment != NO_SHARD].long()
        return torch.bincount(placed, minlength=self.num_shards).tolist()


class Moves(NamedTuple):
    """Samples that change shard, all (num_moves,) int64."""

    sample_ids: Tensor
    sources: Tensor
    targets: Tensor

    def counts(self) -> list[dict[str, int]]:
        """Return how many samples went from which shard to which."""
        pairs, counts = torch.unique(torch.stack((self.sources, self.targets)), dim=1, return_counts=True)
        return [
            {"source": source, "target": target, "count": count}
            for source, target, count in zip(*pairs.tolist(), counts.tolist(), strict=True)
        ]


def auto_num_shards(num_samples: int, epochs: float | None = None) -> int:
    """Return the default number of shards: one for each `EPOCHS_PER_SHARD` epochs, of 64 or more samples, at most 4.

    Each proxy takes a part of the steps, so an ensemble costs quality in a short training, where it has nothing to gain
    (docs/results.md). Smaller shards are memorized sooner (the time to memorize grows with their size, Bonnaire et al.
    2025).

    Args:
        num_samples: different images.
        epochs: over them, that one model would take; None, the default, where nobody knows: one shard.
    """
    most = min(max(num_samples // 64, 1), 4)
    return 1 if epochs is None else min(most, max(math.ceil(epochs / EPOCHS_PER_SHARD), 1))


def lowest_of_group(groups: Tensor | None) -> Tensor | None:
    """Return the lowest sample id of each sample's group, (num_samples,) int64; None without groups.

    >>> lowest_of_group(torch.tensor([7, 3, 7, 3, 5]))
    tensor([0, 1, 0, 1, 4])
    """
    if groups is None:
        return None
    _, inverse = groups.unique(return_inverse=True)
    ids = torch.arange(len(groups))
    return torch.full_like(ids, len(ids)).scatter_reduce(0, inverse, ids, "amin")[inverse]


def count_images(num_samples: int, groups: Tensor | None = None, exclude: Tensor | None = None) -> int:
    """Return the number of different images among the samples: of groups where these are given.

    Args:
        num_samples: number of samples, ids ``0 .. num_samples-1``.
        groups: (num_samples,) int64, duplicates share a number.
        exclude: sample ids that do not count.
    """
    usable = torch.ones(num_samples, dtype=torch.bool)
    if exclude is not None:
        usable[exclude] = False
    return int(usable.sum()) if groups is None else len(torch.unique(groups[usable]))


def split_into_shards(
    num_samples: int,
    num_shards: int,
    seed: int,
    groups: Tensor | None = None,
    exclude: Tensor | None = None,
    *,
    balanced: bool = False,
) -> ShardPlan:
    """Split the samples in shuffled shards whose sizes differ by one at most.

    The authors cut the file order in blocks; we shuffle, since files of one kind often lie together.

    Args:
        num_samples: number of samples, ids ``0 .. num_samples-1``.
        num_shards: number of shards.
        seed: seed of the shuffle.
        groups: (num_samples,) int64, equal numbers stay in one shard; sizes are then as even as the groups allow.
        exclude: sample ids that belong to no shard, e.g. unreadable images.
        balanced: a group counts as one image, so that the shards are even in groups, not in samples.

    Raises:
        ValueError: there are fewer usable samples (or groups) than shards.
    """
    usable = torch.ones(num_samples, dtype=torch.bool)
    if exclude is not None:
        usable[exclude] = False
    shuffled = permutation(seed, "shards", length=num_samples)
    shuffled = shuffled[usable[shuffled]]
    num_units = len(shuffled) if groups is None else len(torch.unique(groups[shuffled]))
    if not 1 <= num_shards <= num_units:
        raise ValueError(
            f"`num_shards` must be between 1 and the number of samples ({num_units}"
            f"{'' if groups is None else ' groups of duplicates'}), got {num_shards}; lower it or add samples"
        )
    assignment = torch.full((num_samples,), NO_SHARD, dtype=torch.int16)
    if groups is None:
        assignment[shuffled] = (torch.arange(len(shuffled)) % num_shards).to(torch.int16)
    elif balanced:
        _deal_groups(assignment, shuffled, groups[shuffled], num_shards)
    else:
        _place_groups(assignment, shuffled, groups[shuffled], num_shards)
    return ShardPlan(assignment, num_shards)


def _deal_groups(assignment: Tensor, shuffled: Tensor, groups: Tensor, num_shards: int) -> None:
    """Give the groups to the shards in turn, in the order in which the shuffle shows their first members."""
    _, inverse = torch.unique(groups, return_inverse=True)
    first = first_positions(inverse)
    shard_of_group = torch.empty_like(first)
    shard_of_group[torch.argsort(first)] = torch.arange(len(first)) % num_shards
    assignment[shuffled] = shard_of_group[inverse].to(torch.int16)


def first_positions(labels: Tensor) -> Tensor:
    """Return where each of the labels ``0 .. L-1`` comes first, (L,) int64.

    >>> first_positions(torch.tensor([1, 0, 1, 2, 0]))
    tensor([1, 0, 3])
    """
    num_labels = int(labels.max()) + 1 if len(labels) else 0
    first = torch.full((num_labels,), len(labels))
    return first.scatter_reduce_(0, labels, torch.arange(len(labels)), "amin")


def _place_groups(assignment: Tensor, shuffled: Tensor, groups: Tensor, num_shards: int) -> None:
    """Give the largest groups to the emptiest shards first, then level out with the single samples."""
    _, inverse, counts = torch.unique(groups, return_inverse=True, return_counts=True)
    in_group = counts[inverse] > 1
    fill = [(0, shard_index) for shard_index in range(num_shards)]
    by_group = torch.argsort(inverse[in_group], stable=True)
    blocks = torch.split(shuffled[in_group][by_group], counts[counts > 1].tolist())
    for members in sorted(blocks, key=lambda block: (-len(block), int(block.min()))):
        size, shard_index = heapq.heappop(fill)
        assignment[members] = shard_index
        heapq.heappush(fill, (size + len(members), shard_index))
    singles = shuffled[~in_group]
    sizes = [size for size, _ in sorted(fill, key=lambda one: one[1])]
    assignment[singles] = _emptiest_first(sizes, len(singles)).to(torch.int16)


def _emptiest_first(sizes: list[int], count: int) -> Tensor:
    """Return the shards that so many samples go to one by one, each to the emptiest (the first of several), (count,).

    A shard of size n offers the places n, n + 1, ...; they are taken in the order of (place, shard).

    >>> _emptiest_first([3, 0, 1], 5)
    tensor([1, 1, 2, 1, 2])
    """
    num_shards = len(sizes)
    top = max(*sizes, -(-(sum(sizes) + count) // num_shards), 0) + 1
    places = [torch.arange(size, top) * num_shards + shard_index for shard_index, size in enumerate(sizes)]
    return torch.cat(places).sort().values[:count] % num_shards
