"""The drop-in for diffusers' text-to-image scripts: `accelerate launch sd_memguard/train.py --pretrained MODEL ...`."""

import sys
from collections.abc import Sequence
from pathlib import Path

if not __package__:
    # Started as a file, Python looks for modules in this folder first, where ours would pass for top-level ones.
    # The folder above, which holds the package, takes its place.
    _here = Path(__file__).resolve().parent
    sys.path[:] = [str(_here.parent), *(entry for entry in sys.path if Path(entry).resolve() != _here)]


def main(argv: Sequence[str] | None = None, *, prog: str | None = None) -> None:
    """Fine-tune as the flags in `argv` say, by default those of the command line.

    A mistake of the user's prints one message to stderr and exits with status 2.
    """
    from sd_memguard.errors import exit_on_user_error
    from sd_memguard.flags import parse_train_args

    config = parse_train_args(sys.argv[1:] if argv is None else argv, prog=prog)
    # After parsing: `--help` and wrong flags need not wait for torch.
    from sd_memguard.console import configure_logging
    from sd_memguard.training.distributed_start import hard_exit
    from sd_memguard.training.trainer import train

    configure_logging()
    with exit_on_user_error(), hard_exit():
        train(config)


if __name__ == "__main__":
    main()
