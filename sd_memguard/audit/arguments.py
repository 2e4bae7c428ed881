"""What the command line of `sd-memguard audit` asks for, checked before anything is computed."""

import argparse
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from sd_memguard.audit import AuditError
from sd_memguard.audit.models import ModelFiles, find_model

MARKER = "sd-memguard-audit.txt"
"""The file that tells an audit's folder from any other."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


@dataclass(frozen=True)
class AuditSettings:
    """The flags, by their names; ``models`` and ``images`` are names with what they stand for.

    ``flags`` holds every flag as given or defaulted, ``command`` the command line that makes the audit again.
    """

    models: dict[str, ModelFiles]
    images: dict[str, Path]
    train_data_dir: str | None
    dataset_name: str | None
    image_column: str
    caption_column: str
    on_bad_sample: Literal["error", "skip"]
    reference_data_dir: str | None
    num_prompts: int
    num_probes: int
    num_images_per_prompt: int
    num_inference_steps: int
    guidance_scale: float
    resolution: int | None
    seed: int
    extractor: str
    extractor_weights: str | None
    extractor_sha256: str | None
    quality_extractor: str | None
    quality_weights: str | None
    clip_model: str | None
    copy_threshold: float | None
    attributes_dir: Path | None
    batch_size: int
    output_dir: Path
    flags: dict[str, Any]
    command: str


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the flags."""
    parser = argparse.ArgumentParser(
        prog="sd-memguard audit",
        description="Measure how much models copy of their training images; docs/audit.md defines every figure. "
        "`--image FILE --train_data_dir DIR --output_dir DIR` compares one image instead.",
        allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    audited = parser.add_argument_group("what is audited, one or more")
    help = "pipeline folder, whole checkpoint FILE.safetensors, FOLDER+LORA.safetensors, or `bundled`"
    audited.add_argument("--model", action="append", default=[], metavar="[NAME=]DIR", help=help)
    audited.add_argument("--images", action="append", default=[], metavar="[NAME=]DIR", help="generated images")
    images = parser.add_argument_group("images")
    images.add_argument("--train_data_dir", help="the training images: a folder, or `bundled`")
    images.add_argument("--dataset_name", help="the training images: a dataset on the hub or in a folder")
    images.add_argument("--reference_data_dir", help="like images not trained on: a folder, or `bundled`")
    images.add_argument("--image_column", default="image", help="of the dataset")
    images.add_argument("--caption_column", default="text", help="of the metadata or dataset")
    help = "refuse training images that cannot be used, or ignore them, as training did"
    images.add_argument("--on_bad_sample", choices=("error", "skip"), default="error", help=help)
    generating = parser.add_argument_group("generation")
    generating.add_argument(
        "--num_prompts", type=_count, default=64, help="captions of duplicated and of unique images, each"
    )
    generating.add_argument("--num_images_per_prompt", type=_count, default=4, help="generated images of each caption")
    measuring = parser.add_argument_group("measuring")
    generating.add_argument("--num_inference_steps", type=_count, default=50, help="DDIM steps")
    generating.add_argument(
        "--guidance_scale", type=_not_negative, default=7.5, help="classifier-free guidance; 1: none"
    )
    generating.add_argument(
        "--resolution", type=_edge, help="edge of the generated images in pixels; default: the model's own"
    )
    generating.add_argument("--seed", type=int, default=0, help="of everything random")
    help = "most captions and images, trained on and held out, each, for measures without generated images; 0: none"
    measuring.add_argument("--num_probes", type=_whole, default=256, help=help)
    measuring.add_argument("--extractor", default="bundled", help="bundled, sscd, sscd-paper, dinov2 or clip")
    measuring.add_argument("--extractor_weights", help="file, folder or hub name of its weights")
    measuring.add_argument("--extractor_sha256", help="refuse weights with another hash")
    measuring.add_argument(
        "--quality_extractor", help="features of KID and FID, also `inception`; default: --extractor"
    )
    measuring.add_argument("--quality_weights", help="file, folder or hub name of its weights")
    measuring.add_argument("--clip_model", help="folder or hub name of a CLIP model, for the CLIP score")
    measuring.add_argument(
        "--copy_threshold", type=_cosine, help="similarity from which on an image is a copy; default: by registration"
    )
    help = "further real images with attributes.jsonl, for the caption accuracy"
    measuring.add_argument("--attributes_dir", type=Path, help=help)
    add("--batch_size", type=_count, default=16, help="images at a time")
    add("--output_dir", type=Path, required=True, help="where report and cache go")
    return parser


def parse_arguments(argv: Sequence[str]) -> AuditSettings:
    """Return the settings; ends the program with a message where a flag is unknown or out of range.

    Raises:
        AuditError: Where what the flags name is not there or does not go together.
    """
    flags = vars(build_parser().parse_args(argv))
    shown = {name: str(value) if isinstance(value, Path) else value for name, value in flags.items()}
    models = {name: find_model(place) for name, place in _named("--model", flags.pop("model"))}
    images = {name: Path(place) for name, place in _named("--images", flags.pop("images"))}
    if not models and not images:
        raise AuditError("there is nothing to audit: give `--model DIR` or `--images DIR`, once or more")
    if both := models.keys() & images.keys():
        raise AuditError(f"`--model` and `--images` must have different names, both have {min(both)}; write NAME=DIR")
    if (flags["train_data_dir"] is None) == (flags["dataset_name"] is None):
        raise AuditError("the training images must be given, as one of `--train_data_dir` and `--dataset_name`")
    _check_output_dir(flags["output_dir"], [flags["train_data_dir"], flags["reference_data_dir"], *images.values()])
    command = shlex.join(["sd-memguard", "audit", *argv])
    return AuditSettings(models=models, images=images, flags=shown, command=command, **flags)


def _named(flag: str, texts: Sequence[str]) -> list[tuple[str, str]]:
    """Return names and what they stand for; where no name is given, it is the end of the path."""
    found: dict[str, str] = {}
    for text in texts:
        name, equals, place = text.partition("=")
        if not equals or Path(text).exists():
            name, place = re.sub(r"[^A-Za-z0-9._-]+", "-", Path(text).resolve().name).strip("-.") or "model", text
        if not _NAME.fullmatch(name) or not place:
            raise AuditError(f"`{flag}` must be DIR or NAME=DIR, with letters, digits and ._- in the name, got {text}")
        if name in found:
            raise AuditError(f"`{flag}` must have a different name each, {name} is there twice; write NAME=DIR")
        found[name] = place
    return list(found.items())


def _check_output_dir(folder: Path, sources: Sequence[str | Path | None]) -> None:
    if folder.exists() and not folder.is_dir():
        raise AuditError(f"`--output_dir` must be a folder, {folder} is a file; name another")
    if folder.exists() and any(folder.iterdir()) and not (folder / MARKER).is_file():
        raise AuditError(
            f"`--output_dir` must be new, empty or an earlier audit, {folder} holds other files; name another"
        )
    for source in sources:
        if source is not None and folder.resolve().is_relative_to(Path(source).resolve()):
            raise AuditError(f"`--output_dir` {folder} must not lie in the images' folder {source}; name another")


def _whole(text: str) -> int:
    return int(text) if text.isdecimal() and int(text) == 0 else _count(text)


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number, 1 or more, got {text}")
    return int(text)


def _edge(text: str) -> int:
    if _count(text) % 8:
        raise argparse.ArgumentTypeError(f"must be a multiple of 8, got {text}")
    return int(text)


def _not_negative(text: str) -> float:
    return _number(text, 0, 1000)


def _cosine(text: str) -> float:
    return _number(text, -1, 1)


def _number(text: str, low: float, high: float) -> float:
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not low <= value <= high:
        raise argparse.ArgumentTypeError(f"must be a number between {low} and {high}, got {text}")
    return value
