import hashlib

import pytest
import torch

from sd_memguard.core.seeding import derive_seed, draw_integers, draw_normal, draw_uniform, generator_for, permutation

ADDRESSES = [(shard, passed, sample) for shard in range(2) for passed in range(2) for sample in range(300)]


@pytest.mark.parametrize(
    ("address", "digest"),
    # `printf 0/noise/1/2 | b2sum -l 64`: eight bytes, read from the little end, without the lowest bit.
    [
        ((0, "noise", 1, 2), "7731d8cb0586c4e3"),
        ((7, "order", 3), "42833a20cf940b8a"),
        ((0, "noise"), "f8048b7735ccb7a8"),
    ],
)
def test_golden_seeds(address, digest):
    assert derive_seed(*address) == int.from_bytes(bytes.fromhex(digest), "little") >> 1


def test_each_part_of_the_address_counts():
    seeds = {
        derive_seed(seed, purpose, *position)
        for seed in (0, 1, 10)
        for purpose in ("noise", "timestep")
        for position in ((), (0,), (1,), (0, 1), (1, 0), (11,), (1, 1), (0, 0, 0))
    }
    assert len(seeds) == 3 * 2 * 8
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_a_draw_depends_on_its_address_alone():
    together = draw_normal(5, "noise", ADDRESSES[:6], (2, 3))
    assert together.shape == (6, 2, 3)
    torch.manual_seed(123)  # the global generator is neither read nor moved
    state = torch.get_rng_state()
    for address, draw in zip(reversed(ADDRESSES[:6]), together.flip(0), strict=True):
        assert torch.equal(draw_normal(5, "noise", [address], (2, 3))[0], draw)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(together[0], torch.randn((2, 3), generator=generator_for(5, "noise", *ADDRESSES[0])))


def test_draws_at_near_addresses_are_independent():
    normal = draw_normal(0, "noise", ADDRESSES, ()).double()
    other = draw_normal(0, "other", ADDRESSES, ()).double()
    bound = 4 / len(ADDRESSES) ** 0.5  # four standard errors
    assert abs(normal.mean()) < bound
    assert abs(torch.corrcoef(torch.stack((normal, other)))[0, 1]) < bound
    assert abs(torch.corrcoef(torch.stack((normal[1:], normal[:-1])))[0, 1]) < bound
    uniform = draw_uniform(0, "flip", ADDRESSES)
    assert (uniform.min() >= 0, uniform.max() < 1, abs(uniform.mean() - 0.5) < bound) == (True, True, True)
    integers = draw_integers(0, "timestep", ADDRESSES, 4)
    counts = torch.bincount(integers, minlength=5)
    assert counts[4] == 0
    assert (counts[:4] - len(ADDRESSES) / 4).abs().max() < 4 * (len(ADDRESSES) * 3 / 16) ** 0.5


def test_permutation():
    one, again, other = (permutation(0, "order", k, length=20) for k in (0, 0, 1))
    assert sorted(one.tolist()) == list(range(20))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    assert permutation(0, "order", length=0).tolist() == []


def test_seeds_do_not_hang_on_the_hash_of_python():
    assert derive_seed(1, "a") == int.from_bytes(hashlib.blake2b(b"1/a/", digest_size=8).digest(), "little") // 2
