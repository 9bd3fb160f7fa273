"""Events: what happened, with values, to stderr; readable on a terminal, JSON lines for machines.

Owns structlog's configuration. Anyone may call :func:`get_logger` at import time; the CLI alone calls
:func:`configure`, once. structlog itself is imported at the first event that is wanted: its import costs more than a
short run does, and most runs have nothing to say. Never on the exit path: that writes records to the trace ring.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, Final, TextIO

if TYPE_CHECKING:
    from structlog.typing import FilteringBoundLogger

DEBUG: Final = 10
INFO: Final = 20
WARNING: Final = 30
ERROR: Final = 40

_BY_VERBOSITY: Final = {-1: ERROR, 0: WARNING, 1: INFO, 2: DEBUG}


class _State:
    """How events are written: one for the process, replaced as a whole."""

    def __init__(self, level: int = WARNING, json: bool = False, stream: TextIO | None = None) -> None:
        self.level = level
        self.json = json
        self.stream = stream
        self.configured = False

    def ready(self) -> None:
        """Configure structlog, the first time."""
        if self.configured:
            return
        import structlog

        stream = self.stream or sys.stderr
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
                # The first parameter, the width events are padded to, has had two names.
                structlog.dev.ConsoleRenderer(
                    0, colors=stream.isatty(), exception_formatter=structlog.dev.plain_traceback
                ),
            ]
        structlog.configure(
            processors=processors,
            wrapper_class=structlog.make_filtering_bound_logger(self.level),
            logger_factory=structlog.WriteLoggerFactory(file=stream),
            cache_logger_on_first_use=True,
        )
        self.configured = True


_state = _State()


class Log:
    """A component's logger. ``event`` is a snake_case name; values stay numbers, gpa and vcpu among them."""

    def __init__(self, component: str) -> None:
        self._component = component
        self._made_for: _State | None = None
        self._logger: FilteringBoundLogger | None = None

    def debug(self, event: str, **values: object) -> None:
        """Say what only someone looking for a fault wants to know (``-vv``)."""
        if _state.level <= DEBUG:
            self._bound().debug(event, **values)

    def info(self, event: str, **values: object) -> None:
        """Say what happens in a run that goes well (``-v``)."""
        if _state.level <= INFO:
            self._bound().info(event, **values)

    def warning(self, event: str, **values: object) -> None:
        """Say what is odd and was survived."""
        if _state.level <= WARNING:
            self._bound().warning(event, **values)

    def error(self, event: str, **values: object) -> None:
        """Say what went wrong; shown even with ``-q``."""
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
    """Say which events are written, how and where (stderr unless said).

    ``verbosity`` is the number of ``-v`` less that of ``-q``: -1 errors, 0 warnings too, 1 info, 2 all.
    """
    global _state
    _state = _State(_BY_VERBOSITY[max(-1, min(2, verbosity))], json, stream)
