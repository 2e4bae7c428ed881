"""Errors that a user can mend: one message, no traceback."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager


class UserError(ValueError):
    """A setting, file or folder that cannot be used; the text says which one, the rule, and the way out."""


class ConfigError(UserError):
    """A setting that is unknown, out of range, or at odds with another one."""


class LoopError(UserError):
    """A training loop that does not do what the guard in it relies on."""


@contextmanager
def exit_on_user_error() -> Iterator[None]:
    """End the program with status 2 and the bare message when a `UserError` comes out of the block."""
    try:
        yield
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
