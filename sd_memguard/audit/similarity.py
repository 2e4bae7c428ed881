"""How near a picture is to a gallery of training pictures, and when that is near enough to be called a copy.

Everything here is plain torch on rows of numbers. What the rows are (pixels, features) is the caller's choice.
"""

import hashlib
from typing import NamedTuple

import torch
from torch import Tensor

from sd_memguard.audit import AuditError

COPY_THRESHOLD = 0.5
"""A query whose distance ratio is below this is a near copy (Carlini et al. 2023: alpha = 0.5)."""

NUM_NEIGHBORS = 50
"""How many of the nearest pictures the distance to the nearest is compared with (Carlini et al. 2023: n = 50)."""


class Neighbors(NamedTuple):
    """The nearest gallery rows of every query, nearest first: distances (Q, k) float32 and row numbers (Q, k) int64."""

    distances: Tensor
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
            "bring the pictures to one size first"
        )
    if not 1 <= k <= len(gallery):
        raise AuditError(f"`k` must be between 1 and the number of gallery rows ({len(gallery)}), got {k}; lower it")
    found = [_nearest_of_chunk(part, gallery, k, chunk) for part in query.split(chunk)]
    return Neighbors(torch.cat([part.distances for part in found]), torch.cat([part.indices for part in found]))


def _nearest_of_chunk(query: Tensor, gallery: Tensor, k: int, chunk: int) -> Neighbors:
    best = Neighbors(query.new_empty(len(query), 0), torch.empty(len(query), 0, dtype=torch.int64, device=query.device))
    for start in range(0, len(gallery), chunk):
        distances = torch.cdist(query, gallery[start : start + chunk], compute_mode="donot_use_mm_for_euclid_dist")
        indices = torch.arange(start, start + distances.shape[1], device=query.device).expand_as(distances)
        distances, indices = torch.cat([best.distances, distances], 1), torch.cat([best.indices, indices], 1)
        values, order = distances.topk(min(k, distances.shape[1]), dim=1, largest=False, sorted=True)
        best = Neighbors(values, indices.gather(1, order))
    return best


def distance_ratio(distances: Tensor) -> Tensor:
    """Return how near the nearest is compared with the n nearest: ``d_1 / mean(d_1, ..., d_n)``, in 0..1.

    Carlini et al. 2023, "Extracting Training Data from Diffusion Models" (arXiv 2301.13188), section 5: the distance
    is ``d_1 / (alpha * mean over the n closest training pictures)`` with alpha = 0.5 and n = 50, and a picture counts
    as extracted where that is small. This is the same value without the factor alpha, so their 1 is our 0.5. The n
    closest are meant literally: the nearest is one of them. Plain Euclidean distance, not its square; dividing by
    the number of pixels, as the paper does, cancels. A flat picture is near everything and a busy one near nothing;
    the ratio, unlike the bare distance, does not care.

    Args:
        distances: (Q, n) to n *distinct* pictures, nearest first. Repeats of one picture among the n would shrink the
            mean, and hide exactly the copies that repetition makes.

    Returns:
        (Q,); 1 where all n distances are 0.
    """
    mean = distances.mean(1)
    return torch.where(mean > 0, distances[:, 0] / mean, 1.0)


def find_copies(query: Tensor, gallery: Tensor, num_neighbors: int = NUM_NEIGHBORS, chunk: int = 1024) -> Copies:
    """Measure each query against the gallery and tell the near copies: distance ratio below ``COPY_THRESHOLD``.

    Rows that repeat an earlier row of the gallery are left out first (see ``distance_ratio``).

    Args:
        query: (Q, D) float, e.g. pixels in 0..1.
        gallery: (G, D) float, the training pictures.
        num_neighbors: n of the ratio; all distinct pictures where there are fewer.
        chunk: As in ``nearest``.

    Returns:
        ``nearest`` holds numbers of rows of the gallery as given: the first of those that are alike.

    Raises:
        AuditError: Where the widths differ or the gallery has fewer than two distinct rows.
    """
    rows = distinct(gallery).to(gallery.device)
    if len(rows) < 2:
        raise AuditError(f"the gallery must hold at least 2 distinct pictures, got {len(rows)}; add training pictures")
    neighbors = nearest(query, gallery[rows], min(num_neighbors, len(rows)), chunk)
    ratio = distance_ratio(neighbors.distances)
    return Copies(neighbors.distances[:, 0], ratio, rows[neighbors.indices[:, 0]], ratio < COPY_THRESHOLD)
