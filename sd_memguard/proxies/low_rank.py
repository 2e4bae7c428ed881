"""The factors of a low rank that are nearest to a matrix (Eckart-Young)."""

import torch
from torch import Tensor
from torch.nn.functional import pad


def best_factors(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return the (rank, in) and (out, rank) factors nearest to an (out, in) matrix in float64, both of one scale.

    They come from the eigenvectors of the smaller of ``M M^T`` and ``M^T M``, many times quicker than an SVD of the
    long matrices of convolutions. In float64 that loses singular values below 1e-8 of the largest one.
    """
    if matrix.shape[0] > matrix.shape[1]:
        down, up = best_factors(matrix.T, rank)
        return up.T, down.T
    left = torch.linalg.eigh(matrix @ matrix.T).eigenvectors[:, -rank:].flip(1)
    right = left.T @ matrix
    root = right.norm(dim=1).sqrt()
    down, up = right / root.clamp_min(1e-150)[:, None], left * root
    padding = rank - len(root)
    return pad(down, (0, 0, 0, padding)), pad(up, (0, padding))


def best_factors_of_product(up: Tensor, down: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return the same of ``up @ down``, (out, n) and (n, in), without forming it where n is small."""
    size = up.shape[1]
    if size >= min(up.shape[0], down.shape[1]):
        return best_factors(up @ down, rank)
    left, inner = torch.linalg.qr(up)
    right, outer = torch.linalg.qr(down.T)
    core_down, core_up = best_factors(inner @ outer.T, rank)
    return core_down @ right.T, left @ core_up
