"""Ctrl-C and termination: the step under way is finished and saved; a second signal aborts at once."""

import signal
import threading
import time
from types import FrameType, TracebackType

SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name)]

ECHO = 10.0
"""Seconds in which a launcher has passed a signal on that its processes have received themselves."""


class Interrupted(SystemExit):
    """The run was asked to stop and has saved itself; the exit status is 128 + the signal's number."""


class StopRequest:
    """Within its block, a signal sets ``received`` instead of ending the program; a second one ends it.

    Args:
        echo: seconds after the first signal in which others are taken for its echo: of several processes each may be
            signalled by the scheduler and once more by the launcher.
    """

    def __init__(self, echo: float = 0.0) -> None:
        self.echo = echo
        self.received: signal.Signals | None = None
        self._since = 0.0

    @property
    def number(self) -> int:
        """Number of the signal, 0 for none."""
        return 0 if self.received is None else int(self.received)

    def __enter__(self) -> "StopRequest":
        """Listen to the signals (Python lets the main thread alone do so)."""
        listens = threading.current_thread() is threading.main_thread()
        self._previous = {number: signal.signal(number, self._handle) for number in SIGNALS} if listens else {}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Leave the signals to whoever handled them before."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None and time.monotonic() - self._since >= self.echo:
            raise KeyboardInterrupt
        if self.received is None:
            self.received, self._since = signal.Signals(number), time.monotonic()
