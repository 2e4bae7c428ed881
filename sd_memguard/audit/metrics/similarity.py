"""How near an image is to a gallery of training images, and when that is near enough to be called a copy.

Everything here is plain torch on rows of numbers. What the rows are (pixels, features) is the caller's choice.
"""

import hashlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sd_memguard.audit import AuditError

COPY_THRESHOLD = 0.5
"""A query whose distance ratio is below this is a near copy (Carlini et al. 2023: alpha = 0.5)."""

NUM_NEIGHBORS = 50
"""How many of the nearest images the distance to the nearest is compared with (Carlini et al. 2023: n = 50)."""


class Neighbors(NamedTuple):
    """The nearest gallery rows of every query, nearest first: distances (Q, k) float32 and row numbers (Q, k) int64."""

    distances: Tensor
    indices: Tensor


class Matches(NamedTuple):
    """The gallery rows that score highest, best first: scores (Q, k) and row numbers (Q, k) int64."""

    scores: Tensor
    indices: Tensor


class Copies(NamedTuple):
    """One value per query: distance to the nearest gallery row, ratio, that row's number, and whether it is a copy."""

    distance: Tensor
    ratio: Tensor
    nearest: Tensor
    is_copy: Tensor


def distinct(rows: Tensor) -> Tensor:
    """Return the numbers of the rows that are unlike every row before them, in order.

    Args:
        rows: (N, D), any dtype; two rows are the same when all their bytes are.

    Returns:
        (U,) int64, ascending.
    """
    first: dict[bytes, int] = {}
    for index, row in enumerate(rows.cpu()):
        first.setdefault(hashlib.sha256(row.contiguous().numpy().tobytes()).digest(), index)
    return torch.tensor(list(first.values()), dtype=torch.int64)


def nearest(query: Tensor, gallery: Tensor, k: int, chunk: int = 1024) -> Neighbors:
    """Return the k gallery rows nearest to each query by Euclidean distance, nearest first.

    The search is exact. Distances are summed from differences, not expanded into dot products: the expansion loses
    all digits where it matters most, at a perfect copy. Among rows equally far away, any may be named.

    Args:
        query: (Q, D) float.
        gallery: (G, D) float, on the same device.
        k: How many to return, 1 to G.
        chunk: Rows of the query and of the gallery that are compared at a time; at most chunk * (chunk + 2k)
            distances are held at once, beside the result.

    Raises:
        AuditError: Where the widths differ or the gallery has fewer than k rows.
    """
    if query.shape[1] != gallery.shape[1]:
        raise AuditError(
            f"queries and gallery must be equally wide, got {query.shape[1]} and {gallery.shape[1]} values a row; "
            "bring the images to one size first"
        )
    if not 1 <= k <= len(gallery):
        raise AuditError(f"`k` must be between 1 and the number of gallery rows ({len(gallery)}), got {k}; lower it")
    best = best_matches(query, gallery.split(chunk), k, negative_distance, chunk)
    return Neighbors(-best.scores, best.indices)


def best_matches(
    query: Tensor,
    blocks: Sequence[Tensor],
    k: int,
    score: Callable[[Tensor, Tensor], Tensor],
    chunk: int = 1024,
    own: Tensor | None = None,
) -> Matches:
    """Return the k gallery rows that score highest with each query, best first; exact, whatever the blocks are.

    The gallery comes in blocks that may lie in memory-mapped files and in another precision: one at a time is brought
    to the query's device and dtype. At most ``chunk * (rows of a block + 2k)`` scores are held, beside the result.

    Args:
        query: (Q, D) float.
        blocks: Tensors (G_i, D), in all at least k rows.
        k: How many to return.
        score: Takes (Q, D) and (G_i, D) to (Q, G_i), higher is nearer: ``cosine`` or ``negative_distance``.
        chunk: Queries at a time.
        own: (Q,) row numbers of the gallery that are the query itself and do not count; -1 for none.
    """
    found = []
    for start in range(0, len(query), chunk):
        own_part = None if own is None else own[start : start + chunk].to(query.device)
        found.append(_best_of_chunk(query[start : start + chunk], blocks, k, score, own_part))
    return Matches(torch.cat([part.scores for part in found]), torch.cat([part.indices for part in found]))


def _best_of_chunk(
    query: Tensor, blocks: Sequence[Tensor], k: int, score: Callable[[Tensor, Tensor], Tensor], own: Tensor | None
) -> Matches:
    best = Matches(query.new_empty(len(query), 0), torch.empty(len(query), 0, dtype=torch.int64, device=query.device))
    start = 0
    for block in blocks:
        scores = score(query, block.to(query))
        indices = torch.arange(start, start + len(block), device=query.device).expand_as(scores)
        if own is not None:
            scores = scores.masked_fill(indices == own[:, None], -torch.inf)
        start += len(block)
        values, order = scores.topk(min(k, scores.shape[1]), dim=1)
        values, indices = torch.cat([best.scores, values], 1), torch.cat([best.indices, indices.gather(1, order)], 1)
        values, order = values.topk(min(k, values.shape[1]), dim=1, sorted=True)
        best = Matches(values, indices.gather(1, order))
    return best


def cosine(query: Tensor, gallery: Tensor) -> Tensor:
    """Return the cosines of unit rows, (Q, D) and (G, D) to (Q, G)."""
    return query @ gallery.T


def negative_distance(query: Tensor, gallery: Tensor) -> Tensor:
    """Return minus the Euclidean distances, (Q, D) and (G, D) to (Q, G), summed from differences."""
    return -torch.cdist(query, gallery, compute_mode="donot_use_mm_for_euclid_dist")


def distance_ratio(distances: Tensor) -> Tensor:
    """Return how near the nearest is compared with the n nearest: ``d_1 / mean(d_1, ..., d_n)``, in 0..1.

    Carlini et al. 2023, "Extracting Training Data from Diffusion Models" (arXiv 2301.13188), section 5: the distance
    is ``d_1 / (alpha * mean over the n closest training images)`` with alpha = 0.5 and n = 50, and an image counts
    as extracted where that is small. This is the same value without the factor alpha, so their 1 is our 0.5. The n
    closest are meant literally: the nearest is one of them. Plain Euclidean distance, not its square; dividing by
    the number of pixels, as the paper does, cancels. A flat image is near everything and a busy one near nothing;
    the ratio, unlike the bare distance, does not care.

    Args:
        distances: (Q, n) to n *distinct* images, nearest first. Repeats of one image among the n would shrink the
            mean, and hide exactly the copies that repetition makes.

    Returns:
        (Q,); 1 where all n distances are 0.
    """
    mean = distances.mean(1)
    return torch.where(mean > 0, distances[:, 0] / mean, 1.0)


def squared_distance_ratio(distances: Tensor) -> Tensor:
    """Return how near the nearest is by *squared* distance: ``d_1^2 / mean(d_1^2, ..., d_n^2)``, in 0..1.

    The ratio behind MQ, the figure of IET-AGC (arXiv 2407.15328): their code divides the squared L2 distance to the
    nearest training image by the mean of the 50 nearest (the nearest is one of them), and MQ_x counts the generated
    images below x. Squaring makes it smaller than Carlini's ratio: MQ_0.5 is looser, about 0.71 on plain distances.

    Args:
        distances: As in ``distance_ratio``.
    """
    return distance_ratio(distances.square())


def find_copies(query: Tensor, gallery: Tensor, num_neighbors: int = NUM_NEIGHBORS, chunk: int = 1024) -> Copies:
    """Measure each query against the gallery and tell the near copies: distance ratio below ``COPY_THRESHOLD``.

    Rows that repeat an earlier row of the gallery are dropped first (see ``distance_ratio``).

    Args:
        query: (Q, D) float, e.g. pixels in 0..1.
        gallery: (G, D) float, the training images.
        num_neighbors: n of the ratio; all distinct images where there are fewer.
        chunk: As in ``nearest``.

    Returns:
        ``nearest`` holds numbers of rows of the gallery as given: the first of those that are alike.

    Raises:
        AuditError: Where the widths differ or the gallery has fewer than two distinct rows.
    """
    rows = distinct(gallery).to(gallery.device)
    if len(rows) < 2:
        raise AuditError(f"the gallery must hold at least 2 distinct images, got {len(rows)}; add training images")
    neighbors = nearest(query, gallery[rows], min(num_neighbors, len(rows)), chunk)
    ratio = distance_ratio(neighbors.distances)
    return Copies(neighbors.distances[:, 0], ratio, rows[neighbors.indices[:, 0]], ratio < COPY_THRESHOLD)
