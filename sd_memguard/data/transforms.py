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
from sd_memguard.data.target_sizes import Size

NUM_AFFINE_VARIANTS = 8
"""Affine maps of each image under ``--random_affine``: so few that the latents of all can be kept."""


class View(NamedTuple):
    """A way in which an image is seen: by which of its affine maps, and whether flipped."""

    map: int
    flip: bool


class Preprocess:
    """Resize, crop, move, flip and normalize one image; every random choice has an address.

    Args:
        config: crop, random affine maps, flip and interpolation.
        seed: seed of the run.
        size: of what comes out.
    """

    def __init__(self, config: TrainConfig, seed: int, size: Size) -> None:
        self.size, self.center_crop, self.random_flip = size, config.center_crop, config.random_flip
        self.random_affine = float(config.random_affine)  # `auto` is resolved by now
        self.interpolation = InterpolationMode[config.image_interpolation_mode.upper()]
        self.seed = seed
        maps, flips = (
            range(NUM_AFFINE_VARIANTS if self.random_affine else 1),
            (False, True) if self.random_flip else (False,),
        )
        self.views = [View(number, flip) for number in maps for flip in flips]

    def __call__(self, image: Image, key: bytes, address: Address, magnitude: int | None = None) -> Tensor:
        """Return the image at an address, (3, height, width) in [-1, 1]; with a magnitude by RandAugment.

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
        """Return the middle of an image in one view, (3, height, width) in [-1, 1]."""
        image = self.resize(image)
        return self._seen(image, key, self._middle(*image.size), view)

    def fixed(self, image: Image) -> Tensor:
        """Return the middle of an image as it is, (3, height, width) in [-1, 1]."""
        return self.normalize(TF.center_crop(self.resize(image), [self.size.height, self.size.width]), flip=False)

    def resize(self, image: Image) -> Image:
        """Return the image as small as covers the size."""
        width, height = self._resized(*image.size)
        return TF.resize(image, [height, width], interpolation=self.interpolation)

    def normalize(self, image: Image, *, flip: bool) -> Tensor:
        """Return the image as a tensor in [-1, 1], flipped if asked."""
        tensor = TF.pil_to_tensor(image).float() / 127.5 - 1
        return tensor.flip(-1) if flip else tensor

    def sizes(self, width: int, height: int, key: bytes, address: Address | None) -> list[float]:
        """Return what a UNet is told of the sizes of an image and of its crop, see ``models.kinds.NUM_SIZES``.

        The edges of the crop are those in the image as it is seen: counted from the other side where it is flipped, and
        moved with the crop by an affine map, though never below 0: beyond the image lies its reflection, and of
        negative edges a pretrained model knows nothing.

        Args:
            width: of the image before it is resized, in pixels.
            height: the same.
            key: hash of its file.
            address: of the sample; None for the middle of the image as it is.
        """
        resized, size = self._resized(width, height), self.size
        left, top = self._middle(*resized) if address is None else self._place(*resized, address)
        view = View(0, flip=False) if address is None else self.views[int(self.choose_views([address])[0])]
        if view.flip:
            left = resized[0] - size.width - left
        if self.random_affine and address is not None:
            right, down, _, scale = self._map(key, view.map)
            by, across = 1 + 2 * scale, -right if view.flip else right
            left, top = (
                max(0, round((edge + side / 2) * by - side / 2) - round(shift * side))
                for edge, side, shift in ((left, size.width, across), (top, size.height, down))
            )
        return [float(number) for number in (height, width, top, left, size.height, size.width)]

    def _resized(self, width: int, height: int) -> tuple[int, int]:
        """Return width and height after ``resize``: one is that of the size, the other is cut off as by torchvision."""
        size = self.size
        if width * size.height <= height * size.width:
            return size.width, int(size.width * height / width)
        return int(size.height * width / height), size.height

    def choose_views(self, addresses: list[Address]) -> Tensor:
        """Return in which of the views images are seen, (B,) int64."""
        flips = maps = torch.zeros(len(addresses), dtype=torch.int64)
        if self.random_flip:
            flips = draw_integers(self.seed, "flip", addresses, 2)
        if self.random_affine:
            maps = draw_integers(self.seed, "map", addresses, NUM_AFFINE_VARIANTS)
        return maps * (2 if self.random_flip else 1) + flips

    def _place(self, width: int, height: int, address: Address) -> tuple[int, int]:
        """Return the left and upper edge of the crop to take of a resized image."""
        if self.center_crop or (width, height) == self.size:
            return self._middle(width, height)
        left, top = (
            int(draw_integers(self.seed, purpose, [address], extent - side + 1))
            for purpose, extent, side in (("crop_left", width, self.size.width), ("crop_top", height, self.size.height))
        )
        return left, top

    def _middle(self, width: int, height: int) -> tuple[int, int]:
        """Return the left and upper edge of torchvision's center crop of a resized image."""
        return round((width - self.size.width) / 2), round((height - self.size.height) / 2)

    def _seen(self, image: Image, key: bytes, place: tuple[int, int], view: View) -> Tensor:
        """Return the crop at a place in one view."""
        left, top = place
        if self.random_affine:
            crop = self._move(image, left, top, self._map(key, view.map))
        else:
            crop = TF.crop(image, top, left, self.size.height, self.size.width)
        return self.normalize(crop, flip=view.flip)

    def _move(self, image: Image, left: int, top: int, moved_by: Sequence[float]) -> Image:
        """Return the crop at a place, translated, rotated and scaled about its middle.

        What lies around it in the image comes in, and beyond the image its reflection: no corner is left empty,
        which a model would learn to generate.
        """
        width, height = self.size
        right, down, rotation, scale = moved_by
        across, along = (
            math.ceil(_reach(self.random_affine, other / side) * side) + 2  # what bicubic interpolation takes in
            for side, other in ((width, height), (height, width))
        )
        padded = TF.pad(image, [across, along], padding_mode="reflect")
        around = TF.crop(padded, top, left, height + 2 * along, width + 2 * across)
        moved = TF.affine(
            around,
            angle=math.degrees(2 * rotation),
            translate=[round(right * width), round(down * height)],
            scale=1 + 2 * scale,
            shear=[0.0],
            interpolation=InterpolationMode.BICUBIC,
        )
        return TF.center_crop(moved, [height, width])

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
    """The images of samples as tensors, for a DataLoader with workers; of one that cannot be read, the reason.

    Args:
        samples: the images.
        preprocess: that of each bucket.
    """

    def __init__(self, samples: Samples, preprocess: Sequence[Preprocess]) -> None:
        self.samples, self.preprocess = samples, preprocess

    def __getitem__(self, ref: SampleRef) -> Tensor | str:
        """Return the image of one sample, (3, height, width), or why there is none."""
        return self.read(ref.sample_id, sample_address(ref), ref.bucket)

    def read(self, sample_id: int, address: Address, bucket: int = 0, magnitude: int | None = None) -> Tensor | str:
        """Return the image at an address in the size of a bucket, by RandAugment where there is a magnitude."""
        try:
            key, image = self.samples.keyed_image(sample_id)
        except SampleError as error:
            return str(error)
        return self.preprocess[bucket](image, key, address, magnitude)


def sample_address(ref: SampleRef) -> Address:
    """Return the address of a sample's random numbers."""
    return (ref.shard_index, ref.epoch_index, ref.sample_id)


def _reach(share: float, other: float) -> float:
    """Return how far beyond a crop the source of a pixel can lie under the largest affine map.

    Args:
        share: by which share of its sides the crop moves.
        other: the crop's other side, in units of the side that the result is in, too.
    """
    rotation, scale = 2 * share, 1 - 2 * share
    return (0.5 + share) * (math.cos(rotation) + math.sin(rotation) * other) / scale - 0.5
