"""Bins for the timesteps of every convention."""

import math

import pytest
import torch

from sd_memguard.core.timesteps import TimestepBins


def test_integers_are_their_own_bins():
    timesteps = torch.arange(1000)
    assert torch.equal(TimestepBins()(timesteps), timesteps)
    assert torch.equal(TimestepBins()(timesteps.int()), timesteps)


def test_integers_beyond_the_bins_are_put_in_the_last():
    assert TimestepBins()(torch.tensor([1000, 5000, -3])).tolist() == [999, 999, 0]


def test_sigmas_of_all_timesteps_round_to_them():
    """t / 1000 * 1000 is a little less than t in float32 for some."""
    timesteps = torch.arange(1000)
    assert torch.equal(TimestepBins()(timesteps / 1000), timesteps)
    assert TimestepBins()(torch.tensor([0.0, 1.0])).tolist() == [0, 999]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_precisions(dtype):
    bins = TimestepBins()(torch.tensor([0.125, 0.5, 0.75], dtype=dtype))
    assert bins.dtype == torch.int64
    assert bins.tolist() == [125, 500, 750]


def test_float_timesteps_are_rounded_down():
    assert TimestepBins()(torch.tensor([0.4, 17.9, 999.9, 1000.0])).tolist() == [0, 17, 999, 999]


def test_other_numbers_of_bins():
    assert TimestepBins(8)(torch.tensor([0, 7])).tolist() == [0, 7]
    assert TimestepBins(8)(torch.tensor([0.0, 0.5, 0.99])).tolist() == [0, 4, 7]
    assert TimestepBins(8)(torch.tensor([0.0, 500.0, 1000.0])).tolist() == [0, 4, 7]


def test_c_noise_of_edm():
    sigmas = torch.tensor([0.002, 0.5, 1.0, 80.0, 700.0])
    bins = TimestepBins()(sigmas.log() / 4).tolist()
    assert bins == sorted(set(bins))
    assert bins[0] < 20
    assert bins[-1] < 999


def test_convention_is_that_of_the_run():
    """A batch of small numbers alone is still of float timesteps once a large one was seen, also after a resume."""
    bins = TimestepBins()
    assert bins.convention() == "integer timesteps"
    bins(torch.tensor([0.5, 900.0]))
    assert bins.convention() == "float timesteps"
    resumed = TimestepBins()
    resumed.load_state_dict(bins.state_dict())
    assert bins(torch.tensor([0.9])).tolist() == resumed(torch.tensor([0.9])).tolist() == [0]
    sigmas = TimestepBins()
    assert sigmas(torch.tensor([0.9])).tolist() == [900]
    assert sigmas.convention() == "sigmas"
    c_noise = TimestepBins()
    c_noise(torch.tensor([-0.3]))
    assert c_noise.convention() == "EDM's c_noise"
    assert c_noise(torch.tensor([0.0])).tolist() == [484]


def test_angles_of_trigflow_are_in_order():
    bins = TimestepBins()(torch.tensor([0.0, 0.4, 1.2, math.pi / 2])).tolist()
    assert bins == sorted(set(bins))


def test_no_numbers_are_in_the_first_bin():
    assert TimestepBins()(torch.tensor([math.nan, 0.5])).tolist() == [0, 500]
