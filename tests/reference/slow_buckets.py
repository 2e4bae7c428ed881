"""Aspect-ratio buckets written out: which one an image belongs to, and in which batches an epoch shows the images."""

import math
from collections.abc import Callable, Sequence
from fractions import Fraction


def slow_bucket(width: int, height: int, side: int, step: int, low: int, high: int) -> tuple[int, int]:
    """Return the bucket of an image: of all sizes that are allowed, the nearest in shape.

    Allowed are, for each multiple of the step between the limits as one side, the longest other side with which there
    are no more pixels than in the square; and the square.
    """
    allowed = {(side // step * step,) * 2}
    for one in range(1, high + 1):
        if one % step or one < low:
            continue
        fitting = [other for other in range(step, high + 1, step) if one * other <= side * side]
        if fitting and fitting[-1] >= low:
            allowed |= {(one, fitting[-1]), (fitting[-1], one)}
    largest = {}
    for size in sorted(allowed, key=math.prod):
        largest[Fraction(*size)] = size

    def distance(size: tuple[int, int]) -> float:
        ratio = Fraction(*size) / Fraction(width, height)
        return float(max(ratio, 1 / ratio))

    return min(largest.values(), key=lambda size: (distance(size), Fraction(*size)))


def slow_small_bucket(width: int, height: int, side: int, step: int, high: int) -> tuple[int, int]:
    """Return the largest size in steps, of the shape of an image, without enlarging it and with not too many pixels."""
    fitted = []
    for one, other in ((width, height), (height, width)):
        multiples = [step * number for number in range(1, high // step + 1)]
        # A side s belongs to a shrunk image of s * (s * other / one) pixels.
        fitted.append(max([s for s in multiples if s <= one and s * s * other <= side * side * one] or [step]))
    return fitted[0], fitted[1]


def slow_batches(
    epochs: Sequence[Sequence[int]], bucket_of: Callable[[int, int], int], batch_size: int
) -> list[list[tuple[int, int]]]:
    """Return the batches of epochs as pairs of epoch and sample; what is left at the end of the last epoch is dropped.

    Args:
        epochs: the samples of each epoch in their random order.
        bucket_of: the bucket of a sample in an epoch.
        batch_size: samples of a batch.
    """
    stream: list[tuple[int, int]] = []
    for epoch, order in enumerate(epochs):
        left = list(order)
        buckets = list(dict.fromkeys(bucket_of(sample, epoch) for sample in left))
        missing = -len(stream) % batch_size
        # The last batch of the epoch before is completed, at first by what would be left in this one anyway.
        first: list[int] = []
        for spares_full_batches in (True, False):
            for bucket in buckets:
                there = [sample for sample in left if bucket_of(sample, epoch) == bucket]
                taken = there[: min(missing, len(there) % batch_size if spares_full_batches else len(there))]
                missing -= len(taken)
                first += taken
                left = [sample for sample in left if sample not in taken]
        stream += [(epoch, sample) for sample in order if sample in first]
        at = 0
        while at < len(left):
            same = [s for s in left[: at + 1] if bucket_of(s, epoch) == bucket_of(left[at], epoch)]
            if len(same) == batch_size:
                stream += [(epoch, sample) for sample in same]
                left, at = [sample for sample in left if sample not in same], at - batch_size
            at += 1
        for bucket in dict.fromkeys(bucket_of(sample, epoch) for sample in left):
            stream += [(epoch, sample) for sample in left if bucket_of(sample, epoch) == bucket]
    return [stream[at : at + batch_size] for at in range(0, len(stream) - batch_size + 1, batch_size)]
