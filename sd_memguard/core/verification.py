"""Whether one image is a copy of another: the transform that fits best is found, and what it leaves is measured.

A descriptor ranks; it cannot decide, since the images of one set may be alike (keycaps, faces of one style).
Registration can: after the small crop, shift, scale, rotation, flip and global change of colour that fit best, a copy
and its source differ by nearly nothing anywhere, and two images that are only alike differ somewhere.

1. Start: the best of a grid of scales and shifts, with and without flip, at 8 x 8.
2. Refine: an affine map by Gauss-Newton (Lucas and Kanade 1981) at growing sizes. The change of colour is fitted again
   in closed form at each step: gain and offset of the brightness, rotation and gain of the chroma. Pairs without a
   chance end early.
3. Compare: the residual energy of windows of an eighth of the edge over their contrast, forgiving one pixel of
   misplacement. The mean of the worst twentieth is the distance; a change of colour adds to it.

Ours, not the paper's. Plain torch; some milliseconds a pair on one core.
"""

import math
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

SCALES = (0.8, 0.9, 1.0, 1.12, 1.25)
SHIFTS = (-0.1, 0.0, 0.1)
"""Where the search starts: scales, and shifts as shares of the edge in both directions."""

HUES = (-36.0, -24.0, -12.0, 0.0, 12.0, 24.0, 36.0)
"""Turns of the hue that are tried, in degrees."""

MAX_SCALE, MAX_STRETCH, MAX_SKEW, MAX_SHIFT, MAX_ANGLE = 1.45, 1.35, 0.2, 0.3, 20.0
"""Beyond these an image is not the same: scale, ratio of the two scales, skew, shift by edge, rotation in degrees."""

FAR = 9.0
"""Distance where the best transform is beyond them."""


class _Level(NamedTuple):
    """Edge of the images, steps, starts followed, starts kept, and the share of energy left that ends the search."""

    side: int
    num_steps: int
    num_starts: int
    num_kept: int
    max_error: float


_COARSE = 8
_LEVELS = {
    64: (_Level(16, 4, 6, 2, 0.4), _Level(32, 4, 2, 1, 0.3), _Level(64, 3, 1, 1, math.inf)),
    36: (_Level(12, 4, 6, 2, 0.4), _Level(36, 4, 2, 1, math.inf)),
}
_MISPLACED = ((1, 1), (0, 1), (2, 1), (1, 0), (1, 2))  # where a padded image begins: in its place, or one pixel off
# Measured on faces of one style and on emoji, 11 kinds of copies each: the noise of .02 and .1, the worst 3% and 10%
# of the windows, and no blur did worse.
_NOISE = 0.05  # contrast (squared, range 0..1) below which noise speaks
_WORST = 0.05  # share of the windows that count
_RIDGE = 4e-4  # energy a pixel below which there is nothing to fit
_RECOLOURED = 0.15  # what a change of all chroma adds: two faces of one style may differ in colours alone
_PAIRS_AT_ONCE = 128


class Verified(NamedTuple):
    """What registration finds, for each of P pairs.

    Attributes:
        distance: 0 for the same image, about 1 and more for unrelated ones, (P,) float32.
        transform: Affine map from the query's coordinates to the source's, both from -1 to 1, (P, 2, 3) float32.
        is_flipped: Whether the source is flipped, (P,) bool.
    """

    distance: Tensor
    transform: Tensor
    is_flipped: Tensor


@torch.no_grad()
def verify_pairs(queries: Tensor, sources: Tensor, *, flip: bool = True) -> Verified:
    """Return how far each query is from its source after the transform that fits best.

    Args:
        queries: (P, 3, S, S) uint8, RGB, S 64 or 36: 64 tells more apart, 36 forgives more.
        sources: (P, 3, S, S) uint8, each query's candidate.
        flip: Whether flipped copies count as copies.
    """
    if not len(queries):
        return Verified(torch.zeros(0), torch.zeros(0, 2, 3), torch.zeros(0, dtype=torch.bool))
    parts = [
        _verify(one.float() / 255, other.float() / 255, flip)
        for one, other in zip(queries.split(_PAIRS_AT_ONCE), sources.split(_PAIRS_AT_ONCE), strict=True)
    ]
    return Verified(*(torch.cat(part) for part in zip(*parts, strict=True)))


def _verify(query: Tensor, source: Tensor, flip: bool) -> Verified:
    count, levels = len(query), _LEVELS[query.shape[-1]]
    found = Verified(
        torch.full((count,), FAR), torch.eye(3)[:2].repeat(count, 1, 1), torch.zeros(count, dtype=torch.bool)
    )
    alive = torch.arange(count)
    transforms = _starts(_at_side(query, _COARSE), _at_side(source, _COARSE), flip, levels[0].num_starts)
    for level in levels:
        one, other = _at_side(query[alive], level.side), _at_side(source[alive], level.side)
        kept = transforms.shape[1]
        refined, error = _refine(
            one.repeat_interleave(kept, 0), other.repeat_interleave(kept, 0), transforms.flatten(0, 1), level.num_steps
        )
        error, best = error.view(-1, kept).topk(level.num_kept, largest=False)
        transforms = refined.view(-1, kept, 2, 3).gather(1, best[..., None, None].expand(-1, -1, 2, 3))
        hopeful = error[:, 0] < level.max_error
        alive, transforms = alive[hopeful], transforms[hopeful]
        if not len(alive):
            return found
    compared = _compare(query[alive], source[alive], transforms[:, 0])
    for whole, part in zip(found, compared, strict=True):
        whole[alive] = part
    return found


def _at_side(images: Tensor, side: int) -> Tensor:
    return to_luma_chroma(_scaled(images, side))


def to_luma_chroma(images: Tensor) -> Tensor:
    """Return brightness and two chroma channels of RGB images in 0..1, (P, 3, H, W): white has no chroma."""
    red, green, blue = images.unbind(1)
    luma = 0.299 * red + 0.587 * green + 0.114 * blue
    return torch.stack([luma, 0.6 * (blue - luma), 0.75 * (red - luma)], 1)


def _scaled(images: Tensor, side: int) -> Tensor:
    return images if images.shape[-1] == side else functional.adaptive_avg_pool2d(images, side)


@cache
def _start_maps(flip: bool) -> tuple[Tensor, Tensor]:
    """Return the affine maps that the search starts from, (S, 2, 3), and what each makes of images, (S * 64, 64)."""
    maps = [
        [[sign * scale, 0.0, 2 * right], [0.0, scale, 2 * down]]
        for sign in ((1, -1) if flip else (1,))
        for scale in SCALES
        for down in SHIFTS
        for right in SHIFTS
    ]
    transforms = torch.tensor(maps)
    size = _COARSE**2
    basis = torch.eye(size).view(1, size, _COARSE, _COARSE).expand(len(transforms), -1, -1, -1)
    grid = functional.affine_grid(transforms, [len(transforms), 1, _COARSE, _COARSE], align_corners=False)
    warped = functional.grid_sample(basis, grid, padding_mode="border", align_corners=False)
    return transforms, warped.flatten(2).transpose(1, 2).reshape(-1, size).contiguous()


def _starts(query: Tensor, source: Tensor, flip: bool, count: int) -> Tensor:
    """Return the best starts of each pair, (P, count, 2, 3)."""
    transforms, matrix = _start_maps(flip)
    pairs = len(query)
    warped = (matrix @ source.flatten(2).permute(2, 0, 1).flatten(1)).view(len(transforms), _COARSE**2, pairs, 3)
    warped = warped.permute(2, 0, 3, 1)  # (P, S, 3, 64)
    inside = _inside(transforms, _COARSE).flatten(1)[None, :, None]
    _, error = _fit_colours(query.flatten(2)[:, None].expand_as(warped), warped, inside)
    best = error.topk(count, largest=False).indices
    return transforms[best]


def _inside(transforms: Tensor, side: int) -> Tensor:
    """Return which pixels of the query lie in the source, (P, 1, side, side) float."""
    grid = functional.affine_grid(transforms, [len(transforms), 1, side, side], align_corners=False)
    return (grid.abs().amax(-1) <= 1.0).float()[:, None]


def _fit_colours(query: Tensor, source: Tensor, inside: Tensor) -> tuple[Tensor, Tensor]:
    """Return the sources in the colours that fit the queries best, and the share of energy left, (...,).

    Args:
        query: (..., 3, N) brightness and chroma.
        source: (..., 3, N).
        inside: (..., 1, N), which pixels count.
    """
    weight = inside / inside.sum(-1, keepdim=True).clamp(min=1)
    mean_q, mean_s = ((weight[..., 0, :] * one[..., 0, :]).sum(-1, keepdim=True) for one in (query, source))
    luma_q, luma_s = query[..., 0, :] - mean_q, source[..., 0, :] - mean_s
    flat = weight[..., 0, :]
    gain = (((flat * luma_q * luma_s).sum(-1) + _RIDGE) / ((flat * luma_s.square()).sum(-1) + _RIDGE)).clamp(0.6, 1.6)
    u_q, v_q, u_s, v_s = query[..., 1, :], query[..., 2, :], source[..., 1, :], source[..., 2, :]
    power = (flat * (u_s.square() + v_s.square())).sum(-1) + _RIDGE
    real = ((flat * (u_q * u_s + v_q * v_s)).sum(-1) + _RIDGE) / power
    imaginary = (flat * (v_q * u_s - u_q * v_s)).sum(-1) / power
    size = torch.hypot(real, imaginary).clamp(min=1e-6)
    angle = torch.atan2(imaginary, real).clamp(-0.7, 0.7)
    size = size.clamp(0.4, 1.7)
    real, imaginary = size * angle.cos(), size * angle.sin()
    shift = (mean_q - gain[..., None] * mean_s).clamp(-0.2, 0.2)
    fitted = torch.stack(
        [
            gain[..., None] * source[..., 0, :] + shift,
            real[..., None] * u_s - imaginary[..., None] * v_s,
            imaginary[..., None] * u_s + real[..., None] * v_s,
        ],
        -2,
    )
    left = (weight * (query - fitted).square()).sum((-1, -2))
    # Contrast within the part that is compared: a transform that shows nothing but background explains nothing.
    energy = (flat * (luma_q.square() + luma_s.square())).sum(-1) / 2 + (
        weight * (query[..., 1:, :] - (weight * query[..., 1:, :]).sum(-1, keepdim=True)).square()
    ).sum((-1, -2))
    return fitted, left / (energy + _RIDGE)


def _warp(images: Tensor, transforms: Tensor) -> Tensor:
    grid = functional.affine_grid(transforms, list(images.shape), align_corners=False)
    return functional.grid_sample(images, grid, padding_mode="border", align_corners=False)


def _refine(query: Tensor, source: Tensor, transforms: Tensor, num_steps: int) -> tuple[Tensor, Tensor]:
    """Return better maps and the share of energy that they leave, never worse than the ones given."""
    side = query.shape[-1]
    place = (torch.arange(side) + 0.5) * 2 / side - 1
    down, right = torch.meshgrid(place, place, indexing="ij")
    best, best_error = transforms, torch.full((len(query),), math.inf)
    rows = torch.tensor([0.0, 0.0, 1.0]).expand(len(query), 1, 3)
    q_down, q_right = _gradients(query)
    for step in range(num_steps + 1):
        warped, inside = _warp(source, transforms), _inside(transforms, side)
        fitted, error = _fit_colours(query.flatten(2), warped.flatten(2), inside.flatten(2))
        better = error < best_error
        best = torch.where(better[:, None, None], transforms, best)
        best_error = torch.where(better, error, best_error)
        if step == num_steps:
            break
        fitted = fitted.view_as(query)
        s_down, s_right = _gradients(fitted)
        g_down, g_right = (s_down + q_down) / 2, (s_right + q_right) / 2
        moves = torch.stack(
            [g_right * right, g_right * down, g_right, g_down * right, g_down * down, g_down], 1
        )  # (P, 6, 3, H, W)
        moves = (moves * inside[:, None]).flatten(2)
        difference = ((query - fitted) * inside).flatten(1)
        normal = moves @ moves.transpose(1, 2)
        damping = 1e-3 * normal.diagonal(dim1=1, dim2=2).mean(1) + 1e-4
        normal = normal + damping[:, None, None] * torch.eye(6)
        change = torch.linalg.solve(normal, (moves @ difference[..., None]))[..., 0].clamp(-0.15, 0.15)
        delta = change.view(-1, 2, 3) + torch.eye(3)[:2]
        transforms = transforms @ torch.cat([delta, rows], 1)
    return best, best_error


def _gradients(images: Tensor) -> tuple[Tensor, Tensor]:
    """Return the slopes down and right, in units of half the edge."""
    side = images.shape[-1]
    padded = functional.pad(images, [1, 1, 1, 1], mode="replicate")
    down = (padded[..., 2:, 1:-1] - padded[..., :-2, 1:-1]) * (side / 4)
    right = (padded[..., 1:-1, 2:] - padded[..., 1:-1, :-2]) * (side / 4)
    return down, right


def _compare(query: Tensor, source: Tensor, transforms: Tensor) -> Verified:
    """Return what the best transforms leave."""
    warped, inside = _warp(source, transforms), _inside(transforms, query.shape[-1])
    target = to_luma_chroma(query)
    turned = to_luma_chroma(turn_hue(warped, _best_hue(query, warped, inside)))
    fitted, _ = _fit_colours(target.flatten(2), turned.flatten(2), inside.flatten(2))
    fitted = fitted.view_as(target)
    distance = _mean_of_worst(_window_distances(target, fitted, inside))
    distance += _RECOLOURED * _chroma_change(to_luma_chroma(warped) * inside, fitted * inside)
    return Verified(
        distance.masked_fill(_is_too_far(transforms), FAR), transforms, torch.linalg.det(transforms[:, :, :2]) < 0
    )


def _is_too_far(transforms: Tensor) -> Tensor:
    """Return which maps change an image beyond what a copy may be changed, (P,) bool."""
    across = transforms[:, :, :2]
    lengths = across.norm(dim=1)
    angle = torch.rad2deg(torch.atan2(across[:, 1, 0], across[:, 0, 0].abs())).abs()
    skew = (across[:, :, 0] * across[:, :, 1]).sum(1).abs() / lengths.prod(1)
    return (
        (lengths.amax(1) > MAX_SCALE)
        | (lengths.amin(1) < 1 / MAX_SCALE)
        | (lengths.amax(1) / lengths.amin(1) > MAX_STRETCH)
        | (skew > MAX_SKEW)
        | (angle > MAX_ANGLE)
        | (transforms[:, :, 2].abs().amax(1) / 2 > MAX_SHIFT)
    )


def _best_hue(query: Tensor, warped: Tensor, inside: Tensor) -> Tensor:
    """Return the turn of the hue that fits best, (P,) degrees, found at 32 x 32."""
    small, other, part = (_scaled(one, 32) for one in (query, warped, inside))
    part = (part > 0.99).float()
    target = to_luma_chroma(small).flatten(2)
    errors = []
    for hue in HUES:
        turned = to_luma_chroma(turn_hue(other, torch.full((len(query),), hue)))
        errors.append(_fit_colours(target, turned.flatten(2), part.flatten(2))[1])
    # A turn must pay: most copies have none.
    error = torch.stack(errors, 1) * (1 + 0.003 * torch.tensor(HUES).abs())
    return torch.tensor(HUES)[error.argmin(1)]


def turn_hue(images: Tensor, degrees: Tensor) -> Tensor:
    """Return RGB images in 0..1 with their hue turned in HSV, (P, 3, H, W); value and saturation stay."""
    high, low = images.amax(1), images.amin(1)
    spread = (high - low).clamp(min=1e-6)
    red, green, blue = images.unbind(1)
    sector = torch.where(
        high == red,
        (green - blue) / spread,
        torch.where(high == green, 2 + (blue - red) / spread, 4 + (red - green) / spread),
    )
    sector = sector + degrees[:, None, None] / 60
    channels = []
    for number in (5, 3, 1):
        k = (number + sector) % 6
        channels.append(high - (high - low) * torch.minimum(k, 4 - k).clamp(0, 1))
    return torch.stack(channels, 1)


def _window_distances(query: Tensor, fitted: Tensor, inside: Tensor) -> Tensor:
    """Return for each window the residual energy over the contrast, (P, W); 0 outside of the source."""
    query, fitted = _blurred(query), _blurred(fitted)
    padded = functional.pad(fitted, [1] * 4, mode="replicate")
    side = query.shape[-1]
    moved = (padded[..., down : down + side, right : right + side] for down, right in _MISPLACED)
    energies = [_window_means((query - one).square().sum(1, keepdim=True)) for one in moved]
    residual = torch.stack(energies).amin(0)
    contrast = (_variance(query) + _variance(fitted)) / 2
    is_whole = _window_means(inside) > 0.99
    return (residual / (contrast + _NOISE) * is_whole).flatten(1)


def _mean_of_worst(windows: Tensor) -> Tensor:
    return windows.topk(math.ceil(_WORST * windows.shape[1]), dim=1).values.mean(1)


def _chroma_change(before: Tensor, after: Tensor) -> Tensor:
    """Return how much the fitted change of colour moves the chroma where it moves it most, as a share of it, (P,)."""

    def energy(chroma: Tensor) -> Tensor:
        return _mean_of_worst(_window_means(chroma.square().sum(1, keepdim=True)).flatten(1))

    return energy(after[:, 1:] - before[:, 1:]) / (energy(before[:, 1:]) + 0.003)


def _blurred(images: Tensor) -> Tensor:
    """Return means over 3 x 3: what compression and resizing change is smaller than that."""
    return functional.avg_pool2d(functional.pad(images, [1] * 4, mode="replicate"), 3, 1)


def _window_means(images: Tensor) -> Tensor:
    """Return means over windows of an eighth of the edge, half a window apart."""
    size = images.shape[-1] // 8
    return functional.avg_pool2d(images, size, (size + 1) // 2)


def _variance(images: Tensor) -> Tensor:
    mean, mean_square = (_window_means(one) for one in (images, images.square()))
    return (mean_square - mean.square()).sum(1, keepdim=True).clamp(min=0)
