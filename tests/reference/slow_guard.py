"""The parts of the method, one sample and one number at a time, in plain Python.

Written from the definitions (arXiv 2502.09434 and 2407.15328, as the package's docstrings state them), so that the
vectorized code has something independent to be compared with. Nothing here is fast, and nothing imports the package.
"""

import math
from collections.abc import Mapping, Sequence

INFINITY = float("inf")
NAN = float("nan")


class SlowBank:
    """The memory bank as the definition puts it: `m[t] <- d m[t] + (1 - d) l`, one loss after the other."""

    def __init__(self, num_timesteps: int, decay: float, mode: str) -> None:
        self.decay, self.mode = decay, mode
        self.running = [0.0] * num_timesteps
        self.visits = [0] * num_timesteps
        self.sums = [0.0] * num_timesteps
        self.counts = [0.0] * num_timesteps

    def update(self, timesteps: Sequence[int], losses: Sequence[float]) -> None:
        for t, loss in zip(timesteps, losses, strict=True):
            self.running[t] = self.decay * self.running[t] + (1 - self.decay) * loss
            self.visits[t] += 1
            self.sums[t] = self.decay * self.sums[t] + loss
            self.counts[t] = self.decay * self.counts[t] + 1

    def window(self, values: Sequence[float], t: int) -> float:
        return sum(values[s] for s in range(t - 20, t + 21) if 0 <= s < len(values))

    def mean(self, t: int) -> float:
        if self.mode == "paper":
            return self.running[t]
        if self.mode == "corrected":
            return NAN if self.visits[t] == 0 else self.running[t] / (1 - self.decay ** self.visits[t])
        count = self.window(self.counts, t)
        return NAN if count == 0 else self.window(self.sums, t) / count

    def effective_visits(self, t: int) -> float:
        return self.window(self.counts, t) if self.mode == "smoothed" else self.visits[t]

    def loss_ratio(self, t: int, loss: float) -> float:
        if self.effective_visits(t) < {"paper": 1, "corrected": 3, "smoothed": 5}[self.mode]:
            return INFINITY
        return loss / self.mean(t)


def slow_band(ratio: float, skip_threshold: float, augment_threshold: float) -> str:
    """Return "skip", "augment" or "clean"."""
    if skip_threshold == 0:
        return "clean"
    if ratio < skip_threshold:
        return "skip"
    return "augment" if ratio < augment_threshold else "clean"


def slow_strength(loss: float, mean: float, skip_threshold: float) -> float:
    """Return `exp(-5 |loss / lambda - mean| / mean)`."""
    return math.exp(-5 * abs(loss / skip_threshold - mean) / mean)


def slow_magnitude(strengths: Sequence[float]) -> int:
    """Return `int(5 * mean)`."""
    return int(5 * (sum(strengths) / len(strengths)))


class SlowQueue:
    """The augmentation queue of one proxy; "drop" keeps only the first batch that is queued."""

    def __init__(self, surplus: str) -> None:
        self.surplus = surplus
        self.waiting: list[tuple[int, float]] = []

    def push(self, sample_id: int, strength: float) -> None:
        self.waiting.append((sample_id, strength))

    def take(self, batch_size: int) -> list[tuple[int, float]] | None:
        if len(self.waiting) < batch_size:
            return None
        batch = [self.waiting.pop(0) for _ in range(batch_size)]
        if self.surplus == "drop":
            self.waiting = []
        return batch


def slow_redistribute(
    shards: Sequence[Sequence[int]],
    skips: Sequence[int],
    fraction: float,
    groups: Sequence[int] | None = None,
    balanced: bool = False,
) -> tuple[list[list[int]], list[tuple[int, int, int]]]:
    """Return the shards after MSR and the moves as (sample, from, to); every shard is judged as it was before."""
    if len(shards) == 1:
        return [sorted(shards[0])], []
    moves = []
    for source, members in enumerate(shards):
        units: dict[int, list[int]] = {}
        for sample in sorted(members):
            units.setdefault(sample if groups is None else groups[sample], []).append(sample)
        cost = {min(unit): 1 if balanced else len(unit) for unit in units.values()}
        ranked = sorted(units.values(), key=lambda unit: (-sum(skips[i] for i in unit) / cost[min(unit)], min(unit)))
        left = math.floor(fraction * sum(cost.values()))
        for unit in ranked:
            if sum(skips[i] for i in unit) > 0 and cost[min(unit)] <= left:
                left -= cost[min(unit)]
                moves += [(i, source, (source + 1) % len(shards)) for i in unit]
    after = [set(members) for members in shards]
    for sample, source, target in moves:
        after[source].remove(sample)
        after[target].add(sample)
    return [sorted(members) for members in after], moves


def slow_average(states: Sequence[Mapping[str, Sequence[float]]], weights: Sequence[float]) -> dict[str, list[float]]:
    """Return the weighted mean of states of flat lists, number by number."""
    total = math.fsum(weights)
    mean = {}
    for name in states[0]:
        columns = zip(*(state[name] for state in states), strict=True)
        mean[name] = [math.fsum(w * x for w, x in zip(weights, column, strict=True)) / total for column in columns]
    return mean


def slow_schedule(
    total_steps: int, num_shards: int, steps_per_round: int, redistributes: bool
) -> list[tuple[str, list[int]]]:
    """Return for each round what ends it and the steps of each proxy, by dealing the budget out step by step."""
    left = [0] * num_shards
    for step in range(total_steps):
        left[step % num_shards] += 1
    rounds: list[tuple[str, list[int]]] = []
    while any(left):
        steps = [min(rest, steps_per_round) for rest in left]
        left = [rest - taken for rest, taken in zip(left, steps, strict=True)]
        moves = redistributes and num_shards > 1 and len(rounds) % 2 == 0 and any(left)
        rounds.append(("redistribute" if moves else "average", steps))
    return rounds
