"""`sd-memguard migrate FILE`: another trainer's configuration as a file for `sd-memguard train --config`."""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from sd_memguard.config import make_train_config
from sd_memguard.errors import ConfigError
from sd_memguard.files import replace_text
from sd_memguard.migrate import ai_toolkit, kohya, onetrainer, simpletuner
from sd_memguard.migrate.translation import MigrationError, Translation

NEEDED = {"pretrained_model_name_or_path": "MODEL", "train_data_dir": "FOLDER"}


def main(argv: Sequence[str] | None = None) -> None:
    """Print or write our configuration, and say on stderr what has no counterpart.

    Raises:
        UserError: the file cannot be read, or its target exists.
    """
    arguments = build_parser().parse_args(argv)
    told = translate(arguments.file, arguments.dataset_config)
    text = as_yaml(told, arguments.file)
    if arguments.output is None:
        print(text, end="")
    elif arguments.output.exists():
        raise MigrationError(f"`--output` {arguments.output} exists; name another file")
    else:
        replace_text(arguments.output, text)
    print(report(told, arguments.output), file=sys.stderr)


def build_parser() -> argparse.ArgumentParser:
    """Return the parser."""
    parser = argparse.ArgumentParser(prog="sd-memguard migrate", description=__doc__, allow_abbrev=False)
    parser.add_argument(
        "file",
        type=Path,
        metavar="FILE",
        help="kohya's TOML, OneTrainer's JSON, SimpleTuner's config.json or multidatabackend.json, ai-toolkit's YAML",
    )
    parser.add_argument("--dataset_config", type=Path, metavar="FILE", help="kohya's file of datasets")
    parser.add_argument("--output", type=Path, metavar="FILE", help="YAML file to write; printed if not given")
    return parser


def translate(file: Path, dataset_config: Path | None = None) -> Translation:
    """Return what a file says in our terms; whose it is shows by its form and its settings.

    Raises:
        MigrationError: it cannot be read, or is of no trainer that is known.
    """
    suffix = file.suffix.lower()
    if suffix == ".toml":
        return kohya.translate(kohya.read_toml(file), file.parent, dataset_config)
    if dataset_config is not None:
        raise MigrationError(f"`--dataset_config` belongs to kohya's TOML files, got {file}; omit it")
    content = _read(file)
    if isinstance(content, Mapping) and isinstance(content.get("config"), Mapping) and "process" in content["config"]:
        return ai_toolkit.translate(content, file.parent)
    if isinstance(content, list) and all(isinstance(backend, Mapping) and "id" in backend for backend in content):
        return simpletuner.translate(content, file.parent)
    if isinstance(content, Mapping):
        names = {str(name).removeprefix("--") for name in content}
        if names & {"training_method", "base_model_name", "concept_file_name"}:
            return onetrainer.translate(content, file.parent)
        if names & {"model_family", "data_backend_config"}:
            return simpletuner.translate(content, file.parent)
    raise MigrationError(
        f"{file} is none of kohya's TOML, OneTrainer's JSON, SimpleTuner's config.json or multidatabackend.json, or "
        "ai-toolkit's YAML; see docs/migrate.md for what to set by hand"
    )


def _read(file: Path) -> Any:
    try:
        text = file.read_text(encoding="utf-8-sig")
        if file.suffix.lower() in (".yaml", ".yml"):
            return yaml.safe_load(text)
        return json.loads(text)
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise MigrationError(f"{file} cannot be read: {error}; name a .toml, .json, .yaml or .yml file") from error


def as_yaml(told: Translation, file: Path) -> str:
    """Return our file of settings, with a line for what has to be filled in."""
    lines = [f"# From the {file.name} of {told.trainer}, by `sd-memguard migrate`. What is not set has the default."]
    settings = dict(told.settings)
    for name, word in NEEDED.items():
        if name not in settings and not (name == "train_data_dir" and "dataset_name" in settings):
            lines.append(f"# {name}: {word}  # to be filled in")
    body = yaml.safe_dump(settings, sort_keys=False, allow_unicode=True, width=10_000) if settings else ""
    return "\n".join([*lines, body])


def report(told: Translation, output: Path | None) -> str:
    """Return what has no counterpart, what was not looked at, and what to do next."""
    lines = [f"read as a file of {told.trainer}"]
    lines += [f"- {note}" for note in told.notes]
    if left := told.leftovers():
        lines.append(f"- no counterpart, or not known here: {', '.join(left)}")
    try:
        make_train_config(**NEEDED | told.settings if "dataset_name" not in told.settings else told.settings)
    except ConfigError as error:
        lines.append(f"- to be mended: {error}")
    name = "FILE" if output is None else output
    lines.append(f"next: sd-memguard train --config {name} --dry_run")
    return "\n".join(lines)
