"""MSR: memory-prone samples move to a shard where they are not yet memorized (arXiv 2502.09434)."""

import torch
from torch import Tensor

from sd_memguard.core.shards import Moves, ShardPlan


def redistribute(
    plan: ShardPlan, skip_counts: Tensor, fraction: float, groups: Tensor | None = None
) -> tuple[ShardPlan, Moves]:
    """Return the plan after each shard k has handed its most-skipped samples to shard (k+1) mod K, and the moves.

    All shards hand over at once: at most ``floor(fraction * size)`` samples that were skipped at least once; ties go to
    the lowest sample id. With one shard nothing moves.

    Args:
        plan: the present shards.
        skip_counts: (num_samples,) visits that were no clean update since the last redistribution.
        fraction: share of a shard that may move, in [0, 1).
        groups: (num_samples,) int64, duplicates share a number: a group counts the mean of its members and moves
            whole; one that does not fit in what is left of the share stays.
    """
    if plan.num_shards == 1:
        nothing = torch.empty(0, dtype=torch.int64)
        return plan, Moves(nothing, nothing, nothing)
    chosen, sources = [], []
    for shard_index in range(plan.num_shards):
        members = plan.members(shard_index)
        quota = int(fraction * len(members))
        movers = _most_skipped(members, skip_counts[members], quota, None if groups is None else groups[members])
        chosen.append(movers)
        sources.append(torch.full_like(movers, shard_index))
    sample_ids, source = torch.cat(chosen), torch.cat(sources)
    target = (source + 1) % plan.num_shards
    assignment = plan.assignment.clone()
    assignment[sample_ids] = target.to(assignment.dtype)
    return ShardPlan(assignment, plan.num_shards), Moves(sample_ids, source, target)


def _most_skipped(members: Tensor, counts: Tensor, quota: int, groups: Tensor | None) -> Tensor:
    """Return at most ``quota`` of the members (ascending ids), most skipped first."""
    if groups is None:
        order = torch.argsort(counts, descending=True, stable=True)[:quota]
        return members[order[counts[order] > 0]]
    _, inverse, sizes = torch.unique(groups, return_inverse=True, return_counts=True)
    totals = torch.zeros(len(sizes), dtype=torch.float64).index_add_(0, inverse, counts.double())
    first = torch.full((len(sizes),), len(members)).scatter_reduce_(0, inverse, torch.arange(len(members)), "amin")
    means = totals / sizes
    by_id = torch.argsort(first)
    order = by_id[torch.argsort(means[by_id], descending=True, stable=True)]
    taken = []
    for group in order.tolist():
        if quota == 0 or means[group] == 0:
            break
        if sizes[group] <= quota:
            taken.append(members[inverse == group])
            quota -= int(sizes[group])
    return torch.cat(taken) if taken else members[:0]
