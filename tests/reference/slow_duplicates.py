"""Near-identical images by comparing all pairs, one number at a time; nothing imports the package."""

import math
from collections.abc import Sequence

Image = Sequence[Sequence[Sequence[int]]]  # rows of pixels of three colours


def slow_distance(one: Image, other: Image, min_contrast: float = 4.0) -> float:
    """Return the root mean square difference of two images, without their means and contrasts."""
    columns = []
    for image in (one, other):
        values = [value for row in image for pixel in row for value in pixel]
        mean = sum(values) / len(values)
        contrast = math.sqrt(sum((value - mean) ** 2 for value in values) / len(values))
        columns.append([(value - mean) / max(contrast, min_contrast) for value in values])
    return math.sqrt(sum((a - b) ** 2 for a, b in zip(*columns, strict=True)) / len(columns[0]))


def slow_hash(image: Image) -> set[tuple[int, int]]:
    """Return the frequencies (down, right) below 8 whose cosine coefficient is above the median by more than 2."""
    side = len(image)
    grey = [[0.299 * r + 0.587 * g + 0.114 * b for r, g, b in row] for row in image]
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


def slow_groups(images: Sequence[Image], max_distance: float) -> list[int]:
    """Return the first image of each one's group: it joins the earliest leader that it is like, or leads."""
    leaders: list[int] = []
    groups = []
    for number, image in enumerate(images):
        like = [leader for leader in leaders if slow_distance(images[leader], image) <= max_distance]
        groups.append(like[0] if like else number)
        if not like:
            leaders.append(number)
    return groups
