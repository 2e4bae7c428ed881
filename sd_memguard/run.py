"""The launcher: `accelerate launch [its flags] -m sd_memguard.run [guard flags] SCRIPT.py [the script's own flags]`."""

import sys
from collections.abc import Sequence


def main(argv: Sequence[str] | None = None, *, prog: str | None = None) -> None:
    """Run a script under the guard as `argv`, by default the command line, says.

    A mistake of the user's prints one message to stderr and exits with status 2.
    """
    from sd_memguard.errors import exit_on_user_error
    from sd_memguard.launcher.arguments import parse_command
    from sd_memguard.launcher.scripts import check_script

    with exit_on_user_error():
        command = parse_command(sys.argv[1:] if argv is None else argv, prog=prog)
        check_script(command)
        # After that: `--help`, wrong flags and scripts that are refused need not wait for torch.
        from sd_memguard.launcher.session import Session, configure_logging

        configure_logging()
        Session(command).run()


if __name__ == "__main__":
    main()
