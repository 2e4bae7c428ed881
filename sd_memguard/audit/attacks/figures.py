"""What an attack gets: its answers for images trained on beside those for held-out images."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from sd_memguard.audit.attacks.base import SIZE, Attack, Generation
from sd_memguard.audit.collection import Collection
from sd_memguard.audit.features.extractors import Thumbnails
from sd_memguard.audit.metrics.measures import Probes, Probing
from sd_memguard.audit.metrics.statistics import (
    Estimate,
    area_under_curve,
    bootstrap,
    bootstrap_separation,
    mean,
    true_positive_rate,
)
from sd_memguard.audit.report import AttackFigures
from sd_memguard.core.seeding import generator_for


def attack_figures(attack: Attack, probes: Probes, probing: Probing) -> AttackFigures:
    """Attack a model and return the figures; what the store holds is not asked again.

    Args:
        attack: From the registry.
        probes: Captioned images, trained on and held out; of each, ``attack.num_attacked`` are attacked.
        probing: How the model is asked.

    Raises:
        NotMeasurableError: The model is of a kind that the attack is not written for.
    """
    generation = Generation(probing.num_inference_steps, probing.guidance_scale, probing.seed)
    store, batch_size = probing.store, probing.batch_size

    def ask(images: Collection, chosen: Sequence[int]) -> Tensor:
        def compute(rows: range) -> Tensor:
            answers = []
            for start in tqdm(range(rows.start, rows.stop, batch_size), desc=attack.name, unit="batch", leave=False):
                part = chosen[start : min(start + batch_size, rows.stop)]
                captions = [images.captions[row] for row in part]
                answer = attack.answer(probing.load(), captions, [images.image(row) for row in part], generation)
                answers.append(answer.reshape(len(part), -1))
            return torch.cat(answers)

        keys = [f"{images.hashes[row]} {images.captions[row]}" for row in chosen]
        kind = f"attack {attack.name} {probing.model_sha256} {' '.join(map(str, generation))}"
        return store.rows(kind, keys, compute)

    pools = ((probes.train, probes.train_rows), (probes.reference, probes.reference_rows))
    places = [spread(len(rows), attack.num_attacked) for _, rows in pools]
    answers = [ask(images, [rows[place] for place in at]) for (images, rows), at in zip(pools, places, strict=True)]
    if attack.num_answers is None:
        scores, before = [answer[:, 0] for answer in answers], None
        told = scores
    else:
        pixels = [_thumbnails(images, rows) for images, rows in pools]
        own = [torch.tensor(places[0]), torch.tensor(places[1]) + len(pixels[0])]
        shown = [answer.unflatten(1, (-1, SIZE * SIZE * 3)) for answer in answers]
        both = torch.cat(pixels)
        scores = [margins(one[:, -1], both, rows) for one, rows in zip(shown, own, strict=True)]
        told = [(score > 0).float() for score in scores]
        before = None
        if attack.num_answers > 1:
            before = [(margins(one[:, 0], both, rows) > 0).float() for one, rows in zip(shown, own, strict=True)]

    def estimate(values: Tensor, what: str) -> Estimate:
        generator = generator_for(generation.seed, f"bootstrap {attack.name} {what}")
        return bootstrap(values.double()[:, None], mean, generator)

    def separate(statistic: Any, what: str) -> Estimate:
        generator = generator_for(generation.seed, f"bootstrap {attack.name} {what}")
        return bootstrap_separation(scores[0], scores[1], statistic, generator)

    return AttackFigures(
        title=attack.title,
        train=estimate(told[0], "train"),
        reference=estimate(told[1], "reference"),
        train_before=None if before is None else estimate(before[0], "train before"),
        reference_before=None if before is None else estimate(before[1], "reference before"),
        is_share=attack.num_answers is not None,
        auc=separate(area_under_curve, "auc"),
        tpr_at_1_fpr=separate(true_positive_rate, "tpr"),
        num_train=len(told[0]),
        num_reference=len(told[1]),
        evaluations=attack.evaluations(generation),
    )


def spread(count: int, most: int) -> list[int]:
    """Return at most so many of ``range(count)``, evenly spread.

    >>> spread(10, 4)
    [0, 2, 5, 7]
    """
    return [index * count // most for index in range(most)] if count > most else list(range(count))


def _thumbnails(images: Collection, rows: Sequence[int]) -> Tensor:
    """Return (N, 64 * 64 * 3) uint8."""
    return torch.stack([Thumbnails().prepare(images.image(row)).flatten() for row in rows])


def margins(generated: Tensor, probed: Tensor, own: Tensor) -> Tensor:
    """Return how much nearer each generated image is to its own image than to the nearest other one.

    Args:
        generated: (N, D) pixels.
        probed: (M, D) pixels.
        own: (N,) which of them is each one's own.

    Returns:
        (N,) root mean square distances of pixels in 0..1: to the nearest other minus to the own one.
    """
    one, other = generated.float() / 255, probed.float() / 255
    # Without matrix products, whose rounding is larger than what may lie between two images.
    distances = torch.cdist(one, other, compute_mode="donot_use_mm_for_euclid_dist") / generated.shape[1] ** 0.5
    to_own = distances.gather(1, own[:, None])[:, 0]
    # Copies of the own image among those that are probed are no others.
    same = torch.stack([(probed == probed[row]).all(1) for row in own.tolist()])
    return distances.masked_fill(same, torch.inf).amin(1) - to_own
