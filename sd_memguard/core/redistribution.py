"""MSR: memory-prone samples move to a shard where they are not yet memorized (arXiv 2502.09434)."""

import torch
from torch import Tensor

from sd_memguard.core.shards import Moves, ShardPlan, first_positions


def redistribute(
    plan: ShardPlan, skip_counts: Tensor, fraction: float, groups: Tensor | None = None, *, balanced: bool = False
) -> tuple[ShardPlan, Moves]:
    """Return the plan after each shard k has handed its most-skipped samples to shard (k+1) mod K, and the moves.

    All shards hand over at once: at most ``floor(fraction * size)`` samples that were skipped at least once; ties go to
    the lowest sample id. With one shard nothing moves.

    Args:
        plan: the present shards.
        skip_counts: (num_samples,) times a sample was no clean update since the last redistribution.
        fraction: share of a shard that may move, in [0, 1).
        groups: (num_samples,) int64, duplicates share a number: a group counts the mean of its members and moves
            whole; one that does not fit in what is left of the share stays.
        balanced: a group counts as one image: its skips are those of all its members together, and the share is one
            of the shard's groups, whatever their sizes.
    """
    if plan.num_shards == 1:
        nothing = torch.empty(0, dtype=torch.int64)
        return plan, Moves(nothing, nothing, nothing)
    chosen, sources = [], []
    for shard_index in range(plan.num_shards):
        members = plan.members(shard_index)
        counts = skip_counts[members]
        if groups is None:
            movers = _most_skipped(members, counts, int(fraction * len(members)))
        else:
            movers = _most_skipped_groups(members, counts, fraction, groups[members], balanced=balanced)
        chosen.append(movers)
        sources.append(torch.full_like(movers, shard_index))
    sample_ids, source = torch.cat(chosen), torch.cat(sources)
    target = (source + 1) % plan.num_shards
    assignment = plan.assignment.clone()
    assignment[sample_ids] = target.to(assignment.dtype)
    return ShardPlan(assignment, plan.num_shards), Moves(sample_ids, source, target)


def _most_skipped(members: Tensor, counts: Tensor, quota: int) -> Tensor:
    """Return at most ``quota`` of the members (ascending ids), most skipped first."""
    order = torch.argsort(counts, descending=True, stable=True)[:quota]
    return members[order[counts[order] > 0]]


def _most_skipped_groups(members: Tensor, counts: Tensor, fraction: float, groups: Tensor, *, balanced: bool) -> Tensor:
    """Return the members (ascending ids) of the most skipped groups that fit in the share."""
    _, inverse, sizes = torch.unique(groups, return_inverse=True, return_counts=True)
    skips = torch.zeros(len(sizes), dtype=torch.float64).index_add_(0, inverse, counts.double())
    if balanced:
        sizes = torch.ones_like(sizes)
    skips /= sizes
    by_id = torch.argsort(first_positions(inverse))
    order = by_id[torch.argsort(skips[by_id], descending=True, stable=True)]
    order = order[skips[order] > 0]
    moves = torch.zeros(len(sizes), dtype=torch.bool)
    moves[order[_that_fit(sizes[order], int(fraction * int(sizes.sum())))]] = True
    return members[moves[inverse]]


def _that_fit(sizes: Tensor, quota: int) -> Tensor:
    """Return the positions of what fits in a quota when taken in order, passing over what is too large for the rest.

    >>> _that_fit(torch.tensor([2, 5, 1, 3, 1]), 5)
    tensor([0, 2, 4])
    """
    taken, left = [], torch.arange(len(sizes))
    while len(left := left[sizes[left] <= quota]):
        # All that come before the first which no longer fits; that one is gone in the next turn.
        fits = int((sizes[left].cumsum(0) <= quota).sum())
        taken.append(left[:fits])
        quota -= int(sizes[left[:fits]].sum())
        left = left[fits:]
    return torch.cat([torch.empty(0, dtype=torch.int64), *taken])
