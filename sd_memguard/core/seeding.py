"""Randomness with an address: each draw has a seed of its own, derived from what it is for and where it stands.

So the order in which shards are trained, a resumed run, more workers or another batch size change no draw.
"""

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor


def derive_seed(seed: int, purpose: str, *position: int) -> int:
    """Return the 63-bit seed of one draw.

    Args:
        seed: the seed of the run.
        purpose: what is drawn, e.g. ``"noise"``; draws for different purposes are independent.
        *position: where the draw stands, e.g. shard, epoch and sample.

    >>> derive_seed(0, "noise", 1, 2) == derive_seed(0, "noise", 1, 2) != derive_seed(0, "noise", 2, 1)
    True
    """
    address = f"{seed}/{purpose}/{'/'.join(map(str, position))}".encode()
    return int.from_bytes(hashlib.blake2b(address, digest_size=8).digest(), "little") >> 1


def generator_for(seed: int, purpose: str, *position: int) -> torch.Generator:
    """Return a CPU generator for the draw at this address, see ``derive_seed``."""
    return torch.Generator().manual_seed(derive_seed(seed, purpose, *position))


def permutation(seed: int, purpose: str, *position: int, length: int) -> Tensor:
    """Return a permutation of ``0 .. length-1``, shape (length,), int64."""
    return torch.randperm(length, generator=generator_for(seed, purpose, *position))


Address = tuple[int, ...]


def draw_normal(seed: int, purpose: str, addresses: Sequence[Address], shape: tuple[int, ...]) -> Tensor:
    r"""Return standard normal draws, one of ``shape`` for each address, (len(addresses), \\*shape) float32."""
    return torch.stack([torch.randn(shape, generator=generator_for(seed, purpose, *a)) for a in addresses])


def draw_uniform(seed: int, purpose: str, addresses: Sequence[Address]) -> Tensor:
    """Return uniform draws in [0, 1), one for each address, (len(addresses),) float64."""
    draws = [torch.rand((), generator=generator_for(seed, purpose, *a), dtype=torch.float64) for a in addresses]
    return torch.stack(draws)


def draw_integers(seed: int, purpose: str, addresses: Sequence[Address], high: int) -> Tensor:
    """Return integers in ``0 .. high-1``, one for each address, (len(addresses),) int64."""
    return torch.stack([torch.randint(high, (), generator=generator_for(seed, purpose, *a)) for a in addresses])
