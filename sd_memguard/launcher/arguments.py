"""The command line of the launcher: the guard's flags, then the script, then the script's own flags."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from sd_memguard.config import GUARD_SETTINGS, TRAIN_SETTINGS, GuardConfig
from sd_memguard.errors import ConfigError
from sd_memguard.flags import add_flags
from sd_memguard.settings import nearest

OWN = ("memguard", "preset", "proxy_store")
"""Settings of the drop-in script that the launcher has too, besides those of the guard."""
SETTINGS = {
    **{name: TRAIN_SETTINGS[name] for name in OWN},
    **GUARD_SETTINGS,
}


class Command(NamedTuple):
    """What is to be run: the guard's settings, where its proxies rest, the script, and the script's arguments.

    ``denoisers`` are names of the denoiser's class, where the user has given some.
    """

    guard: GuardConfig
    proxy_store: str
    script: Path
    arguments: list[str]
    denoisers: tuple[str, ...] = ()


def parse_command(argv: Sequence[str], *, prog: str | None = None) -> Command:
    """Read a command line; everything after the first ``*.py`` belongs to the script.

    An error prints its message to stderr and exits with status 2; `--help` lists the flags and exits with 0.

    Raises:
        ConfigError: no script is named or it does not exist, or a setting is out of range.
    """
    parser = _parser(prog)
    position = next((index for index, word in enumerate(argv) if word.endswith(".py")), len(argv))
    namespace, unknown = parser.parse_known_args(argv[:position])
    if unknown:
        flag = unknown[0].partition("=")[0]
        known = [f"--{name}" for name in SETTINGS]
        parser.error(f"unknown argument `{flag}` before the script{nearest(flag, known)}; the script's flags follow it")
    if position == len(argv):
        raise ConfigError("no script is named; give the guard's flags, then the script (*.py), then the script's flags")
    script = Path(argv[position])
    if not script.is_file():
        raise ConfigError(f"the script {script} does not exist; give its path")
    denoisers = tuple(vars(namespace).pop("denoiser", ()))
    values: dict[str, Any] = {
        name: SETTINGS[name].check(SETTINGS[name].read(value) if isinstance(value, str) else value)
        for name, value in vars(namespace).items()
    }
    own = {name: values.pop(name, TRAIN_SETTINGS[name].default) for name in OWN}
    guard = GuardConfig.preset(own["preset"], **values)
    if own["memguard"] == "off":
        guard = GuardConfig.off()
    return Command(guard, own["proxy_store"], script, list(argv[position + 1 :]), denoisers)


def _parser(prog: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=prog or "python -m sd_memguard.run",
        usage="%(prog)s [guard flags] SCRIPT.py [the script's own flags]",
        description="Run a training script, unmodified, under the memorization guard. "
        "With accelerate: accelerate launch [its flags] -m sd_memguard.run [guard flags] SCRIPT.py [script flags].",
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    add_flags(parser, SETTINGS.values())
    parser.add_argument(
        "--denoiser",
        action="append",
        metavar="CLASS",
        help="class of the model that predicts the noise, where the guard does not know it; may be given again",
    )
    return parser
