"""Verified copies: candidates by descriptor, registration of each, and a decision with its own background."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sd_memguard.audit import AuditError
from sd_memguard.audit.metrics.similarity import best_matches
from sd_memguard.core.verification import verify_pairs

NUM_CANDIDATES = 3
"""Training images that an image is registered with: the most similar ones by descriptor, flipped or not."""

FALSE_POSITIVE_RATE = 0.01
"""Share of the background that may be as near to a training image as a copy."""

SAME = 0.01
"""Images of the background nearer than this are one image under the changes that a copy may have, and do not count."""

MIN_DISTANCE, MAX_DISTANCE = 0.03, 0.25
"""Between these lies the distance of a copy, whatever the background: compression alone moves an image by up to .03,
and beyond .25 something is different also where no two images of the set are alike."""


class Verified(NamedTuple):
    """For each of Q images the training image that it is nearest to after registration.

    Attributes:
        distance: (Q,) float, see ``core.verification``.
        row: (Q,) int64, row of the gallery.
        similarity: (Q,) float, by descriptor, to that row.
        is_flipped: (Q,) bool.
    """

    distance: Tensor
    row: Tensor
    similarity: Tensor
    is_flipped: Tensor


class CopyDistance(NamedTuple):
    """Up to which distance an image is a verified copy, and what that means for images that nobody copied.

    Attributes:
        distance: A copy is at this distance or nearer.
        false_positives: Share of the background that is; those in ``num_same`` are not counted.
        num_same: Images of the background that are one image with a training image, e.g. flipped.
        num_background: Size of the background.
        rule: In words.
    """

    distance: float
    false_positives: float
    num_same: int
    num_background: int
    rule: str


def find_verified(
    queries: Tensor,
    gallery: Sequence[Tensor],
    query_views: Sequence[Tensor],
    gallery_features: Sequence[Tensor],
    *,
    num_candidates: int = NUM_CANDIDATES,
    own: Tensor | None = None,
) -> Verified:
    """Return the training image that each image is nearest to, of its most similar ones.

    Args:
        queries: (Q, 3, 64, 64) uint8, RGB.
        gallery: Blocks (G_i, 3, 64, 64) or (G_i, 64 * 64 * 3) uint8 (height, width, colour), the training images.
        query_views: (Q, D) unit features of the images, and of the images flipped where flipped copies are looked for.
        gallery_features: Blocks (G_i, D) of the training images' features.
        num_candidates: How many are registered.
        own: (Q,) rows that are the query itself and do not count; -1 for none.
    """
    width = query_views[0].shape[1]

    def best_view(query: Tensor, block: Tensor) -> Tensor:
        return torch.stack([view @ block.T for view in query.split(width, dim=1)]).amax(0)

    count = sum(map(len, gallery_features)) - (own is not None)
    candidates = best_matches(
        torch.cat(list(query_views), 1), gallery_features, min(num_candidates, count), best_view, own=own
    )
    kept = candidates.indices.shape[1]
    found = verify_pairs(
        queries.repeat_interleave(kept, 0), _images(gallery, candidates.indices.flatten()), flip=len(query_views) > 1
    )
    distance, best = found.distance.view(-1, kept).min(1)
    pick = best[:, None]
    return Verified(
        distance,
        candidates.indices.gather(1, pick)[:, 0],
        candidates.scores.gather(1, pick)[:, 0],
        found.is_flipped.view(-1, kept).gather(1, pick)[:, 0],
    )


def _images(blocks: Sequence[Tensor], rows: Tensor) -> Tensor:
    """Return images of a gallery in blocks as (N, 3, 64, 64) uint8."""
    size = len(blocks[0])
    images = torch.stack([blocks[row // size][row % size] for row in rows.tolist()])
    return as_images(images)


def as_images(pixels: Tensor) -> Tensor:
    """Return rows of pixels (N, 64 * 64 * 3), by height, width, colour, as (N, 3, 64, 64); images as they are."""
    return pixels.view(-1, 64, 64, 3).permute(0, 3, 1, 2).contiguous() if pixels.dim() == 2 else pixels


def choose_distance(background: Tensor, of: str, false_positive_rate: float = FALSE_POSITIVE_RATE) -> CopyDistance:
    """Return the distance of a copy: so small that at most this share of a background is as near to a training image.

    Args:
        background: (N,) distances of images that nobody copied, e.g. held-out images; below 100 none may be as near.
        of: What they are, in words.
        false_positive_rate: Between 0 and 1.

    Raises:
        AuditError: There is no background.
    """
    if not len(background):
        raise AuditError("a background needs at least one image; give held-out images or more training images")
    ordered = background[background >= SAME].sort().values
    num_same = len(background) - len(ordered)
    allowed = int(false_positive_rate * len(ordered) + 1e-9)
    # Just below the first that may not count.
    limit = ordered[allowed].item() * (1 - 1e-6) if allowed < len(ordered) else MAX_DISTANCE
    distance = min(max(limit, MIN_DISTANCE), MAX_DISTANCE)
    found = (ordered <= distance).float().mean().item() if len(ordered) else 0.0
    same = f", {num_same} of which are one image with a training image and are not counted," if num_same else ""
    rule = f"at which {found:.1%} of {len(background):,} {of}{same} would be copies"
    return CopyDistance(distance, found, num_same, len(background), rule)
