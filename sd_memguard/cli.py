"""The `sd-memguard` program: one subcommand per task, whose heavy imports wait until it is called."""

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import NamedTuple

from sd_memguard import __version__
from sd_memguard.errors import exit_on_user_error


class Command(NamedTuple):
    """A subcommand: its line in `--help`, and what runs it with the arguments after its name."""

    help: str
    run: Callable[[Sequence[str]], None]


def _train(argv: Sequence[str]) -> None:
    from sd_memguard.train import main

    main(argv, prog="sd-memguard train")


def _demo(argv: Sequence[str]) -> None:
    from sd_memguard.demo.command import main

    with exit_on_user_error():
        main(argv)


def _audit(argv: Sequence[str]) -> None:
    from sd_memguard.audit.command import main

    with exit_on_user_error():
        main(argv)


def _run(argv: Sequence[str]) -> None:
    from sd_memguard.run import main

    main(argv, prog="sd-memguard run")


def _export(argv: Sequence[str]) -> None:
    from sd_memguard.export.command import main

    main(argv)


def _inspect(argv: Sequence[str]) -> None:
    from sd_memguard.inspection.command import main

    with exit_on_user_error():
        main(argv)


def _check(argv: Sequence[str]) -> None:
    from sd_memguard.check.command import main

    with exit_on_user_error():
        raise SystemExit(main(argv))


def _migrate(argv: Sequence[str]) -> None:
    from sd_memguard.migrate.command import main

    with exit_on_user_error():
        main(argv)


COMMANDS = {
    "train": Command("fine-tune Stable Diffusion under the memorization guard", _train),
    "run": Command("run one of diffusers' own training scripts under the guard, unmodified", _run),
    "demo": Command("fine-tune the bundled model twice, plain and guarded, and compare what they copy", _demo),
    "check": Command("find unusable images, faulty captions and duplicates in a folder before training", _check),
    "audit": Command("measure how much models copy of their training images", _audit),
    "export": Command("write a run in another format: a diffusers folder, one file, or a LoRA file", _export),
    "migrate": Command("turn the configuration of kohya, OneTrainer, SimpleTuner or ai-toolkit into ours", _migrate),
    "inspect": Command("summarize a run, and show its most memory-prone images and its curves", _inspect),
}


def main(argv: Sequence[str] | None = None) -> None:
    """Run the subcommand that `argv`, by default the command line, begins with."""
    arguments = sys.argv[1:] if argv is None else argv
    name = build_parser().parse_args(arguments[:1]).command
    try:
        COMMANDS[name].run(arguments[1:])
    except ModuleNotFoundError as error:
        package = (error.name or "").split(".")[0]
        if package in {"", "sd_memguard"} | sys.stdlib_module_names:
            raise
        extra = "audit" if name == "audit" else "all" if name == "demo" else "train"
        print(
            f"error: `sd-memguard {name}` needs the package {package!r}, which is not installed; "
            f"run `pip install 'sd-memguard[{extra}]'`",
            file=sys.stderr,
        )
        raise SystemExit(2) from None


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the subcommand's name; what follows the name is for the subcommand to parse."""
    parser = argparse.ArgumentParser(
        prog="sd-memguard",
        usage="sd-memguard COMMAND [flags]",
        description="Fine-tune Stable Diffusion so that it does not memorize its training images.",
        epilog="\n".join(["commands:", *(f"  {name:8}{command.help}" for name, command in COMMANDS.items())]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "command", metavar="COMMAND", choices=COMMANDS, help="see below; `COMMAND --help` lists its flags"
    )
    parser.add_argument("--version", action="version", version=f"sd-memguard {__version__}")
    return parser
