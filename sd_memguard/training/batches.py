"""From visits to tensors: pictures become latents and captions embeddings, once where that is exact, else each time.

A latent is exact to cache when the crop is the same at every visit (center crop, or pictures that are square): both
flips are encoded, and the VAE's mean and variance are kept so that the latent is still drawn anew at each visit.
"""

import logging
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
import psutil
import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from PIL.Image import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import InterpolationMode, RandAugment
from torchvision.transforms import functional as TF  # noqa: N812 (torchvision's own convention)
from tqdm import tqdm

from sd_memguard.config import ConfigError, TrainConfig
from sd_memguard.core.seeding import Address, derive_seed, draw_integers, draw_normal, draw_uniform
from sd_memguard.core.visits import Visit
from sd_memguard.training.models import Models
from sd_memguard.training.samples import SampleError, Samples

logger = logging.getLogger(__name__)

CACHE_SHARE = 0.25
"""Share of the free host memory that each cache may take under ``auto``."""


class Batch(NamedTuple):
    """What one forward takes, float32 on the device: scaled latents (B, C, h, w), embeddings (B, tokens, width)."""

    latents: Tensor
    embeddings: Tensor


NOTHING = Batch(torch.empty(0), torch.empty(0))
"""The batch of no visits."""


class Preprocess:
    """Resize, crop, flip and normalize one picture; every random choice has an address.

    Args:
        config: resolution, crop, flip and interpolation.
        seed: seed of the run.
    """

    def __init__(self, config: TrainConfig, seed: int) -> None:
        self.resolution, self.center_crop, self.random_flip = config.resolution, config.center_crop, config.random_flip
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
        if self.center_crop or image.width == image.height:
            return TF.center_crop(image, [self.resolution])
        left, top = (
            int(draw_integers(self.seed, purpose, [address], extent - self.resolution + 1))
            for purpose, extent in (("crop_left", image.width), ("crop_top", image.height))
        )
        return TF.crop(image, top, left, self.resolution, self.resolution)

    def _augment(self, image: Image, address: Address, magnitude: int) -> Image:
        # torchvision's transform draws from the global generator alone: lend it a forked one.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive_seed(self.seed, "augment", *address))
            return RandAugment(num_ops=2, magnitude=magnitude)(image)


class Captions:
    """Which caption is read at a visit: one of the sample's, or none at the rate of the caption dropout."""

    def __init__(self, samples: Samples, dropout: float, seed: int) -> None:
        self.samples, self.dropout, self.seed = samples, dropout, seed

    def __call__(self, sample_id: int, address: Address) -> str:
        """Return the caption at an address."""
        if self.dropout and draw_uniform(self.seed, "caption_dropout", [address]) < self.dropout:
            return ""
        captions = self.samples.captions(sample_id)
        if len(captions) == 1:
            return captions[0]
        return captions[int(draw_integers(self.seed, "caption", [address], len(captions)))]


class Encoders:
    """The frozen VAE and text encoder.

    Args:
        models: the pipeline's parts.
        device: where they run.
        dtype: their precision; results come back in float32.
    """

    def __init__(self, models: Models, device: torch.device, dtype: torch.dtype) -> None:
        self.vae, self.text_encoder = models.vae.to(device), models.text_encoder.to(device)
        if dtype != torch.float32:
            self.vae.to(dtype)
            self.text_encoder.to(dtype)
        self.tokenizer, self.device, self.dtype = models.tokenizer, device, dtype

    def release(self) -> None:
        """Move the networks off the device."""
        self.vae.to("cpu")
        self.text_encoder.to("cpu")

    @torch.no_grad()
    def moments(self, pixels: Tensor) -> Tensor:
        """Return the VAE's mean and log variance of pictures (B, 3, H, W), (B, 2C, h, w) float32."""
        moments: Tensor = self.vae.encode(pixels.to(self.device, self.dtype)).latent_dist.parameters
        return moments.float()

    def latents(self, moments: Tensor, noise: Tensor | None = None) -> Tensor:
        """Return scaled latents drawn with the given noise (B, C, h, w), the mean without."""
        distribution = DiagonalGaussianDistribution(moments)
        latents = distribution.mean if noise is None else distribution.mean + distribution.std * noise
        scaled: Tensor = latents * self.vae.config.scaling_factor
        return scaled

    @torch.no_grad()
    def embeddings(self, captions: list[str]) -> Tensor:
        """Return the text embeddings of captions, (B, tokens, width) float32."""
        tokens = self.tokenizer(
            captions,
            max_length=self.tokenizer.model_max_length,
            padding="max_length",
            truncation=True,
            return_tensors="pt",
        )
        hidden: Tensor = self.text_encoder(tokens.input_ids.to(self.device), return_dict=False)[0]
        return hidden.float()


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


def visit_address(visit: Visit) -> Address:
    """Return the address of a visit's draws."""
    return (visit.shard_index, visit.pass_index, visit.sample_id)


class BatchSource:
    """Makes batches of visits.

    Args:
        samples: the captioned pictures.
        encoders: the frozen networks.
        config: preprocessing, caption dropout, workers and caches.
        seed: seed of the run.
        progress: whether to show a bar while the caches are filled.
        cache: whether there are caches at all.

    Raises:
        ConfigError: ``--cache_latents memory`` where a cached latent would not be exact.
    """

    def __init__(
        self,
        samples: Samples,
        encoders: Encoders,
        config: TrainConfig,
        seed: int,
        *,
        progress: bool = False,
        cache: bool = True,
    ) -> None:
        self.samples, self.encoders, self.seed, self.config = samples, encoders, seed, config
        self.preprocess = Preprocess(config, seed)
        self.pixels = PixelDataset(samples, self.preprocess)
        self.lost: set[int] = set()
        self.captions = Captions(samples, config.caption_dropout, seed)
        self._moments: Tensor | None = None
        self._embeddings: Tensor | None = None
        self._caption_rows: dict[str, int] = {}
        if cache and self._latents_fit():
            self._fill_latents(progress)
        captions = self._captions_to_cache() if cache else []
        if captions:
            self._fill_embeddings(captions, progress)

    def batches(self, visits: Iterable[list[Visit]]) -> Iterator[tuple[list[Visit], Batch]]:
        """Yield the batch of each list of visits, and the visits in it.

        A picture that was good when it was checked and cannot be read now is named once and left out of its batches;
        a batch may even be empty then.
        """
        if self._moments is not None:
            for chunk in visits:
                yield chunk, self._batch(chunk, self._cached_moments(chunk))
            return
        chunks = list(visits)
        loader = DataLoader(
            self.pixels,
            batch_sampler=chunks,
            num_workers=self.config.dataloader_num_workers,
            collate_fn=list,
            generator=torch.Generator(),  # else the loader draws its workers' seed from the global generator
        )
        for chunk, pixels in zip(chunks, loader, strict=True):
            kept = self._readable([visit.sample_id for visit in chunk], pixels)
            present = [chunk[position] for position in kept]
            yield present, self._batch(present, self._moments_at(kept, pixels)) if kept else NOTHING

    def augmented(self, sample_ids: list[int], addresses: list[Address], magnitude: int) -> tuple[list[Address], Batch]:
        """Return a batch of augmented copies and their addresses, without pictures that cannot be read any more.

        Nothing of it comes from a cache of pictures or enters one.
        """
        pixels = [self.pixels.read(*one, magnitude) for one in zip(sample_ids, addresses, strict=True)]
        kept = self._readable(sample_ids, pixels)
        if not kept:
            return [], NOTHING
        ids, present = [sample_ids[position] for position in kept], [addresses[position] for position in kept]
        return present, self._sampled(ids, present, self._moments_at(kept, pixels), purpose="augment_")

    def _readable(self, sample_ids: list[int], pixels: list[Tensor | str]) -> list[int]:
        """Return the positions of the pictures that could be read, and name the others, each once."""
        for sample_id, picture in zip(sample_ids, pixels, strict=True):
            if isinstance(picture, str) and sample_id not in self.lost:
                self.lost.add(sample_id)
                logger.warning("%s; the run goes on without it", picture)
        return [position for position, picture in enumerate(pixels) if isinstance(picture, Tensor)]

    def _moments_at(self, positions: list[int], pixels: list[Any]) -> Tensor:
        return self.encoders.moments(torch.stack([pixels[position] for position in positions]))

    def fixed(self, sample_ids: list[int]) -> Batch:
        """Return a batch without chance: center crop, no flip, the mean latent and the first caption."""
        pixels = torch.stack([self.preprocess.fixed(self.samples.image(sample_id)) for sample_id in sample_ids])
        captions = [self.samples.captions(sample_id)[0] for sample_id in sample_ids]
        return Batch(self.encoders.latents(self.encoders.moments(pixels)), self._embed(captions))

    @property
    def caches_everything(self) -> bool:
        """Whether both latents and text embeddings are cached, so that the encoders have nothing left to do."""
        return self._moments is not None and self._embeddings is not None

    def _batch(self, visits: list[Visit], moments: Tensor) -> Batch:
        return self._sampled([v.sample_id for v in visits], [visit_address(v) for v in visits], moments)

    def _sampled(self, sample_ids: list[int], addresses: list[Address], moments: Tensor, purpose: str = "") -> Batch:
        shape = (moments.shape[1] // 2, *moments.shape[2:])
        noise = draw_normal(self.seed, f"{purpose}latent", addresses, shape).to(moments.device)
        captions = [self.captions(sample_id, address) for sample_id, address in zip(sample_ids, addresses, strict=True)]
        return Batch(self.encoders.latents(moments, noise), self._embed(captions))

    def _embed(self, captions: list[str]) -> Tensor:
        if self._embeddings is None or any(caption not in self._caption_rows for caption in captions):
            return self.encoders.embeddings(captions)
        rows = torch.tensor([self._caption_rows[caption] for caption in captions])
        return self._embeddings[rows].to(self.encoders.device)

    def _cached_moments(self, visits: list[Visit]) -> Tensor:
        assert self._moments is not None
        rows = np.searchsorted(self.samples.sample_ids, [visit.sample_id for visit in visits])
        flips = self.preprocess.flips([visit_address(visit) for visit in visits])
        return self._moments[flips, torch.from_numpy(rows)].to(self.encoders.device)

    def _latents_fit(self) -> bool:
        mode = self.config.cache_latents
        sizes = self.samples.sizes[self.samples.sample_ids]
        exact = self.config.center_crop or bool((sizes[:, 0] == sizes[:, 1]).all())
        if mode == "memory" and not exact:
            raise ConfigError(
                "`--cache_latents memory` needs `--center_crop` (or square pictures): with random crops each visit has "
                "another latent; add `--center_crop`, or use `--cache_latents off`"
            )
        if mode == "off" or not exact:
            return False
        vae = self.encoders.vae.config
        side = self.config.resolution // 2 ** (len(vae.block_out_channels) - 1)
        size = 4 * len(sizes) * (1 + self.config.random_flip) * 2 * vae.latent_channels * side * side
        return mode == "memory" or size <= CACHE_SHARE * psutil.virtual_memory().available

    def _fill_latents(self, progress: bool) -> None:
        flips = (False, True) if self.config.random_flip else (False,)
        ids, size = self.samples.sample_ids.tolist(), self.config.train_batch_size
        chunks = [ids[start : start + size] for start in range(0, len(ids), size)]
        rows: list[list[Tensor]] = [[] for _ in flips]
        for chunk in tqdm(chunks, desc="caching latents", disable=not progress, leave=False):
            images = [self.samples.image(sample_id) for sample_id in chunk]
            for row, flip in zip(rows, flips, strict=True):
                pixels = torch.stack([self.preprocess.fixed(image, flip=flip) for image in images])
                row.append(self.encoders.moments(pixels).cpu())
        self._moments = torch.stack([torch.cat(row) for row in rows])

    def _captions_to_cache(self) -> list[str]:
        mode, ids = self.config.cache_text_embeddings, self.samples.sample_ids.tolist()
        if mode == "off":
            return []
        captions = {"": None} if self.config.caption_dropout else {}
        captions |= {caption: None for sample_id in ids for caption in self.samples.captions(sample_id)}
        encoder: Any = self.encoders.text_encoder.config
        size = 4 * len(captions) * self.encoders.tokenizer.model_max_length * encoder.hidden_size
        fits = mode == "memory" or size <= CACHE_SHARE * psutil.virtual_memory().available
        return list(captions) if fits else []

    def _fill_embeddings(self, captions: list[str], progress: bool) -> None:
        size = self.config.train_batch_size
        starts = tqdm(range(0, len(captions), size), desc="caching captions", disable=not progress, leave=False)
        self._embeddings = torch.cat([self.encoders.embeddings(captions[s : s + size]).cpu() for s in starts])
        self._caption_rows = {caption: row for row, caption in enumerate(captions)}
