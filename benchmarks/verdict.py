"""How often the audit's verdict raises a false alarm, and what it finds: `python -m benchmarks.verdict AUDIT...`.

AUDIT is the folder of an audit of models with held-out prompts. 0% planted: the prompts are those of held-out images,
split at random in two halves that take the part of training and of held-out prompts; no model can have replicated the
images of either. Planted: in some prompts of the first half, all images are nearest to their own image.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from sd_memguard.audit.report import Kind, read_audit
from sd_memguard.audit.verdict import HELDOUT_IMAGES, CopyBackground, Measured, judge

NUM_SPLITS = 200
PLANTED = (0.0, 0.05, 0.1, 0.2, 0.3)
BACKGROUND = CopyBackground(2, 256, HELDOUT_IMAGES)


def heldout_shares(folder: Path) -> dict[str, Tensor]:
    """Return for each model of an audit the share of each held-out prompt's images that are nearest to its own."""
    rows = [row for row in read_audit(folder).pairs.to_pylist() if row["kind"] == "heldout"]
    found: dict[str, dict[str, list[bool]]] = {}
    for row in rows:
        found.setdefault(row["model"], {}).setdefault(row["own_file"], []).append(row["is_own_nearest"])
    return {model: torch.tensor(list(by_file.values())).double().mean(1) for model, by_file in found.items()}


def alarms(shares: Tensor, planted: float, num_splits: int) -> float:
    """Return the share of random splits in which the verdict is that of a replicating model."""
    generator, raised = torch.Generator().manual_seed(0), 0
    for number in range(num_splits):
        first, second = shares[torch.randperm(len(shares), generator=generator)].chunk(2)
        first = torch.where(torch.rand(len(first), generator=generator) < planted, 1.0, first)
        copied: dict[Kind, Tensor] = {"duplicated": torch.zeros(len(first), dtype=torch.bool)}
        own: dict[Kind, Tensor] = {"duplicated": first, "heldout": second}
        measured = Measured("model", 2, copied, own, {}, {}, None)
        raised += judge(measured, BACKGROUND, number).level == "replicates"
    return raised / num_splits


def main(argv: Sequence[str] | None = None) -> None:
    """Print a table: a row for each model, a column for each share of prompts that is planted."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("audits", nargs="+", type=Path, metavar="AUDIT")
    parser.add_argument("--num_splits", type=int, default=NUM_SPLITS)
    flags = parser.parse_args(argv)
    print("| model | prompts | " + " | ".join(f"{share:.0%} planted" for share in PLANTED) + " |")
    print("|---" * (2 + len(PLANTED)) + "|")
    for folder in flags.audits:
        for model, shares in heldout_shares(folder).items():
            cells = (f"{alarms(shares, planted, flags.num_splits):.0%}" for planted in PLANTED)
            print(f"| {model} | {len(shares) // 2} + {len(shares) - len(shares) // 2} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
