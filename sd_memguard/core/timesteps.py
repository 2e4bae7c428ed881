"""Bins of the memory bank for whatever a denoiser is given as its timestep.

Four conventions are in use, and the numbers tell them apart:

==================  ============  =================================  =========================================
convention          numbers       bin (``num_timesteps`` = 1000)     who
==================  ============  =================================  =========================================
integer timesteps   0 .. 999      the timestep                       SD 1.x, 2.x, SDXL, Kandinsky, PixArt
float timesteps     up to 1000    floor(t)                           SD3, Sana, HiDream, AuraFlow
sigmas              0 .. 1        floor(1000 sigma)                  Flux, Flux.2, Qwen-Image, Z-Image, Lumina2
EDM's c_noise       ln(sigma)/4   equal widths over -1.6 .. 1.7      ``EDMEulerScheduler``
==================  ============  =================================  =========================================

Some models count the other way (Z-Image and Lumina2 are given 1 - sigma): a bin is then another noise level, and since
it is the same one throughout a run, nothing else changes.

A tensor of integers is of the first kind. For floats the smallest and largest number seen so far in the run decide: a
negative one has only c_noise, one above 2 has only float timesteps. Both are kept on the device, so that the host
waits for nothing; the first few samples of a run may be put in the bins of another convention until a number has shown
which one it is, and no decision is due by then.
"""

import math
from typing import Any

import torch
from torch import Tensor

C_NOISE_RANGE = (-1.6, 1.7)
"""ln(sigma) / 4 for sigma from 0.002 (https://arxiv.org/abs/2206.00364, table 1) to 900."""
LARGEST_SIGMA = 2.0
"""Above it a float is a timestep: sigmas end at 1, angles of TrigFlow (https://arxiv.org/abs/2410.11081) at pi / 2."""
ROUNDING = 5e-3
"""What is added before rounding down, since (7 / 1000) * 1000 is 6.9999995 in float32."""
FLOAT_TIMESTEPS = 1000.0
"""Where float timesteps end, whatever the number of bins."""


class TimestepBins:
    """Maps what a denoiser is given as its timestep to bins 0 .. ``num_timesteps`` - 1.

    Args:
        num_timesteps: number of bins.

    >>> bins = TimestepBins()
    >>> bins(torch.tensor([0, 999, 1000])).tolist()
    [0, 999, 999]
    >>> bins(torch.tensor([0.007, 0.25, 1.0])).tolist()
    [7, 250, 999]
    >>> bins(torch.tensor([7.0, 998.3])).tolist()
    [7, 998]
    """

    def __init__(self, num_timesteps: int = 1000) -> None:
        self.num_timesteps = num_timesteps
        self.smallest = torch.tensor(math.inf)
        self.largest = torch.tensor(-math.inf)

    def __call__(self, timesteps: Tensor) -> Tensor:
        """Return the bins, (n,) int64.

        Args:
            timesteps: (n,), integers or floats of any convention.
        """
        last = self.num_timesteps - 1
        if not timesteps.is_floating_point():
            return timesteps.long().clamp(0, last)
        # bfloat16 and float16 hold no more than 1000 of these anyway; the arithmetic is done in float32
        values = timesteps.detach().float()
        self.smallest = torch.minimum(self.smallest.to(values.device), values.min())
        self.largest = torch.maximum(self.largest.to(values.device), values.max())
        low, high = C_NOISE_RANGE
        scale = torch.where(self.largest > LARGEST_SIGMA, self.num_timesteps / FLOAT_TIMESTEPS, self.num_timesteps)
        scale = torch.where((self.largest > 1) & (self.largest <= LARGEST_SIGMA), scale / LARGEST_SIGMA, scale)
        bins = torch.where(
            self.smallest < 0,
            (values - low) * (self.num_timesteps / (high - low)),
            values * scale + ROUNDING,
        )
        return bins.nan_to_num(0.0).floor().long().clamp(0, last)

    def convention(self) -> str:
        """Return which convention the floats seen so far are of, in words; reads the device."""
        smallest, largest = float(self.smallest), float(self.largest)
        if smallest > largest:
            return "integer timesteps"
        if smallest < 0:
            return "EDM's c_noise"
        return "float timesteps" if largest > LARGEST_SIGMA else "sigmas"

    def state_dict(self) -> dict[str, Any]:
        """Return the range of the floats seen."""
        return {"smallest": self.smallest, "largest": self.largest}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a saved range."""
        self.smallest, self.largest = state["smallest"].clone(), state["largest"].clone()
