"""Ctrl-C and termination: the step under way is finished and saved; a second signal aborts at once."""

import signal
import threading
from types import FrameType, TracebackType

SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name)]


class Interrupted(SystemExit):
    """The run was asked to stop and has saved itself; the exit status is 128 + the signal's number."""


class StopRequest:
    """Within its block, a signal sets ``received`` instead of ending the program; a second one ends it."""

    def __init__(self) -> None:
        self.received: signal.Signals | None = None

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
        if self.received is not None:
            raise KeyboardInterrupt
        self.received = signal.Signals(number)
