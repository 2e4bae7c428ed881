"""The tables and the plot of the results that `python -m benchmarks.memorization` has made.

    python -m benchmarks.memorization.table --plot docs/images/memorization.png

Shares are over all generated images of all seeds; the intervals are 95 % bootstrap intervals over prompts. Losses are
means at fixed timesteps and noise, the same for every variant. Prompts, noises and timesteps are the same for all
variants, so the second table of each dataset has paired differences to plain training of as many steps and the same
seeds; there the intervals of the losses are over held-out images.
"""

import argparse
import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.memorization.variants import CONTROLS, TITLES

RESULTS = Path(__file__).parent / "results"
NUM_RESAMPLES = 2000
DIFFERENCES = (
    "variant",
    "steps",
    "seeds",
    "own image nearest: duplicated",
    "unique",
    "agreement beyond the prompt: duplicated",
    "unique",
    "prompt followed",
    "held-out loss, relative",
)
COLUMNS = (
    "variant",
    "steps",
    "seeds",
    "own image nearest: duplicated",
    "unique",
    "copies: duplicated, unique",
    "agreement beyond the prompt (chance): duplicated, unique",
    "held-out loss",
    "gap",
    "prompt followed",
    "1000 KID",
    "precision, recall",
    "image-forwards",
)

Result = dict[str, Any]
Group = tuple[str, str]
"""Dataset and duplicates."""
Groups = dict[Group, dict[tuple[str, int], list[Result]]]


def main() -> None:
    """Print the tables and draw the plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS, help="where the results are")
    parser.add_argument("--plot", type=Path, help="also plot replication against held-out loss into this PNG")
    options = parser.parse_args()
    groups = read_results(options.results)
    for group, points in groups.items():
        print(f"\n### {group[0]}, duplicates: {group[1]}\n")
        print("\n".join(table(points)))
        print("\nLess plain:\n")
        print("\n".join(differences(points)))
    if options.plot:
        from benchmarks.memorization.plot import plot

        plot(groups, options.plot)


def read_results(folder: Path) -> Groups:
    """Return the results by dataset and duplicates, then by row (in their order) and step: one per seed.

    Controls, trained without the duplicates, are rows of the dataset with exact duplicates.
    """
    groups: Groups = defaultdict(lambda: defaultdict(list))
    order = list(TITLES)
    results = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]
    results.sort(key=lambda one: (order.index(row_name(one)), one["step"], one["case"]["seed"]))
    for result in results:
        case = result["case"]
        if case["variant"] != "base":
            duplicates = "exact" if case["duplicates"] in CONTROLS else case["duplicates"]
            groups[case["dataset"], duplicates][row_name(result), result["step"]].append(result)
    base = [one for one in results if one["case"]["variant"] == "base"]
    return {
        group: {("base", 0): [one for one in base if one["case"]["dataset"] == group[0]], **points}
        for group, points in sorted(groups.items())
    }


def row_name(result: Result) -> str:
    """Return which row of the tables a result belongs to, see ``TITLES``."""
    variant, duplicates = result["case"]["variant"], result["case"]["duplicates"]
    return f"{variant}, {duplicates}" if duplicates in CONTROLS else str(variant)


def table(points: dict[tuple[str, int], list[Result]]) -> Iterable[str]:
    """Yield the lines of a table with a row for each variant and step, and below it held-out prompts for scale."""
    yield f"| {' | '.join(COLUMNS)} |"
    yield "|---" * len(COLUMNS) + "|"
    for (variant, step), results in points.items():
        if results:
            yield f"| {' | '.join(map(str, row(variant, step, results)))} |"
    every = [one for results in points.values() for one in results if one["case"]["variant"] != "base"]
    yield ""
    yield (
        "For scale, held-out prompts (all variants): copies of a training image "
        f"{share_text(every, 'heldout', 'copies')}, "
        f"own held-out image nearest {share_text(every, 'heldout', 'own')}."
    )


def differences(points: dict[tuple[str, int], list[Result]]) -> Iterable[str]:
    """Yield the lines of a table with each variant's paired differences to plain training of as many steps.

    LoRA is compared with plain LoRA of its rank.
    """
    yield f"| {' | '.join(DIFFERENCES)} |"
    yield "|---" * len(DIFFERENCES) + "|"
    for (variant, step), results in points.items():
        reference = f"{variant.partition('_')[0]}_plain" if variant.startswith("lora") else "plain"
        plain = {one["case"]["seed"]: one for one in points.get((reference, step), ())}
        pairs = [(one, plain[one["case"]["seed"]]) for one in results if one["case"]["seed"] in plain]
        if pairs and variant != reference:
            columns = [TITLES[variant], step, len(pairs), *difference_texts(pairs)]
            yield f"| {' | '.join(map(str, columns))} |"


def difference_texts(pairs: Sequence[tuple[Result, Result]]) -> list[str]:
    """Return the differences (variant less plain) with their intervals, a text for each column."""
    shares = [("duplicated", "own"), ("unique", "own")]
    attributes = [("duplicated", "open_agreement"), ("unique", "open_agreement"), ("heldout", "caption_accuracy")]
    texts = [
        _points([flags(one, kind, name) - flags(other, kind, name) for one, other in pairs]) for kind, name in shares
    ]
    texts += [
        _points([by_prompt(one, kind, name) - by_prompt(other, kind, name) for one, other in pairs])
        if pairs[0][0]["replication"][kind].get(name)
        else "-"
        for kind, name in attributes
    ]
    losses = [[torch.tensor(one["losses"]["heldout"]["by_image"]).double() for one in pair] for pair in pairs]
    scale = torch.stack([plain for _, plain in losses]).mean()
    by_image = torch.stack([one - plain for one, plain in losses]).mean(0) / scale
    low, high = interval(by_image)
    return [*texts, f"{by_image.mean():+.1%} ({low:+.1%} to {high:+.1%})"]


def _points(by_seed: Sequence[Tensor]) -> str:
    """Return a mean over prompts in percentage points, with its interval; prompts without a value are left out."""
    mean = torch.stack(list(by_seed)).mean(0)
    mean = mean[mean.isfinite()]
    low, high = interval(mean)
    return f"{100 * mean.mean():+.0f} ({100 * low:+.0f} to {100 * high:+.0f})"


def by_prompt(result: Result, kind: str, name: str) -> Tensor:
    """Return the mean of an attribute figure for each prompt, (prompts,) float64, NaN where it is not known."""
    one = result["replication"][kind]
    values = [float("nan") if value is None else value for value in one[name]]
    return torch.tensor(values).double().view(one["prompts"], -1).nanmean(1)


def row(variant: str, step: int, results: Sequence[Result]) -> list[object]:
    """Return the columns of one variant at one step."""
    forwards = [one["image_forwards"] for one in results if "image_forwards" in one]
    return [
        TITLES[variant],
        step,
        len(results),
        *(share_text(results, kind, "own") for kind in ("duplicated", "unique")),
        ", ".join(f"{share(results, kind, 'copies')[0]:.0%}" for kind in ("duplicated", "unique")),
        agreement_text(results),
        f"{_average(one['losses']['heldout']['mean'] for one in results):.4f}",
        f"{_average(map(loss_gap, results)):.0%}",
        _share(attribute(results, "heldout", "caption_accuracy")),
        f"{_average(1000 * one['quality']['kid'] for one in results):.2f}",
        ", ".join(f"{_average(one['quality'][name] for one in results):.2f}" for name in ("precision", "recall")),
        f"{_average(forwards):,.0f}" if forwards else "-",
    ]


def loss_gap(result: Result) -> float:
    """Return by which share the loss on unique training images is below the held-out loss."""
    losses = result["losses"]
    return 1 - float(losses["unique"]["mean"]) / float(losses["heldout"]["mean"])


def flags(result: Result, kind: str, name: str) -> Tensor:
    """Return the share of generated images with a property for each prompt, (prompts,) float64."""
    one = result["replication"][kind]
    return torch.tensor([int(digit) for digit in one[name]]).double().view(one["prompts"], -1).mean(1)


def share(results: Sequence[Result], kind: str, name: str) -> tuple[float, float, float]:
    """Return a share over several seeds, and its interval over prompts."""
    by_prompt = torch.stack([flags(one, kind, name) for one in results]).mean(0)
    return float(by_prompt.mean()), *interval(by_prompt)


def interval(by_prompt: Tensor) -> tuple[float, float]:
    """Return the 95 % bootstrap interval of a mean over prompts."""
    generator = torch.Generator().manual_seed(0)
    chosen = torch.randint(len(by_prompt), (NUM_RESAMPLES, len(by_prompt)), generator=generator)
    low, high = by_prompt[chosen].mean(1).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high


def share_text(results: Sequence[Result], kind: str, name: str) -> str:
    """Return a share with its interval, as text."""
    if not results:
        return "-"
    value, low, high = share(results, kind, name)
    return f"{value:.0%} ({low:.0%} to {high:.0%})"


def attribute(results: Sequence[Result], kind: str, name: str) -> float | None:
    """Return the mean of an attribute figure over generated images and seeds, None where attributes are not known."""
    found = [value for one in results for value in one["replication"][kind].get(name, []) if value is not None]
    return _average(found) if found else None


def agreement_text(results: Sequence[Result]) -> str:
    """Return how often generated images agree with the training image beyond the prompt, and chance, as text."""
    if attribute(results, "unique", "open_agreement") is None:
        return "-"
    return ", ".join(
        f"{_share(attribute(results, kind, 'open_agreement'))} ({_share(attribute(results, kind, 'chance_agreement'))})"
        for kind in ("duplicated", "unique")
    )


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.0%}"


def _average(values: Iterable[float]) -> float:
    listed = list(values)
    return sum(listed) / len(listed)


if __name__ == "__main__":
    main()
