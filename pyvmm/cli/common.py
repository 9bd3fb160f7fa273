# SPDX-License-Identifier: Apache-2.0
"""What verbs share: options every one of them takes, sizes, output files, statuses in words, how a signal unwinds."""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import signal
from typing import TYPE_CHECKING, Any, Final

from pyvmm.errors import HostError, UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from types import FrameType

STATUSES: Final = """\
exit status:
  0  done; of run: the guest powered off      4  the deadline passed
  1  pyvmm failed                             5  this host cannot do what was asked
  2  the command line makes no sense        130  interrupted (128 + the signal's number)
  3  the guest crashed, was reset or failed
"""

_UNITS: Final = {"B": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40, "P": 1 << 50}
_SIZE: Final = re.compile(r"([0-9]+)([BKMGTP]?)", re.IGNORECASE)


class Help(argparse.RawDescriptionHelpFormatter):
    """Lays help out as wide as the terminal is.

    argparse makes one for every option that it checks, and its own asks shutil for the width: an import of six million
    instructions on the way to every guest.
    """

    def __init__(self, prog: str) -> None:
        columns = 0  # what a terminal says too that does not know, such as a serial one
        with contextlib.suppress(ValueError):
            columns = int(os.environ.get("COLUMNS", 0))
        if columns <= 0:
            with contextlib.suppress(OSError):
                columns = os.get_terminal_size().columns
        super().__init__(prog, width=(columns if columns > 0 else 80) - 2)


class Interrupted(KeyboardInterrupt):
    """A signal ends the program: everything unwinds, and the status is 128 + ``signal``."""

    def __init__(self, signal: int) -> None:
        super().__init__(signal)
        self.signal = signal


@contextlib.contextmanager
def terminable(handle: Callable[[int], object] | None = None, *, once: bool = False) -> Iterator[list[int]]:
    """Make SIGINT, SIGTERM and SIGHUP unwind, so that nothing is left half done; yields those that came, as they come.

    Each raises :class:`Interrupted`, with ``once`` the first only, so that no other cuts the way out short; with
    ``handle``, that is called with the signal's number instead. In the main thread only; may be nested.
    """
    received: list[int] = []

    def caught(number: int, _frame: FrameType | None) -> None:
        received.append(number)
        if handle is not None:
            handle(number)
        elif not once or len(received) == 1:
            raise Interrupted(number)

    old = {number: signal.signal(number, caught) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        yield received
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


class OutputPath(str):
    """The name of a file to be written, as it was given.

    Options with ``type=OutputPath`` write to the workstation's file even where the verb runs in the lab.
    """

    __slots__ = ()

    @property
    def path(self) -> str:
        """The file's path in what was given."""
        return str(self)


class _OutputBehind(OutputPath):
    """An output file behind the first ``=``, as in ``file=PATH``."""

    __slots__ = ()

    @property
    def path(self) -> str:
        return self.partition("=")[2]


def output_behind(word: str) -> Callable[[str], str]:
    """Return a type for options one of whose forms is ``WORD=FILE`` with a file to be written."""
    return lambda text: _OutputBehind(text) if text.startswith(f"{word}=") and text != f"{word}=" else text


def open_output(path: str, *, keep: bool = False) -> int:
    """Return a descriptor to write a file by, which is emptied unless ``keep``. UsageError where that cannot be."""
    try:
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | (0 if keep else os.O_TRUNC), 0o666)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise UsageError(f"{path!r} cannot be written: {reason}") from None


def require_arm64(args: argparse.Namespace, why: str, *, kvm: bool = False) -> None:
    """Raise HostError, which says ``why``, where KVM runs no arm64 guests; with ``kvm`` also where it may not be used.

    Asked before a verb does anything that takes long.
    """
    if (machine := os.uname().machine) != "aarch64":
        import shlex

        raise HostError(
            f"this host is {machine}, and {why}",
            hint=f"run it in the lab, an emulated arm64 host: pyvmm --lab {shlex.join(args.verb_argv)}",
        )
    if kvm:
        from pyvmm.kvm.system import System

        System.open().close()


def find_outputs(args: argparse.Namespace) -> list[str]:
    """Return the paths of all files that the parsed command line says are to be written."""

    def look(value: Any) -> Iterator[str]:
        if isinstance(value, OutputPath):
            yield value.path
        elif isinstance(value, list | tuple | dict):
            for item in value.values() if isinstance(value, dict) else value:
                yield from look(item)

    return list(dict.fromkeys(look(list(vars(args).values()))))


class _Misplaced(argparse.Action):
    """Catches ``--lab`` behind the verb, where it would be one of the verb's own."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        _namespace: argparse.Namespace,
        _values: str | Sequence[Any] | None,
        _option_string: str | None = None,
    ) -> None:
        verb = parser.prog.split()[-1]
        parser.error(f"--lab goes before the verb: pyvmm --lab {verb} ...")


def add_common(parser: argparse.ArgumentParser, *, verb: bool = True) -> None:
    """Add the options that may stand before or behind the verb: to a verb's parser, or to the one before it."""
    # A verb's parser must not undo what stood before the verb, so there an option not given leaves nothing.
    default: Any = argparse.SUPPRESS if verb else 0
    group = parser.add_argument_group("messages")
    group.add_argument("-v", "--verbose", action="count", default=default, help="log events; twice, with details")
    group.add_argument("-q", "--quiet", action="count", default=default, help="log errors only, not warnings")
    group.add_argument("--log-json", action="store_true", default=default, help="write events as JSON lines")
    if verb:
        group.add_argument("--lab", action=_Misplaced, nargs=0, default=default, help=argparse.SUPPRESS)


def parse_size(text: str) -> int:
    """Return bytes: a number with a unit of BKMGTP (powers of 1024), MiB without one."""
    match = _SIZE.fullmatch(text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no size; 512, 512M and 1G are")
    number, unit = match.groups()
    return int(number) * _UNITS[unit.upper() or "M"]


def parse_memory(text: str) -> tuple[int, int | None]:
    """Return (bytes, gpa or None) of ``SIZE[@ADDRESS]``."""
    size, at, where = text.partition("@")
    if not at:
        return parse_size(size), None
    try:
        return parse_size(size), int(where, 0)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{where!r} is no address; 0x80000000 is") from None


def parse_count(text: str) -> int:
    """Return a whole number of 1 or more."""
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no count; 1 is the least")
    return number


def parse_seconds(text: str) -> float:
    """Return a finite number of seconds above 0."""
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is no time; seconds above 0 are, like 10 or 0.5")
    return seconds
