"""The figures of one model: its generated images against the training images, its signals, its quality."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm.auto import tqdm

from sd_memguard.audit.collection import Collection
from sd_memguard.audit.features.cache import Store
from sd_memguard.audit.metrics.background import Gallery, Matched, PixelRatios
from sd_memguard.audit.metrics.evidence import Excess, above_others
from sd_memguard.audit.metrics.flow_signals import flow_losses, flow_text_signal
from sd_memguard.audit.metrics.shared_parts import SharedParts
from sd_memguard.audit.metrics.signals import LOSS_TIMESTEPS, denoising_losses, text_signal
from sd_memguard.audit.metrics.similarity import COPY_THRESHOLD
from sd_memguard.audit.metrics.statistics import (
    Estimate,
    area_under_curve,
    bootstrap,
    bootstrap_separation,
    mean,
    percentile,
    true_positive_rate,
)
from sd_memguard.audit.report import ALL, CopyFigures, Detection, Kind, Membership
from sd_memguard.core.seeding import generator_for

MQ_LEVELS = (0.2, 0.3, 0.4, 0.5, 0.6)


class GeneratedSet(NamedTuple):
    """The generated images of a model or of a folder, in the order of captions, n for each.

    Attributes:
        images: The generated images.
        kinds: One of ``KINDS`` for each generated image.
        per_caption: n.
        seeds: Of each generated image, empty where unknown.
        own: Holds the images whose captions are the prompts, None where they are not known.
        own_rows: The row in it of each generated image.
    """

    images: Collection
    kinds: Sequence[Kind]
    per_caption: int
    seeds: Sequence[int] = ()
    own: Collection | None = None
    own_rows: Sequence[int] = ()

    def by_caption(self, values: Tensor, kind: str) -> Tensor:
        """Return the values (N,) of a kind's images as (C, n); of ``all``, those of every image."""
        rows = [row for row, one in enumerate(self.kinds) if kind in (one, ALL)]
        return values[rows].unflatten(0, (-1, self.per_caption))

    def kinds_and_all(self) -> list[str]:
        """Return the kinds of the images, and ``all``."""
        return [*dict.fromkeys(self.kinds), ALL]


class Compared(NamedTuple):
    """What each of N generated images has in common with the training images.

    Attributes:
        nearest: The training image that it is a copy of, or else the most similar one.
        is_copy: Whether it is a copy, (N,) bool.
        own: Similarity to the image whose caption is the prompt, None where unknown.
        is_own_copy: Whether it is a copy of that, (N,) bool; None where that is no training image.
        is_own_nearest: Whether, by pixels, that is nearer than any other training image, (N,) bool; None where unknown.
        ratios: In pixels.
        distance: Smallest distance after registration, (N,); None where nothing is verified.
        num_matches: Most matches of local features with a training image, (N,); None where they are not looked for.
    """

    nearest: Matched
    is_copy: Tensor
    own: Tensor | None
    is_own_copy: Tensor | None
    is_own_nearest: Tensor | None
    ratios: PixelRatios
    distance: Tensor | None
    num_matches: Tensor | None = None

    def is_l2_copy(self) -> Tensor:
        """Whether each generated image is a copy by Carlini's rule in pixels, (N,) bool."""
        return self.ratios.l2 < COPY_THRESHOLD


class PartRule(NamedTuple):
    """Finds copied parts, and from how many matches on an image is a copy."""

    parts: SharedParts
    num_matches: int


def compare(
    generated: GeneratedSet,
    gallery: Gallery,
    threshold: float,
    copy_distance: float | None,
    part_rule: PartRule | None = None,
) -> Compared:
    """Return how the generated images compare with the training images.

    Args:
        generated: The generated images.
        gallery: The training images.
        threshold: Similarity of a copy where nothing is verified.
        copy_distance: Distance after registration up to which an image is a copy; None: by similarity alone.
        part_rule: By which an image with a copied part is a copy, too; None: parts are not looked for.
    """
    images, own, own_rows = generated.images, generated.own, generated.own_rows
    nearest, ratios = gallery.match(images), gallery.pixel_ratios(images)
    own_similarity = is_own_nearest = is_own_copy = None
    if own is not None:
        own_similarity = gallery.similarity_to(images, own, own_rows)
        # The own image of a training caption is in the gallery, hence the tolerance of rounding.
        is_own_nearest = gallery.pixel_distance_to(images, own, own_rows) <= ratios.nearest * (1 + 1e-5)
    if copy_distance is None:
        is_copy = nearest.similarity >= threshold
        if own is gallery.train and own_similarity is not None:
            is_own_copy = own_similarity >= threshold
        return Compared(nearest, is_copy, own_similarity, is_own_copy, is_own_nearest, ratios, None)
    verified = gallery.verify(images)
    is_copy = verified.distance <= copy_distance
    if own is gallery.train:
        is_own_copy = gallery.distance_to(images, own, own_rows) <= copy_distance
        is_copy = is_copy | is_own_copy
    source = Matched(
        torch.where(is_copy, verified.similarity, nearest.similarity), torch.where(is_copy, verified.row, nearest.row)
    )
    shared = None
    if part_rule is not None:
        shared = part_rule.parts.find(images)
        is_part = ~is_copy & (shared.num_matches >= part_rule.num_matches)
        similarity = gallery.similarity_to(images, gallery.train, shared.row.tolist())
        source = Matched(
            torch.where(is_part, similarity, source.similarity), torch.where(is_part, shared.row, source.row)
        )
        if own is gallery.train and is_own_copy is not None:
            is_own_copy |= part_rule.parts.with_own(images, own, own_rows) >= part_rule.num_matches
            is_copy = is_copy | is_own_copy
        is_copy = is_copy | is_part
    if is_own_copy is not None and own_similarity is not None:
        # The caption's own image counts first, where several of the set are one image.
        rows = torch.tensor(gallery.first_rows(own_rows))
        source = Matched(
            torch.where(is_own_copy, own_similarity, source.similarity), torch.where(is_own_copy, rows, source.row)
        )
    matches = None if shared is None else shared.num_matches
    return Compared(source, is_copy, own_similarity, is_own_copy, is_own_nearest, ratios, verified.distance, matches)


def copy_figures(generated: GeneratedSet, compared: Compared, seed: int) -> dict[str, CopyFigures]:
    """Return the figures on copies of each kind of captions and of all."""
    return {kind: _copies_of(kind, generated, compared, seed) for kind in generated.kinds_and_all()}


def _copies_of(kind: str, generated: GeneratedSet, compared: Compared, seed: int) -> CopyFigures:
    def of_kind(values: Tensor) -> Tensor:
        return generated.by_caption(values, kind)

    def estimate(values: Tensor, statistic: Callable[[Tensor], Tensor], what: str) -> Estimate:
        return bootstrap(of_kind(values).double(), statistic, generator_for(seed, f"bootstrap {what}"))

    is_copy, is_own, is_own_copy = compared.is_copy, compared.is_own_nearest, compared.is_own_copy
    extracted = None if is_own_copy is None else of_kind(is_own_copy).any(1)
    return CopyFigures(
        count=of_kind(is_copy).numel(),
        copies=int(of_kind(is_copy).sum()),
        share=estimate(is_copy, mean, "share"),
        captions=0 if generated.own is None else len(of_kind(is_copy)),
        captions_copied=0 if extracted is None else int(extracted.sum()),
        extraction=None
        if extracted is None
        else bootstrap(extracted.double()[:, None], mean, generator_for(seed, "bootstrap extraction")),
        own_nearest=None if is_own is None else estimate(is_own, mean, "own nearest"),
        similarity_mean=estimate(compared.nearest.similarity, mean, "mean"),
        similarity_p95=estimate(compared.nearest.similarity, lambda values: percentile(values, 95), "p95"),
        l2_copies=estimate(compared.is_l2_copy(), mean, "l2"),
        mq_below={str(level): int((of_kind(compared.ratios.squared) < level).sum()) for level in MQ_LEVELS},
    )


class Probes(NamedTuple):
    """Captions and images, trained on and not, whose answers tell them apart."""

    train: Collection
    train_rows: Sequence[int]
    reference: Collection
    reference_rows: Sequence[int]


class Probing(NamedTuple):
    """How a model is probed."""

    store: Store
    load: Callable[[], Any]
    model_sha256: str
    seed: int
    num_inference_steps: int
    guidance_scale: float
    batch_size: int


def is_flow(pipeline: Any) -> bool:
    """Return whether a transformer, and so its own signals, stand in place of the UNet."""
    return getattr(pipeline, "transformer", None) is not None


def detection_figures(probes: Probes, probing: Probing) -> Detection:
    """Return how well the text signal tells captions trained on from others; see ``text_signal``.

    Raises:
        NotMeasurableError: The model is of a kind without this signal.
    """
    known = {probes.train.captions[row] for row in probes.train_rows}
    new = dict.fromkeys(probes.reference.captions[row] for row in probes.reference_rows)
    groups = [
        sorted(known),
        sorted(caption for caption in new if caption and caption not in set(probes.train.captions)),
    ]

    def measure(captions: Sequence[str]) -> Tensor:
        def compute(rows: range) -> Tensor:
            signals = [
                (flow_text_signal if is_flow(probing.load()) else text_signal)(
                    probing.load(),
                    captions[start : min(start + probing.batch_size, rows.stop)],
                    probing.seed,
                    num_inference_steps=probing.num_inference_steps,
                    guidance_scale=probing.guidance_scale,
                )
                for start in _batches(rows, probing.batch_size, "text signal")
            ]
            return torch.cat(signals)[:, None]

        kind = (
            f"text signal {probing.model_sha256} {probing.seed} {probing.num_inference_steps} {probing.guidance_scale}"
        )
        return probing.store.rows(kind, captions, compute)[:, 0]

    train, reference = (measure(group) for group in groups)
    return Detection(
        **_separation(train, reference, probing.seed, "detection"), num_train=len(train), num_reference=len(reference)
    )


def membership_figures(probes: Probes, probing: Probing) -> tuple[Membership, Excess]:
    """Return how well the loss tells images trained on from others, and as evidence; see ``denoising_losses``.

    Raises:
        NotMeasurableError: The model is of a kind without known loss.
    """

    def measure(collection: Collection, chosen: Sequence[int]) -> Tensor:
        def compute(rows: range) -> Tensor:
            losses = []
            for start in _batches(rows, probing.batch_size, "loss"):
                part = chosen[start : min(start + probing.batch_size, rows.stop)]
                batch, captions = [collection.image(row) for row in part], [collection.captions[row] for row in part]
                losses_of = flow_losses if is_flow(probing.load()) else denoising_losses
                losses.append(losses_of(probing.load(), batch, captions, probing.seed))
            return torch.cat(losses)[:, None]

        keys = [f"{collection.hashes[row]} {collection.captions[row]}" for row in chosen]
        return probing.store.rows(f"loss {probing.model_sha256} {probing.seed}", keys, compute)[:, 0]

    train = measure(probes.train, probes.train_rows)
    reference = measure(probes.reference, probes.reference_rows)
    generator = generator_for(probing.seed, "bootstrap loss")
    figures = Membership(
        **_separation(-train, -reference, probing.seed, "membership"),
        train_loss=bootstrap(train[:, None], mean, generator),
        reference_loss=bootstrap(reference[:, None], mean, generator),
        timesteps=tuple(LOSS_TIMESTEPS),
    )
    return figures, above_others(-train, -reference, figures.auc, probing.seed, "membership")


def _separation(positive: Tensor, negative: Tensor, seed: int, what: str) -> dict[str, Estimate]:
    return {
        "auc": bootstrap_separation(positive, negative, area_under_curve, generator_for(seed, f"bootstrap {what} auc")),
        "tpr_at_1_fpr": bootstrap_separation(
            positive, negative, true_positive_rate, generator_for(seed, f"bootstrap {what} tpr")
        ),
    }


def _batches(rows: range, batch_size: int, description: str) -> Iterable[int]:
    return tqdm(range(rows.start, rows.stop, batch_size), desc=description, unit="batch", leave=False)
