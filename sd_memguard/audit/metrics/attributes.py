"""Whether generated images show what their captions name, and how often they repeat a training image's further traits.

For image sets whose attributes are known (``attributes.jsonl``). A small classifier, trained on real images only,
reads the attributes from an image. ``caption_accuracy`` is how often it finds what the caption names.
``open_agreement`` is how often it finds what the training image of that caption shows and the caption leaves open: a
model that follows its prompt guesses there as well as chance, a model that replicates does better.
"""

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from sd_memguard.audit import AuditError
from sd_memguard.core.seeding import generator_for, permutation

SIZE = 64
"""Edge of the images that the classifier reads, in pixels."""

NUM_STEPS = 500
BATCH_SIZE = 64
LEARNING_RATE = 3e-3
MIN_IMAGES = 8
"""A value shown by fewer distinct images is not learned, and counts as unknown."""

NONE = "none"
"""What an image shows of an attribute that has one value only and is not among its own, e.g. no beard."""

_VALIDATION_SHARE = 0.1
_MAX_SHIFT = 3  # pixels by which training images are moved about
_IGNORED = -100

Values = Mapping[str, str]
"""Attributes with their values."""


class AttributeClassifier(nn.Module):
    """A convolutional network with one head for each attribute.

    Attributes:
        values: The values that are told apart, of each attribute.
        accuracy: Share of the real images kept back from training whose value was found, of each attribute.
    """

    def __init__(self, values: Mapping[str, Sequence[str]]) -> None:
        super().__init__()
        self.values = {attribute: list(known) for attribute, known in values.items()}
        self.accuracy: dict[str, float] = {}
        self.body = nn.Sequential(
            *_block(3, 24, kernel=5, stride=2),
            *_block(24, 48, kernel=3, stride=2),
            *_block(48, 64, kernel=3, stride=1),
            *_block(64, 96, kernel=3, stride=2),
            nn.Flatten(),
            nn.Linear(96 * (SIZE // 8) ** 2, 192),
            nn.BatchNorm1d(192),
            nn.SiLU(),
        )
        self.heads = nn.ModuleList(nn.Linear(192, len(known)) for known in self.values.values())

    def forward(self, images: Tensor) -> list[Tensor]:
        """Return logits of each attribute, in the order of ``values``, for images (B, 3, 64, 64) in 0..1."""
        features = self.body(2 * images - 1)
        return [head(features) for head in self.heads]

    @torch.no_grad()
    def predict(self, images: Tensor) -> list[dict[str, str]]:
        """Return the attributes of each image.

        Args:
            images: (N, 3, H, W) uint8, RGB; of another size than 64 they are resized.
        """
        self.eval()
        found: list[dict[str, str]] = []
        for batch in images.split(256):
            best = [logits.argmax(1).tolist() for logits in self(_resized(batch))]
            rows = zip(*best, strict=True) if best else ([] for _ in range(len(batch)))
            names = list(self.values.items())
            found += [{name: known[index] for (name, known), index in zip(names, row, strict=True)} for row in rows]
        return found


def train_classifier(
    images: Tensor, labels: Sequence[Values], *, seed: int = 0, num_steps: int = NUM_STEPS
) -> AttributeClassifier:
    """Return a classifier of the attributes, trained on real images; about a minute on one core.

    Images that repeat others count once. A tenth of them is kept back, and gives ``classifier.accuracy``.

    Args:
        images: (N, 3, H, W) uint8, RGB.
        labels: Everything known of each image. A missing attribute is unknown, or absent where it has one value only.
        seed: Decides weights, order, shifts and which images are kept back.
        num_steps: Batches of 64.

    Raises:
        AuditError: Numbers differ, or no attribute has two values with enough images.
    """
    if len(images) != len(labels):
        raise AuditError(f"every image needs its attributes, got {len(images)} images and {len(labels)} labels")
    rows = _distinct(images)
    values = _known_values([labels[row] for row in rows])
    if not values:
        raise AuditError(
            f"no attribute has two values with {MIN_IMAGES} distinct images each among {len(rows)}; add images"
        )
    order = [rows[number] for number in permutation(seed, "attribute validation", length=len(rows)).tolist()]
    num_validation = int(len(order) * _VALIDATION_SHARE)
    trained, kept_back = order[num_validation:], order[:num_validation]
    pixels, targets = _resized(images[trained]), _targets([labels[row] for row in trained], values)
    generator = generator_for(seed, "attribute classifier")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        classifier = AttributeClassifier(values)
    optimizer = torch.optim.AdamW(classifier.parameters(), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=num_steps, pct_start=0.15)
    classifier.train()
    for _ in range(num_steps):
        chosen = torch.randint(len(trained), (BATCH_SIZE,), generator=generator)
        logits = classifier(_varied(pixels[chosen], generator))
        loss = torch.stack(
            [
                nn.functional.cross_entropy(one, targets[chosen, index], ignore_index=_IGNORED, reduction="sum")
                for index, one in enumerate(logits)
            ]
        ).sum()
        optimizer.zero_grad()
        (loss / BATCH_SIZE).backward()
        optimizer.step()
        schedule.step()
    classifier.eval()
    if kept_back:
        found = classifier.predict(images[kept_back])
        truth = [_completed(labels[row], values) for row in kept_back]
        classifier.accuracy = {name: _share(name, found, truth) for name in values}
    return classifier


def accuracy(classifier: AttributeClassifier, images: Tensor, named: Sequence[Values]) -> Tensor:
    """Return the share of the attributes named that each image shows, (N,) float; NaN where none can be told.

    Args:
        classifier: From ``train_classifier``.
        images: (N, 3, H, W) uint8, RGB.
        named: What the caption of each image names.
    """
    return agreement(classifier.predict(images), [_known(one, classifier.values) for one in named])


def agreement(found: Sequence[Values], expected: Sequence[Values]) -> Tensor:
    """Return the share of each row's expected attributes whose values were found, (N,) float; NaN where it has none."""
    return torch.tensor(
        [
            sum(one.get(name) == value for name, value in wanted.items()) / len(wanted) if wanted else torch.nan
            for one, wanted in zip(found, expected, strict=True)
        ]
    )


def open_agreement(classifier: AttributeClassifier, images: Tensor, opened: Sequence[Values]) -> Tensor:
    """Return the share of what captions leave open in which images agree with their training images, (N,) float.

    Args:
        classifier: From ``train_classifier``.
        images: (N, 3, H, W) uint8, RGB, generated.
        opened: What the training image of each one's caption shows beyond the caption.

    Returns:
        NaN where nothing is left open.
    """
    return accuracy(classifier, images, opened)


def chance_agreement(
    named: Sequence[Values],
    opened: Sequence[Values],
    held_out: Sequence[Values],
    own: Sequence[int | None] | None = None,
) -> Tensor:
    """Return how often images that nobody copied agree in what captions leave open, (N,) float: the measure of chance.

    For each training image the held-out images that share most of what its caption names, all of it where such are
    there, and their mean agreement in the rest.

    Args:
        named: What the caption of each training image names.
        opened: What each training image shows beyond it.
        held_out: Everything that each of M images not trained on shows.
        own: Which of those each image is itself and does not count, where captions are those of held-out images.

    Returns:
        NaN where nothing is left open.
    """
    result = []
    for number, (caption, rest) in enumerate(zip(named, opened, strict=True)):
        itself = None if own is None else own[number]
        others = [other for position, other in enumerate(held_out) if position != itself]
        shared = [sum(other.get(name) == value for name, value in caption.items()) for other in others]
        nearest = [other for other, count in zip(others, shared, strict=True) if count == max(shared)]
        told = agreement(nearest, [{name: rest[name] for name in rest if name in other} for other in nearest])
        result.append(told[~told.isnan()].mean())
    return torch.stack(result) if result else torch.zeros(0)


class AttributeFigures(NamedTuple):
    """What attributes tell of N generated images: shares of each, NaN where unknown.

    Attributes:
        caption_accuracy: Of the attributes that the caption names.
        open_agreement: Of the attributes that it leaves open, compared with its training image.
        chance_agreement: Of the same, by held-out images of the same caption.
    """

    caption_accuracy: Tensor
    open_agreement: Tensor
    chance_agreement: Tensor


def attribute_figures(
    classifier: AttributeClassifier,
    images: Tensor,
    named: Sequence[Values],
    opened: Sequence[Values],
    held_out: Sequence[Values],
    own: Sequence[int | None] | None = None,
) -> AttributeFigures:
    """Return all three measures of generated images; arguments as in the functions above."""
    found = classifier.predict(images)
    wanted, rest = ([_known(one, classifier.values) for one in rows] for rows in (named, opened))
    others = [_completed(one, classifier.values) for one in held_out]
    chance = chance_agreement(wanted, rest, others, own) if others else torch.full((len(wanted),), torch.nan)
    return AttributeFigures(agreement(found, wanted), agreement(found, rest), chance)


def _block(channels: int, width: int, *, kernel: int, stride: int) -> list[nn.Module]:
    return [
        nn.Conv2d(channels, width, kernel, stride, padding=kernel // 2, bias=False),
        nn.BatchNorm2d(width),
        nn.SiLU(),
    ]


def _resized(images: Tensor) -> Tensor:
    pixels = images.float() / 255
    if pixels.shape[-2:] == (SIZE, SIZE):
        return pixels
    return nn.functional.interpolate(pixels, (SIZE, SIZE), mode="bilinear", antialias=True, align_corners=False)


def _varied(images: Tensor, generator: torch.Generator) -> Tensor:
    """Return the images moved, blurred and noisy as generated ones are; colours stay, they are labels."""
    count = len(images)
    padded = nn.functional.pad(images, [_MAX_SHIFT] * 4, mode="replicate")
    down, right = torch.randint(2 * _MAX_SHIFT + 1, (2, count), generator=generator).tolist()
    moved = torch.stack([one[:, y : y + SIZE, x : x + SIZE] for one, y, x in zip(padded, down, right, strict=True)])
    blurred = nn.functional.avg_pool2d(nn.functional.pad(moved, [1] * 4, mode="replicate"), 3, stride=1)
    blur = torch.rand(count, 1, 1, 1, generator=generator) * (torch.rand(count, 1, 1, 1, generator=generator) < 0.5)
    noise = torch.rand(count, 1, 1, 1, generator=generator) * 0.05
    return torch.lerp(moved, blurred, blur) + noise * torch.randn(moved.shape, generator=generator)


def _distinct(images: Tensor) -> list[int]:
    first: dict[bytes, int] = {}
    for row, image in enumerate(images):
        first.setdefault(hashlib.sha256(image.contiguous().numpy().tobytes()).digest(), row)
    return list(first.values())


def _known_values(labels: Sequence[Values]) -> dict[str, list[str]]:
    """Return the attributes worth telling apart, with their values in alphabetical order."""
    counts: dict[str, Counter[str]] = {}
    for label in labels:
        for name, value in label.items():
            counts.setdefault(name, Counter())[value] += 1
    for count in counts.values():
        if len(count) == 1 and (absent := len(labels) - count.total()):
            count[NONE] = absent
    common = {
        name: sorted(value for value, seen in count.items() if seen >= MIN_IMAGES) for name, count in counts.items()
    }
    return {name: known for name, known in sorted(common.items()) if len(known) > 1}


def _completed(label: Values, values: Mapping[str, Sequence[str]]) -> dict[str, str]:
    """Return the known part of a label, with ``none`` for what an image has not."""
    absent = {name: NONE for name, known in values.items() if NONE in known and name not in label}
    return {**_known(label, values), **absent}


def _known(label: Values, values: Mapping[str, Sequence[str]]) -> dict[str, str]:
    return {name: value for name, value in label.items() if value in values.get(name, ())}


def _targets(labels: Sequence[Values], values: Mapping[str, Sequence[str]]) -> Tensor:
    """Return the number of each value, (N, attributes) int64."""
    rows = [_completed(label, values) for label in labels]
    return torch.tensor(
        [[known.index(row[name]) if name in row else _IGNORED for name, known in values.items()] for row in rows]
    )


def _share(name: str, found: Sequence[Values], truth: Sequence[Values]) -> float:
    right = [one[name] == true[name] for one, true in zip(found, truth, strict=True) if name in true]
    return sum(right) / len(right) if right else float("nan")
