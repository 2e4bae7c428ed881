"""From pictures to tensors: resized, cropped, moved, mirrored and augmented; every random choice has an address."""

import math

import torch
from PIL.Image import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms import InterpolationMode, RandAugment
from torchvision.transforms import functional as TF  # noqa: N812 (torchvision's own convention)

from sd_memguard.config import TrainConfig
from sd_memguard.core.seeding import Address, derive_seed, draw_integers, generator_for
from sd_memguard.core.visits import Visit
from sd_memguard.training.samples import SampleError, Samples


class Preprocess:
    """Resize, crop, move, flip and normalize one picture; every random choice has an address.

    Args:
        config: resolution, crop, random affine map, flip and interpolation.
        seed: seed of the run.
    """

    def __init__(self, config: TrainConfig, seed: int) -> None:
        self.resolution, self.center_crop, self.random_flip = config.resolution, config.center_crop, config.random_flip
        self.random_affine = float(config.random_affine)  # `auto` is settled by now
        self.interpolation = InterpolationMode[config.image_interpolation_mode.upper()]
        self.seed = seed

    def __call__(self, image: Image, address: Address, magnitude: int | None = None) -> Tensor:
        """Return the picture at an address, (3, resolution, resolution) in [-1, 1]; with a magnitude by RandAugment."""
        image = self.resize(image)
        if magnitude is not None:
            image = self._augment(image, address, magnitude)
        return self.normalize(self._crop(image, address), flip=bool(self.flips([address])[0]))

    def fixed(self, image: Image, *, flip: bool = False) -> Tensor:
        """Return the picture center-cropped, (3, resolution, resolution) in [-1, 1]."""
        return self.normalize(TF.center_crop(self.resize(image), [self.resolution]), flip=flip)

    def resize(self, image: Image) -> Image:
        """Return the picture with its shorter side at the resolution."""
        return TF.resize(image, self.resolution, interpolation=self.interpolation)

    def normalize(self, image: Image, *, flip: bool) -> Tensor:
        """Return the picture as a tensor in [-1, 1], mirrored if asked."""
        tensor = TF.pil_to_tensor(image).float() / 127.5 - 1
        return tensor.flip(-1) if flip else tensor

    def flips(self, addresses: list[Address]) -> Tensor:
        """Return which pictures are mirrored, (B,) int64 of 0 and 1."""
        if not self.random_flip:
            return torch.zeros(len(addresses), dtype=torch.int64)
        return draw_integers(self.seed, "flip", addresses, 2)

    def _crop(self, image: Image, address: Address) -> Image:
        left, top = self._place(image, address)
        side = self.resolution
        if not self.random_affine:
            return TF.crop(image, top, left, side, side)
        return self._move(image, left, top, address)

    def _place(self, image: Image, address: Address) -> tuple[int, int]:
        """Return the left and upper edge of the square to take."""
        right, down = image.width - self.resolution, image.height - self.resolution
        if self.center_crop:
            return round(right / 2), round(down / 2)  # where torchvision's center crop is
        return self._draw("crop_left", right, address), self._draw("crop_top", down, address)

    def _draw(self, purpose: str, highest: int, address: Address) -> int:
        return int(draw_integers(self.seed, purpose, [address], highest + 1)) if highest else 0

    def _move(self, image: Image, left: int, top: int, address: Address) -> Image:
        """Return the square at a place, shifted, turned and zoomed about its middle.

        What lies around it in the picture comes in, and beyond the picture its mirror image: no corner is left empty,
        which a model would learn to draw.
        """
        side = self.resolution
        right, down, turn, zoom = self._affine(address)
        margin = math.ceil(_reach(self.random_affine) * side) + 2  # what bicubic interpolation takes in
        around = TF.crop(TF.pad(image, [margin], padding_mode="reflect"), top, left, *[side + 2 * margin] * 2)
        moved = TF.affine(
            around,
            angle=math.degrees(2 * turn),
            translate=[round(right * side), round(down * side)],
            scale=1 + 2 * zoom,
            shear=[0.0],
            interpolation=InterpolationMode.BICUBIC,
        )
        return TF.center_crop(moved, [side])

    def _affine(self, address: Address) -> list[float]:
        """Return by which share of its side the edge of a picture moves: to the right, down, by a turn, by a zoom."""
        draws = torch.rand(4, generator=generator_for(self.seed, "affine", *address), dtype=torch.float64)
        shares: list[float] = ((2 * draws - 1) * self.random_affine).tolist()
        return shares

    def _augment(self, image: Image, address: Address, magnitude: int) -> Image:
        # torchvision's transform draws from the global generator alone: lend it a forked one.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive_seed(self.seed, "augment", *address))
            return RandAugment(num_ops=2, magnitude=magnitude)(image)


class PixelDataset(Dataset[Tensor | str]):
    """The pictures of visits as tensors, for a DataLoader with workers; of one that cannot be read, the reason."""

    def __init__(self, samples: Samples, preprocess: Preprocess) -> None:
        self.samples, self.preprocess = samples, preprocess

    def __getitem__(self, visit: Visit) -> Tensor | str:
        """Return the picture of one visit, (3, resolution, resolution), or why there is none."""
        return self.read(visit.sample_id, visit_address(visit))

    def read(self, sample_id: int, address: Address, magnitude: int | None = None) -> Tensor | str:
        """Return the picture at an address, by RandAugment where there is a magnitude."""
        try:
            return self.preprocess(self.samples.image(sample_id), address, magnitude)
        except SampleError as error:
            return str(error)


def _reach(share: float) -> float:
    """Return how far beyond a square, in its sides, the source of a pixel can lie under the largest affine map."""
    turn, zoom = 2 * share, 1 - 2 * share
    return (0.5 + share) * (math.cos(turn) + math.sin(turn)) / zoom - 0.5


def visit_address(visit: Visit) -> Address:
    """Return the address of a visit's draws."""
    return (visit.shard_index, visit.pass_index, visit.sample_id)
