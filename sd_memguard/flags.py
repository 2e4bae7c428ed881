"""Command line and configuration files of the drop-in script, derived from what `sd_memguard.config` declares."""

import argparse
import json
import os
import tomllib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml

from sd_memguard.config import (
    ALIASES,
    REFUSED,
    RENAMED,
    SETTINGS,
    TrainConfig,
    guess_setting,
    make_train_config,
    refuse_unknown,
)
from sd_memguard.errors import ConfigError, exit_on_user_error
from sd_memguard.settings import Setting, nearest, settings_of

Owner = TypeVar("Owner")


def parse_train_args(argv: Sequence[str], *, prog: str | None = None) -> TrainConfig:
    """Read the flags in `argv`, and the file that `--config` names, into checked settings.

    The command line wins over the file, the file over the preset, the preset over the defaults. An error prints its
    message to stderr and exits with status 2; `--help` lists the flags and exits with 0.

    Args:
        argv: The arguments without the program's name.
        prog: The program's name in messages; argparse's own guess by default.
    """
    parser = build_parser(prog)
    namespace, unknown = parser.parse_known_args(argv)
    if unknown:
        flag = unknown[0].partition("=")[0]
        if flag.removeprefix("--") in REFUSED:
            parser.error(f"`{flag}` is not supported: {REFUSED[flag.removeprefix('--')]}")
        if flag.removeprefix("--") in RENAMED:
            parser.error(f"unknown argument `{flag}`{guess_setting(flag.removeprefix('--'))}")
        known = [f"--{name}" for name in (*SETTINGS, *ALIASES, "config")]
        parser.error(f"unknown argument `{flag}`{nearest(flag, known)}; see --help for all of them")
    given = vars(namespace)
    with exit_on_user_error():
        settings = read_config_file(Path(given.pop("config"))) if "config" in given else {}
        settings |= {name: SETTINGS[name].read(value) for name, value in given.items()}
        if "LOCAL_RANK" in os.environ and os.environ["LOCAL_RANK"] != "-1":  # how launchers tell a process its rank
            settings["local_rank"] = int(os.environ["LOCAL_RANK"])
        return make_train_config(**settings)


def build_parser(prog: str | None = None) -> argparse.ArgumentParser:
    """Return the parser of all flags; it omits what is not given, and leaves it to the settings to read values."""
    parser = argparse.ArgumentParser(
        prog=prog,
        usage="%(prog)s --pretrained MODEL --train_data_dir FOLDER [flags]",
        description="Fine-tune Stable Diffusion so that it does not memorize its training images.",
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument("--config", metavar="FILE", help="YAML, JSON or TOML file of flags; the command line wins")
    add_flags(parser, SETTINGS.values())
    return parser


def parse_settings(
    owner: type[Owner], argv: Sequence[str], *, prog: str, description: str | None, **further: Any
) -> Owner:
    """Read the flags in `argv` into a dataclass of settings; a flag with many values may be given several times.

    An unknown flag prints a message to stderr and exits with status 2; `--help` lists the flags and exits with 0.

    Args:
        owner: The dataclass; it checks its settings when it is made.
        argv: The arguments without the program's name.
        prog: The program's name in messages.
        description: What it does, for `--help`.
        **further: Fields of the dataclass that are no flags.

    Raises:
        ConfigError: A setting is of the wrong type or out of range.
    """
    parser = settings_parser(owner, prog=prog, description=description)
    settings = {setting.name: setting for setting in settings_of(owner)}
    namespace, unknown = parser.parse_known_args(argv)
    if unknown:
        flag = unknown[0].partition("=")[0]
        known = [f"--{name}" for name in settings]
        parser.error(f"unknown argument `{flag}`{nearest(flag, known)}; see --help for all of them")
    given = {name: settings[name].read(value) for name, value in vars(namespace).items()}
    return owner(**given, **further)


def settings_parser(owner: type, *, prog: str | None = None, description: str | None = None) -> argparse.ArgumentParser:
    """Return the parser of the flags that a dataclass declares; it omits what is not given."""
    parser = argparse.ArgumentParser(
        prog=prog, description=description, allow_abbrev=False, argument_default=argparse.SUPPRESS
    )
    add_flags(parser, settings_of(owner), many="extend")
    return parser


def add_flags(parser: argparse.ArgumentParser, settings: Iterable[Setting], many: str = "store") -> None:
    """Add the flags of settings under their headings.

    Args:
        parser: Gets them.
        settings: What flags derive from.
        many: argparse's action for a list that is given twice: `store`, the last one counts, or `extend`.
    """
    declared = list(settings)
    for title in dict.fromkeys(setting.group for setting in declared):
        group = parser.add_argument_group(title)
        for setting in declared:
            if setting.group == title:
                _add_flag(group, setting, many)


def read_config_file(path: Path) -> dict[str, Any]:
    """Read settings from a YAML, JSON or TOML file whose keys are flag names; null stands for "not given".

    Raises:
        ConfigError: If the file cannot be read, has an unknown key, or a value of the wrong type or out of range.
    """
    load = _LOADERS.get(path.suffix.lower())
    if load is None:
        raise ConfigError(
            f"`--config` must end in {', '.join(_LOADERS)}, got {str(path)!r}; rename or convert the file"
        )
    try:
        content = load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"`--config` must be a readable {path.suffix} file, got {str(path)!r}: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"`--config` must hold `name: value` pairs, got {str(path)!r}; write one setting per line")
    try:
        return dict(_check_pair(name, value) for name, value in content.items() if value is not None)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def _check_pair(name: str, value: Any) -> tuple[str, Any]:
    refuse_unknown(name)
    name = ALIASES.get(name, name)
    return name, SETTINGS[name].check(SETTINGS[name].read(value))


def _load_yaml(text: str) -> Any:
    """Load YAML with every scalar as text, to be read as on the command line.

    There `1e-4` is a number and `off` a word; YAML 1.1 takes the first for a text and the second for `false`.
    """
    content = yaml.load(text, Loader=yaml.BaseLoader)
    if not isinstance(content, dict):
        return content
    return {name: None if value in ("", "null", "~") else value for name, value in content.items()}


_LOADERS: dict[str, Callable[[str], Any]] = {
    ".yaml": _load_yaml,
    ".yml": _load_yaml,
    ".json": json.loads,
    ".toml": tomllib.loads,
}
_METAVARS: dict[type | None, str] = {None: "", int: "INT", float: "FLOAT", str: "TEXT"}


def _add_flag(group: argparse._ArgumentGroup, setting: Setting, many: str) -> None:
    names = [f"--{setting.name}", *(f"--{alias}" for alias, name in ALIASES.items() if name == setting.name)]
    text = f"{setting.help}{_describe_default(setting)}".replace("%", "%%")
    if setting.kind is bool:
        group.add_argument(*names, dest=setting.name, action="store_true", help=text)
        return
    metavar = "|".join(filter(None, [_METAVARS[setting.kind], *setting.words]))
    listed: dict[str, Any] = {"nargs": "+", "action": many} if setting.many else {}
    group.add_argument(*names, dest=setting.name, metavar=metavar, help=text, **listed)


def _describe_default(setting: Setting) -> str:
    text = setting.default_text()
    return f" (default: {text})" if text else ""
