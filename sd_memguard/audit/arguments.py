"""What `sd-memguard audit` is asked for: every flag declared once, checked before anything is computed."""

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from sd_memguard.audit import AuditError
from sd_memguard.audit.models import ModelFiles, find_model, find_weights
from sd_memguard.core.local_features import opencv
from sd_memguard.flags import parse_settings
from sd_memguard.settings import NOT_NEGATIVE, POSITIVE_COUNT, Rule, check_settings, setting, settings_of

MARKER = "sd-memguard-audit.txt"
"""The file that tells an audit's folder from any other."""

AUDITED, IMAGES = "What is audited, one or more", "Images"
GENERATION, MEASURING, OUTPUT = "Generation", "Measuring", "Output"
COSINE = Rule("between -1 and 1", lambda value: -1 <= value <= 1)
EDGE = Rule("a positive multiple of 8", lambda pixels: pixels > 0 and pixels % 8 == 0)

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


@dataclass(frozen=True, kw_only=True)
class AuditSettings:
    """The flags of an audit, checked; ``command`` is the command line that makes the audit again.

    Raises:
        UserError: A setting is of the wrong type or out of range, or what it names is not there.
    """

    model: tuple[str, ...] | None = setting(
        None,
        AUDITED,
        "[NAME=]DIR: a pipeline folder, a whole checkpoint FILE.safetensors, FOLDER+LORA.safetensors, or `bundled`",
    )
    lora: tuple[str, ...] | None = setting(
        None, AUDITED, "[NAME=]FILE: LoRA weights to put on the model of that name, or on every --model"
    )
    dtype: Literal["float32", "bfloat16", "float16"] = setting("float32", AUDITED, "precision of the models' weights")
    images: tuple[str, ...] | None = setting(None, AUDITED, "[NAME=]DIR: images that were generated elsewhere")
    train_data_dir: str | None = setting(None, IMAGES, "the training images: a folder, or `bundled`")
    dataset_name: str | None = setting(None, IMAGES, "the training images: a dataset on the hub or in a folder")
    reference_data_dir: str | None = setting(
        None, IMAGES, "held-out images, like those but not trained on: a folder, or `bundled`"
    )
    image_column: str = setting("image", IMAGES, "column of the dataset that holds the images")
    caption_column: str = setting("text", IMAGES, "column of the metadata or dataset that holds the captions")
    on_bad_sample: Literal["error", "skip"] = setting(
        "error", IMAGES, "refuse training images that cannot be used, or ignore them, as training did"
    )
    num_prompts: int = setting(
        64, GENERATION, "captions of duplicated, unique and held-out images each to generate from", POSITIVE_COUNT
    )
    num_images_per_prompt: int = setting(4, GENERATION, "generated images of each caption", POSITIVE_COUNT)
    num_inference_steps: int = setting(50, GENERATION, "DDIM steps", POSITIVE_COUNT)
    guidance_scale: float = setting(7.5, GENERATION, "classifier-free guidance; 1: none", NOT_NEGATIVE)
    resolution: int | None = setting(
        None, GENERATION, "edge of the generated images in pixels; default: the model's own", EDGE
    )
    seed: int = setting(0, GENERATION, "seed of everything random")
    num_probes: int = setting(
        256, MEASURING, "most captions and images for measures without generated images; 0: none", NOT_NEGATIVE
    )
    attacks: tuple[Literal["text_signal", "clid", "embedding_search", "cyclic_denoising"], ...] | None = setting(
        None, MEASURING, "attacks to try, each at its own cost; default: none"
    )
    extractor: str = setting("bundled", MEASURING, "bundled, sscd, sscd-paper, dinov2 or clip")
    extractor_weights: str | None = setting(None, MEASURING, "file, folder or hub name of its weights")
    extractor_sha256: str | None = setting(None, MEASURING, "refuse weights with another hash")
    quality_extractor: str | None = setting(
        None, MEASURING, "features of KID and FID, also `inception`; default: those of --extractor"
    )
    quality_weights: str | None = setting(None, MEASURING, "file, folder or hub name of its weights")
    clip_model: str | None = setting(None, MEASURING, "folder or hub name of a CLIP model, for the CLIP score")
    copy_threshold: float | None = setting(
        None, MEASURING, "similarity from which on an image is a copy; default: by registration", COSINE
    )
    local_features: bool = setting(
        False, MEASURING, "find copied parts of large images too; needs pip install 'sd-memguard[local-features]'"
    )
    attributes_dir: str | None = setting(
        None, MEASURING, "further real images with attributes.jsonl, for the caption accuracy"
    )
    batch_size: int = setting(16, OUTPUT, "images at a time", POSITIVE_COUNT)
    output_dir: str = setting(None, OUTPUT, "where report and cache go", fix="name a new folder or an earlier audit's")
    model_card: str | None = setting(
        None, OUTPUT, "Markdown file, e.g. the model's README.md, whose section on the audit is written or replaced"
    )
    command: str = ""

    def __post_init__(self) -> None:
        """Check values, what they name, and what must not stand side by side."""
        check_settings(self)
        if self.lora and not self.model:
            raise AuditError("`--lora` must go on a model: give the one it was trained for as `--model`")
        if not self.models and not self.image_folders:
            raise AuditError("there is nothing to audit: give `--model DIR` or `--images DIR`, once or more")
        if both := self.models.keys() & self.image_folders.keys():
            raise AuditError(
                f"`--model` and `--images` must have different names, both have {min(both)}; write NAME=DIR"
            )
        if (self.train_data_dir is None) == (self.dataset_name is None):
            raise AuditError("the training images must be given, as one of `--train_data_dir` and `--dataset_name`")
        if self.local_features and self.copy_threshold is not None:
            raise AuditError(
                "`--local_features` adds to registration, and `--copy_threshold` decides by similarity alone; give one"
            )
        if self.local_features:
            opencv()  # or says how to install it, before anything is generated
        card = None if self.model_card is None else Path(self.model_card)
        if card is not None and not (card.suffix.lower() == ".md" and card.parent.is_dir()):
            raise AuditError(f"`--model_card` must be a .md file in a folder that exists, got {card}; name another")
        _check_output_dir(
            self.output_folder, [self.train_data_dir, self.reference_data_dir, *self.image_folders.values()]
        )

    @cached_property
    def models(self) -> dict[str, ModelFiles]:
        """The files of each model by its name."""
        found = {name: find_model(place) for name, place in _named("--model", self.model or ())}
        for text in self.lora or ():
            name, equals, place = text.partition("=")
            if not equals or Path(text).exists():
                name, place = "", text
            if name and name not in found:
                raise AuditError(f"`--lora` {text} must name one of the models ({', '.join(found)}), or none for all")
            weights = find_weights(place, f"`--lora` {text}")
            for model in [name] if name else list(found):
                found[model] = found[model]._replace(loras=(*found[model].loras, weights))
        return found

    @cached_property
    def image_folders(self) -> dict[str, Path]:
        """The folders of given images by their names."""
        return {name: Path(place) for name, place in _named("--images", self.images or ())}

    @property
    def output_folder(self) -> Path:
        """``output_dir`` as a path."""
        return Path(self.output_dir)

    def as_flags(self) -> dict[str, Any]:
        """Return every flag by its name, as given or defaulted."""
        return {declared.name: getattr(self, declared.name) for declared in settings_of(type(self))}


def parse_arguments(argv: Sequence[str]) -> AuditSettings:
    """Return the settings; ends the program with a message where a flag is unknown.

    Raises:
        UserError: A setting is out of range, or what flags name is not there or does not go together.
    """
    return parse_settings(
        AuditSettings,
        argv,
        prog="sd-memguard audit",
        description="Measure how much models copy of their training images; docs/audit.md defines every figure. "
        "`--image FILE --train_data_dir DIR --output_dir DIR` compares one image instead.",
        command=shlex.join(["sd-memguard", "audit", *argv]),
    )


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
