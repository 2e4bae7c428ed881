"""The small network behind the extractor `bundled`: images to unit vectors that stay put when an image is copied.

`tools/build_copy_descriptor.py` trains it, in the manner of SSCD (Pizzi et al. 2022, arXiv 2202.10261).
"""

import torch
from torch import Tensor, nn

SIZE = 64
"""Edge of the images it takes, in pixels."""

DIMENSIONS = 128
CHANNELS = (24, 48, 96, 128)


class CopyDescriptor(nn.Module):
    """A convolutional network of 0.5M weights; four halvings keep a 4 x 4 grid, so that the layout counts."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        for index, width in enumerate(CHANNELS):
            layers += _block(channels, width, kernel=3 if index else 5, stride=2)
            if index in (1, 2):
                layers += _block(width, width, kernel=3, stride=1)
            channels = width
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(channels * (SIZE // 2 ** len(CHANNELS)) ** 2, DIMENSIONS)

    def forward(self, images: Tensor) -> Tensor:
        """Return unit vectors (B, 128) of images (B, 3, 64, 64) in 0..1."""
        return torch.nn.functional.normalize(self.head(self.body(2 * images - 1).flatten(1)), dim=1)


def _block(channels: int, width: int, *, kernel: int, stride: int) -> list[nn.Module]:
    return [nn.Conv2d(channels, width, kernel, stride, padding=kernel // 2), nn.GroupNorm(8, width), nn.SiLU()]
