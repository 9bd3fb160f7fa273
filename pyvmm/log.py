# SPDX-License-Identifier: Apache-2.0
"""Log events with values to stderr, as text or as JSON lines.

Owns structlog's configuration. Any module may call :func:`get_logger` at import time. Only the CLI calls
:func:`configure`, once. structlog is imported at the first visible event, because importing it costs more than a short
run, and most runs log nothing. The exit path never logs: it writes records to the trace ring.

A caller may hold locks while the reader of stderr does not read. So within :func:`never_waiting`, events without room
are dropped and counted.
"""

from __future__ import annotations

import contextlib
import functools
import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, MutableMapping
    from typing import Any, Final, TextIO

    from structlog.typing import ExcInfo, FilteringBoundLogger

    from pyvmm.outlet import Outlet

DEBUG: Final = 10
INFO: Final = 20
WARNING: Final = 30
ERROR: Final = 40

_BY_VERBOSITY: Final = {-1: ERROR, 0: WARNING, 1: INFO, 2: DEBUG}


class _Lines:
    """The output of structlog: writes lines, and by default waits for their reader."""

    note: Callable[[int], str]
    """The line with the number of dropped lines."""

    def __init__(self, stream: TextIO | None) -> None:
        import threading  # loaded by runs, but not by --help

        self._lock = threading.Lock()
        self._stream = stream
        self._fd: int | None = None
        """The non-blocking output."""
        self._outlet: Outlet | None = None
        self._rest = b""
        """The rest of a partly written line, which must be written first."""
        self._dropped = 0

    @property
    def stream(self) -> TextIO:
        """The stream of the lines."""
        return self._stream or sys.stderr

    def write(self, line: str) -> None:
        """Write a line, or drop it."""
        with self._lock:
            if self._fd is None:
                self.stream.write(line + "\n")
                self.stream.flush()
            else:
                self._offer(self._fd, line)

    debug = info = warning = error = write

    def _offer(self, fd: int, line: str) -> None:
        if self._outlet is None:  # most runs have nothing to say
            from pyvmm.outlet import Outlet

            self._outlet = Outlet(fd)
        self._rest = _written(self._outlet, self._rest)
        if not self._rest:
            data = self._told() + self._encoded(line)
            rest = _written(self._outlet, data)
            if len(rest) < len(data):
                self._rest, self._dropped = rest, 0
                return
        self._dropped += 1

    def _told(self) -> bytes:
        return self._encoded(self.note(self._dropped)) if self._dropped else b""

    def _encoded(self, line: str) -> bytes:
        return (line + "\n").encode(self.stream.encoding, "backslashreplace")

    def stop_waiting(self) -> None:
        """From now on, drop lines without room. Does nothing if the stream has no descriptor."""
        with self._lock, contextlib.suppress(OSError, ValueError):
            self._fd = self.stream.fileno()

    def wait(self) -> None:
        """Wait for the reader from now on, and write the pending lines."""
        with self._lock:
            fd, outlet = self._fd, self._outlet
            self._fd = self._outlet = None
            if fd is None or outlet is None:
                return
            outlet.close()
            left = self._rest + self._told()
            self._rest, self._dropped = b"", 0
            # The next writer gets the same error. It must not stop the end of a run.
            with contextlib.suppress(OSError):
                while left:
                    left = left[os.write(fd, left) :]


def _written(outlet: Outlet, data: bytes) -> bytes:
    """Write without waiting, and return the unwritten rest."""
    while data and (taken := outlet.write(data)):
        data = data[taken:]
    return data


def _harmless(_logger: object, _name: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """Write out what a terminal would obey in an event's values, and what would look like another line."""
    from pyvmm.terminal import clean

    for name, value in event.items():
        if isinstance(value, str):
            event[name] = clean(value).replace("\n", "\\n")
    return event


def _put_traceback(out: TextIO, error: ExcInfo) -> None:
    import traceback

    from pyvmm.terminal import clean

    out.write("\n" + clean("".join(traceback.format_exception(*error)).rstrip()))


class _State:
    """The configuration of events. One per process, replaced as a whole."""

    def __init__(self, level: int = WARNING, json: bool = False, stream: TextIO | None = None) -> None:
        self.level = level
        self.json = json
        self.stream = stream
        self.configured = False

    @functools.cached_property
    def lines(self) -> _Lines:
        """The output, made at first use."""
        return _Lines(self.stream)

    def ready(self) -> None:
        """Configure structlog, the first time."""
        if self.configured:
            return
        import structlog

        lines = self.lines
        processors: list[Any] = [structlog.processors.add_log_level]
        if self.json:
            processors += [
                structlog.processors.TimeStamper(fmt="iso", utc=True),
                structlog.processors.format_exc_info,
                structlog.processors.JSONRenderer(),
            ]
        else:
            processors += [
                structlog.processors.TimeStamper(fmt="%H:%M:%S", utc=False),
                _harmless,
                # The first parameter, the width events are padded to, has had two names.
                structlog.dev.ConsoleRenderer(0, colors=lines.stream.isatty(), exception_formatter=_put_traceback),
            ]
        # Reported at every level, because the dropped lines were visible ones.
        note = structlog.wrap_logger(
            structlog.ReturnLogger(),
            processors=processors,
            wrapper_class=structlog.make_filtering_bound_logger(WARNING),
            component="log",
        )
        lines.note = lambda count: note.warning("log_dropped", count=count)
        structlog.configure(
            processors=processors,
            wrapper_class=structlog.make_filtering_bound_logger(self.level),
            logger_factory=lambda *_: lines,
            cache_logger_on_first_use=True,
        )
        self.configured = True


_state = _State()


class Log:
    """A component's logger. ``event`` is a snake_case name. Values such as gpa and vcpu are numbers."""

    def __init__(self, component: str) -> None:
        self._component = component
        self._made_for: _State | None = None
        self._logger: FilteringBoundLogger | None = None

    def debug(self, event: str, **values: object) -> None:
        """Log details for debugging (``-vv``)."""
        if _state.level <= DEBUG:
            self._bound().debug(event, **values)

    def info(self, event: str, **values: object) -> None:
        """Log a normal event (``-v``)."""
        if _state.level <= INFO:
            self._bound().info(event, **values)

    def warning(self, event: str, **values: object) -> None:
        """Log an unexpected event that the run survives."""
        if _state.level <= WARNING:
            self._bound().warning(event, **values)

    def error(self, event: str, **values: object) -> None:
        """Log an error, even with ``-q``."""
        self._bound().error(event, **values)

    def _bound(self) -> FilteringBoundLogger:
        state, logger = _state, self._logger
        if logger is None or self._made_for is not state:
            import structlog

            state.ready()
            self._logger = logger = structlog.get_logger(component=self._component).bind()
            self._made_for = state
        return logger


def get_logger(component: str) -> Log:
    """Return a logger that names ``component`` in each of its events."""
    return Log(component)


def configure(verbosity: int = 0, *, json: bool = False, stream: TextIO | None = None) -> None:
    """Configure which events are written, how and where (default stderr).

    ``verbosity`` is the number of ``-v`` less that of ``-q``: -1 errors, 0 warnings too, 1 info, 2 all.
    """
    global _state
    _state = _State(_BY_VERBOSITY[max(-1, min(2, verbosity))], json, stream)


def prepare() -> None:
    """Import and read now what the first event needs, for a process that soon opens no more files."""
    import time

    import structlog
    import structlog.processors  # noqa: F401 - what a renderer imports when it renders

    time.localtime()  # reads the time zone
    _state.ready()
    from pyvmm import outlet  # noqa: F401
    from pyvmm.terminal import clean  # noqa: F401


@contextlib.contextmanager
def never_waiting() -> Iterator[None]:
    """While a guest runs, never wait for the reader of events. Events without room are dropped and counted.

    Leaving this context waits until pending events are written. Call :func:`configure` before.
    """
    lines = _state.lines
    lines.stop_waiting()
    try:
        yield
    finally:
        lines.wait()
