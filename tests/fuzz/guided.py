# SPDX-License-Identifier: Apache-2.0
"""The coverage-guided fuzzer of engine.c, for targets in Python: one process, the same corpus files.

An input is kept if it reaches a new step from one line to another, or reaches one more often. New inputs
are mutations of kept ones. Only lines of files under ``watched`` count, in the thread that runs the target.
"""

from __future__ import annotations

import contextlib
import random
import signal
import sys
import time
import traceback
from typing import TYPE_CHECKING, Any, Final

from tests.fuzz.fuzzer import Failed, Result, packed

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from pathlib import Path
    from types import FrameType

MOST: Final = 256
"""Bytes of the longest input."""
_NEWEST: Final = 16
_PATIENCE: Final = 30
"""Seconds that one input may take."""
_TELLING: Final = bytes([0, 1, 2, 3, 4, 7, 8, 15, 16, 0x7F, 0x80, 0xFE, 0xFF])

Step = int
"""A file's number and two of its lines, ``_LINE`` bits each."""
_LINE: Final = 16


class Coverage:
    """The coverage of a call: how often it took each step."""

    def __init__(self, watched: Path) -> None:
        self._watched = str(watched)
        self._numbers: dict[str, int] = {}
        self._steps: dict[Step, int] = {}

    def of(self, function: Callable[[bytes], None], data: bytes) -> set[tuple[Step, int]]:
        """Call ``function``; returns the steps, each with the number of bits of its count."""
        self._steps.clear()
        sys.settrace(self._called)
        try:
            function(data)
        finally:
            sys.settrace(None)
        return {(step, count.bit_length()) for step, count in self._steps.items()}

    def _called(self, frame: FrameType, _event: str, _argument: Any) -> Any:
        name = frame.f_code.co_filename
        number = self._numbers.get(name)
        if number is None:
            number = self._numbers[name] = len(self._numbers) + 1 if name.startswith(self._watched) else 0
        if not number:
            return None
        steps, last, file = self._steps, 0, number << 2 * _LINE

        def line(frame: FrameType, event: str, _argument: Any) -> Any:
            nonlocal last
            if event == "line":
                now = frame.f_lineno
                step = file | last << _LINE | now
                steps[step] = steps.get(step, 0) + 1
                last = now
            return line

        return line


@contextlib.contextmanager
def unwatched() -> Iterator[None]:
    """Exclude from the coverage the steps that every input takes."""
    trace = sys.gettrace()
    sys.settrace(None)
    try:
        yield
    finally:
        sys.settrace(trace)


def mutated(pool: list[bytes], chance: random.Random) -> bytes:
    """Mutate one of the inputs, preferably a new one."""
    data = bytearray(chance.choice(pool if chance.random() < 0.5 else pool[-_NEWEST:]) if pool else b"")
    for _ in range(1 + chance.randrange(1 << chance.randrange(5))):
        at = chance.randrange(len(data) + 1)
        some = 1 + chance.randrange(16)
        match chance.randrange(7):
            case 0 if at < len(data):
                data[at] ^= 1 << chance.randrange(8)
            case 1 if at < len(data):
                data[at] = chance.choice(_TELLING)
            case 2 if at < len(data):
                data[at] = chance.randrange(256)
            case 3:
                del data[at : at + some]
            case 4:
                data[at:at] = chance.randbytes(some)
            case 5:
                data[at:at] = data[at : at + some]
            case 6 if pool:
                other = chance.choice(pool)
                data[at:] = other[chance.randrange(len(other) + 1) :]
    return bytes(data[:MOST])


def read(path: Path) -> Iterator[bytes]:
    """Return the inputs of a corpus."""
    data = path.read_bytes() if path.exists() else b""
    while data:
        size = int.from_bytes(data[:2], "little")
        assert len(data) >= 2 + size, f"{path} is not whole"
        yield data[2 : 2 + size]
        data = data[2 + size :]


def _write(path: Path, inputs: Iterable[bytes]) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"".join(map(packed, inputs)))


def _shortest_first(data: bytes) -> tuple[int, bytes]:
    return len(data), data


def _too_long(_signal: int, _frame: FrameType | None) -> None:
    raise TimeoutError(f"it has not ended in {_PATIENCE} s")


def run(
    target: str, one: Callable[[bytes], None], watched: Path, inputs: Path, seconds: float, seed: int, keep: Path | None
) -> Result:
    """Try ``inputs``, and new ones for ``seconds``. The shortest inputs for each reached step go to ``keep``.

    ``one`` tries an input, and raises if an invariant fails. Raises Failed.
    """
    coverage, chance = Coverage(watched), random.Random(seed)
    known: set[tuple[Step, int]] = set()
    runs = 0

    def news(data: bytes, *, often: bool = True) -> bool:
        nonlocal runs
        runs += 1
        signal.alarm(_PATIENCE)
        try:
            reached = coverage.of(one, data)
        except Exception as error:
            raise Failed(target, "".join(traceback.format_exception(error)[-6:]), data) from error
        finally:
            signal.alarm(0)
        if not often:
            reached = {(step, 0) for step, _ in reached}
        new = not reached <= known
        known.update(reached)
        return new

    before = signal.signal(signal.SIGALRM, _too_long)
    try:
        pool = sorted(read(inputs), key=_shortest_first)
        given = len(pool)
        end = time.monotonic() + seconds
        for data in pool:
            news(data)
        while time.monotonic() < end:
            data = mutated(pool, chance)
            if news(data):
                pool.append(data)
        edges = len({step for step, _ in known})
        if keep:
            known.clear()
            _write(keep, [data for data in sorted(pool, key=_shortest_first) if news(data, often=False)])
        return Result(runs, given, len(pool) - given, edges)
    finally:
        signal.signal(signal.SIGALRM, before)
