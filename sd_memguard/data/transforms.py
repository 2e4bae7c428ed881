"""From images to tensors: resized, cropped, moved, flipped and augmented; every random choice has an address."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from PIL.Image import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms import InterpolationMode, RandAugment
from torchvision.transforms import functional as TF  # noqa: N812 (torchvision's own convention)

from sd_memguard.config import TrainConfig
from sd_memguard.core.augmentation import NUM_OPERATIONS
from sd_memguard.core.sampler import SampleRef
from sd_memguard.core.seeding import Address, derive_seed, draw_integers, generator_for
from sd_memguard.data.samples import SampleError, Samples

NUM_AFFINE_VARIANTS = 8
"""Affine maps of each image under ``--random_affine``: so few that the latents of all can be kept."""


class View(NamedTuple):
    """A way in which an image is seen: by which of its affine maps, and whether flipped."""

    map: int
    flip: bool


class Preprocess:
    """Resize, crop, move, flip and normalize one image; every random choice has an address.

    Args:
        config: resolution, crop, random affine maps, flip and interpolation.
        seed: seed of the run.
    """

    def __init__(self, config: TrainConfig, seed: int) -> None:
        self.resolution, self.center_crop, self.random_flip = config.resolution, config.center_crop, config.random_flip
        self.random_affine = float(config.random_affine)  # `auto` is resolved by now
        self.interpolation = InterpolationMode[config.image_interpolation_mode.upper()]
        self.seed = seed
        maps, flips = (
            range(NUM_AFFINE_VARIANTS if self.random_affine else 1),
            (False, True) if self.random_flip else (False,),
        )
        self.views = [View(number, flip) for number in maps for flip in flips]

    def __call__(self, image: Image, key: bytes, address: Address, magnitude: int | None = None) -> Tensor:
        """Return the image at an address, (3, resolution, resolution) in [-1, 1]; with a magnitude by RandAugment.

        Args:
            image: the image.
            key: hash of its file, by which its affine variants are chosen: they are the same in every run.
            address: of the sample, by which crop and view are chosen.
            magnitude: of RandAugment, of 30; None for the image as it is.
        """
        image = self.resize(image)
        if magnitude is not None:
            image = self._augment(image, address, magnitude)
        view = self.views[int(self.choose_views([address])[0])]
        return self._seen(image, key, self._place(*image.size, address), view)

    def centered(self, image: Image, key: bytes, view: View) -> Tensor:
        """Return the middle of an image in one view, (3, resolution, resolution) in [-1, 1]."""
        image = self.resize(image)
        return self._seen(image, key, self._middle(*image.size), view)

    def fixed(self, image: Image) -> Tensor:
        """Return the middle of an image as it is, (3, resolution, resolution) in [-1, 1]."""
        return self.normalize(TF.center_crop(self.resize(image), [self.resolution]), flip=False)

    def resize(self, image: Image) -> Image:
        """Return the image with its shorter side at the resolution."""
        return TF.resize(image, self.resolution, interpolation=self.interpolation)

    def normalize(self, image: Image, *, flip: bool) -> Tensor:
        """Return the image as a tensor in [-1, 1], flipped if asked."""
        tensor = TF.pil_to_tensor(image).float() / 127.5 - 1
        return tensor.flip(-1) if flip else tensor

    def sizes(self, width: int, height: int, key: bytes, address: Address | None) -> list[float]:
        """Return what a UNet is told of the sizes of an image and of its square, see ``models.kinds.NUM_SIZES``.

        The edges of the crop are those in the image as it is seen: counted from the other side where it is flipped, and
        moved with the square by an affine map, though never below 0: beyond the image lies its reflection, and of
        negative edges a pretrained model knows nothing.

        Args:
            width: of the image before it is resized, in pixels.
            height: the same.
            key: hash of its file.
            address: of the sample; None for the middle of the image as it is.
        """
        resized = self._resized(width, height)
        left, top = self._middle(*resized) if address is None else self._place(*resized, address)
        view = View(0, flip=False) if address is None else self.views[int(self.choose_views([address])[0])]
        if view.flip:
            left = resized[0] - self.resolution - left
        if self.random_affine and address is not None:
            right, down, _, scale = self._map(key, view.map)
            side, by = self.resolution, 1 + 2 * scale
            left, top = (
                max(0, round((edge + side / 2) * by - side / 2) - round(shift * side))
                for edge, shift in ((left, -right if view.flip else right), (top, down))
            )
        return [float(number) for number in (height, width, top, left, self.resolution, self.resolution)]

    def _resized(self, width: int, height: int) -> tuple[int, int]:
        """Return width and height after ``resize``, as torchvision computes them."""
        shorter, longer = sorted((width, height))
        stretched = int(self.resolution * longer / shorter)
        return (self.resolution, stretched) if width <= height else (stretched, self.resolution)

    def choose_views(self, addresses: list[Address]) -> Tensor:
        """Return in which of the views images are seen, (B,) int64."""
        flips = maps = torch.zeros(len(addresses), dtype=torch.int64)
        if self.random_flip:
            flips = draw_integers(self.seed, "flip", addresses, 2)
        if self.random_affine:
            maps = draw_integers(self.seed, "map", addresses, NUM_AFFINE_VARIANTS)
        return maps * (2 if self.random_flip else 1) + flips

    def _place(self, width: int, height: int, address: Address) -> tuple[int, int]:
        """Return the left and upper edge of the square to take of a resized image."""
        if self.center_crop or width == height:
            return self._middle(width, height)
        left, top = (
            int(draw_integers(self.seed, purpose, [address], extent - self.resolution + 1))
            for purpose, extent in (("crop_left", width), ("crop_top", height))
        )
        return left, top

    def _middle(self, width: int, height: int) -> tuple[int, int]:
        """Return the left and upper edge of torchvision's center crop of a resized image."""
        return round((width - self.resolution) / 2), round((height - self.resolution) / 2)

    def _seen(self, image: Image, key: bytes, place: tuple[int, int], view: View) -> Tensor:
        """Return the square at a place in one view."""
        left, top = place
        if self.random_affine:
            square = self._move(image, left, top, self._map(key, view.map))
        else:
            square = TF.crop(image, top, left, self.resolution, self.resolution)
        return self.normalize(square, flip=view.flip)

    def _move(self, image: Image, left: int, top: int, moved_by: Sequence[float]) -> Image:
        """Return the square at a place, translated, rotated and scaled about its middle.

        What lies around it in the image comes in, and beyond the image its reflection: no corner is left empty,
        which a model would learn to generate.
        """
        side = self.resolution
        right, down, rotation, scale = moved_by
        margin = math.ceil(_reach(self.random_affine) * side) + 2  # what bicubic interpolation takes in
        around = TF.crop(TF.pad(image, [margin], padding_mode="reflect"), top, left, *[side + 2 * margin] * 2)
        moved = TF.affine(
            around,
            angle=math.degrees(2 * rotation),
            translate=[round(right * side), round(down * side)],
            scale=1 + 2 * scale,
            shear=[0.0],
            interpolation=InterpolationMode.BICUBIC,
        )
        return TF.center_crop(moved, [side])

    def _map(self, key: bytes, number: int) -> list[float]:
        """Return by which share of its side the edge of an image moves: to the right, down, by rotation, by scale."""
        generator = generator_for(0, "affine", int.from_bytes(key), number)
        shares: list[float] = ((2 * torch.rand(4, generator=generator) - 1) * self.random_affine).tolist()
        return shares

    def _augment(self, image: Image, address: Address, magnitude: int) -> Image:
        # torchvision's transform uses the global generator alone: lend it a forked one.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive_seed(self.seed, "augment", *address))
            return RandAugment(num_ops=NUM_OPERATIONS, magnitude=magnitude)(image)


class PixelDataset(Dataset[Tensor | str]):
    """The images of samples as tensors, for a DataLoader with workers; of one that cannot be read, the reason."""

    def __init__(self, samples: Samples, preprocess: Preprocess) -> None:
        self.samples, self.preprocess = samples, preprocess

    def __getitem__(self, ref: SampleRef) -> Tensor | str:
        """Return the image of one sample, (3, resolution, resolution), or why there is none."""
        return self.read(ref.sample_id, sample_address(ref))

    def read(self, sample_id: int, address: Address, magnitude: int | None = None) -> Tensor | str:
        """Return the image at an address, by RandAugment where there is a magnitude."""
        try:
            key, image = self.samples.keyed_image(sample_id)
        except SampleError as error:
            return str(error)
        return self.preprocess(image, key, address, magnitude)


def sample_address(ref: SampleRef) -> Address:
    """Return the address of a sample's random numbers."""
    return (ref.shard_index, ref.epoch_index, ref.sample_id)


def _reach(share: float) -> float:
    """Return how far beyond a square, in its sides, the source of a pixel can lie under the largest affine map."""
    rotation, scale = 2 * share, 1 - 2 * share
    return (0.5 + share) * (math.cos(rotation) + math.sin(rotation)) / scale - 0.5
