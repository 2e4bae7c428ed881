"""Near-identical pictures by comparing all pairs, one number at a time; nothing imports the package."""

import math
from collections.abc import Sequence

Picture = Sequence[Sequence[Sequence[int]]]  # rows of pixels of three colours


def slow_distance(one: Picture, other: Picture, min_contrast: float = 4.0) -> float:
    """Return the root mean square difference of two pictures, without their means and contrasts."""
    columns = []
    for picture in (one, other):
        values = [value for row in picture for pixel in row for value in pixel]
        mean = sum(values) / len(values)
        contrast = math.sqrt(sum((value - mean) ** 2 for value in values) / len(values))
        columns.append([(value - mean) / max(contrast, min_contrast) for value in values])
    return math.sqrt(sum((a - b) ** 2 for a, b in zip(*columns, strict=True)) / len(columns[0]))


def slow_hash(picture: Picture) -> set[tuple[int, int]]:
    """Return the frequencies (down, right) below 8 whose cosine coefficient is above the median by more than 2."""
    side = len(picture)
    grey = [[0.299 * r + 0.587 * g + 0.114 * b for r, g, b in row] for row in picture]
    coefficients = {}
    for u in range(8):
        for v in range(8):
            total = 0.0
            for y in range(side):
                for x in range(side):
                    wave = math.cos(math.pi * u * (y + 0.5) / side) * math.cos(math.pi * v * (x + 0.5) / side)
                    total += grey[y][x] * wave
            coefficients[u, v] = 2 / side * total
    ranked = sorted(coefficients.values())
    median = (ranked[31] + ranked[32]) / 2
    return {place for place, value in coefficients.items() if value > median + 2}


def slow_groups(pictures: Sequence[Picture], max_distance: float) -> list[int]:
    """Return the first picture of each one's group: it joins the earliest leader that it is like, or leads."""
    leaders: list[int] = []
    groups = []
    for number, picture in enumerate(pictures):
        like = [leader for leader in leaders if slow_distance(pictures[leader], picture) <= max_distance]
        groups.append(like[0] if like else number)
        if not like:
            leaders.append(number)
    return groups
