"""Ctrl-C and termination: the step under way is finished and saved; a second signal aborts at once."""

import math
import os
import signal
import socket
import threading
import time
from types import FrameType, TracebackType

SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name)]

ECHO = 10.0
"""Seconds in which a launcher has passed a signal on that its processes have received themselves."""

GRACE = 60.0
"""Seconds after which one of several processes is ended that a signal does not reach: Python handles signals between
calls, and one that waits for a process that is gone may not return for hours."""


class Interrupted(SystemExit):
    """The run was asked to stop and has saved itself; the exit status is 128 + the signal's number."""


class StopRequest:
    """Within its block, a signal sets ``received`` instead of ending the program; a second one ends it.

    Args:
        echo: seconds after the first signal in which others are taken for its echo: of several processes each may be
            signalled by the scheduler and once more by the launcher. 0 for a process alone.
        grace: seconds in which a signal must reach one of several processes before it is ended all the same.
    """

    def __init__(self, echo: float = 0.0, grace: float = GRACE) -> None:
        self.echo, self.grace = echo, grace
        self._handled = -math.inf
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
        self._watched: tuple[socket.socket, int] | None = None
        if listens and self.echo:
            # Python writes each signal's number there at once, whatever call the main thread is in.
            reader, writer = socket.socketpair()
            writer.setblocking(False)
            self._watched = writer, signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
            threading.Thread(target=self._watch, args=(reader,), daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Leave the signals to whoever handled them before."""
        if self._watched is not None:
            writer, before = self._watched
            signal.set_wakeup_fd(before)
            writer.close()
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _watch(self, reader: socket.socket) -> None:
        """End the process when a signal does not reach the main thread; returns when the other end is closed."""
        with reader:
            while received := reader.recv(1):
                if received[0] in SIGNALS:
                    since = time.monotonic() - 1.0  # it may have been handled just before this thread woke
                    timer = threading.Timer(self.grace, self._end_unless_handled, (received[0], since))
                    timer.daemon = True
                    timer.start()

    def _end_unless_handled(self, number: int, since: float) -> None:
        if self._handled < since:
            os._exit(128 + number)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._handled = time.monotonic()
        if self.received is not None and time.monotonic() - self._since >= self.echo:
            raise KeyboardInterrupt
        if self.received is None:
            self.received, self._since = signal.Signals(number), time.monotonic()
