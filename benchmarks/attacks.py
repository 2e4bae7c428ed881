"""Attacks on the demo's models and their base: duplicated training images beside held-out ones.

    sd-memguard demo --output_dir runs/demo
    python -m benchmarks.attacks --demo runs/demo --output_dir runs/attacks

prints a row for each attack and model. Answers are kept in the output folder; another run goes on from there.
"""

import argparse
from collections import Counter
from functools import cache, partial
from pathlib import Path

import torch

from sd_memguard.assets import demo_data_path, demo_heldout_path, tiny_sd_path
from sd_memguard.audit.attacks.figures import attack_figures
from sd_memguard.audit.attacks.registry import ATTACKS
from sd_memguard.audit.collection import read_folder
from sd_memguard.audit.features.cache import Store
from sd_memguard.audit.metrics.measures import Probes, Probing
from sd_memguard.audit.metrics.statistics import Estimate
from sd_memguard.audit.models import load_pipeline

MODELS = ("plain", "guarded", "base")
NUM_INFERENCE_STEPS, GUIDANCE_SCALE = 20, 2.5
NUM_PROBES = 32


def main() -> None:
    """Attack and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", type=Path, default=Path("runs/demo"), help="folder of a finished demo")
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--models", nargs="*", default=MODELS, choices=MODELS)
    parser.add_argument("--attacks", nargs="*", default=list(ATTACKS), choices=list(ATTACKS))
    parser.add_argument("--most", type=int, default=10, help="images of each kind that are attacked by generating")
    arguments = parser.parse_args()
    probes = choose_probes()
    print("| attack | model | trained on | held out | AUC | TPR at 1% FPR | rows of the UNet |")
    print("|---|---|---|---|---|---|---|")
    for model in arguments.models:
        folder = tiny_sd_path() if model == "base" else arguments.demo / model
        load = cache(partial(load_pipeline, folder, torch.device("cpu")))
        probing = Probing(
            Store(arguments.output_dir / model), load, model, 0, NUM_INFERENCE_STEPS, GUIDANCE_SCALE, arguments.most
        )
        for name in arguments.attacks:
            attack = ATTACKS[name]
            # What is generated is compared with all probes, however few are attacked.
            attack.num_attacked = NUM_PROBES if attack.num_answers is None else arguments.most  # type: ignore[misc]
            found = attack_figures(attack, probes, probing)
            shares = (
                told(found.train, found.train_before, found.is_share),
                told(found.reference, found.reference_before, found.is_share),
            )
            success = f"{interval(found.auc)} | {found.tpr_at_1_fpr.value:.0%}"
            print(f"| `{name}` | {model} | {' | '.join(shares)} | {success} | {found.evaluations} |", flush=True)


def choose_probes() -> Probes:
    """Return the demo's duplicated images, and as many held-out ones with captions of their own."""
    train = read_folder(demo_data_path(), "--train_data_dir")
    heldout = read_folder(demo_heldout_path(), "--reference_data_dir")
    counts, known = Counter(train.hashes), set(train.captions)
    duplicated = [row for row in train.distinct if counts[train.hashes[row]] > 1]
    others = [row for row in heldout.distinct if heldout.captions[row] not in known]
    return Probes(train, duplicated[:NUM_PROBES], heldout, others[:NUM_PROBES])


def told(found: Estimate, before: Estimate | None, is_share: bool) -> str:
    """Return a share, and what it was before the attack; or a mean score."""
    text = f"{found.value:.0%}" if is_share else f"{found.value:.4f}"
    return text if before is None else f"{text} (before {before.value:.0%})"


def interval(found: Estimate) -> str:
    """Return an estimate with its interval."""
    return f"{found.value:.2f} ({found.low:.2f} to {found.high:.2f})"


if __name__ == "__main__":
    main()
