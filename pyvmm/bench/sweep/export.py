# SPDX-License-Identifier: Apache-2.0
"""Writes a sweep's results to results files, one for each environment of the measured points. Owns nothing.

A results file has one environment, since numbers of two cannot be compared. So a sweep on many machines makes many
files: ``FILE`` itself if there is one, ``FILE`` with ``-1``, ``-2`` and so on before its suffix if there are more.
Repetitions are separate series; ``repetition`` in their notes counts them from 1.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

from pyvmm.bench.model import BenchError, Value, footer, header, line
from pyvmm.bench.sweep.plan import Plan
from pyvmm.bench.sweep.store import Store


def export(store: Store, plan: Plan, file: str) -> list[str]:
    """Write the stored results, and return the names of the files. Raises BenchError if one cannot be written.

    The file of an unfinished sweep has no last line, like that of a run that was cut off.
    """
    environments = store.environments()
    path = Path(file)
    names = (
        [file]
        if len(environments) == 1
        else [str(path.with_name(f"{path.stem}-{number}{path.suffix}")) for number, _ in environments]
    )
    for name, (number, environment) in zip(names, environments, strict=True):
        _write(Path(name), _lines(store, plan, number, environment))
    return names


def _lines(store: Store, plan: Plan, number: int, environment: dict[str, Value]) -> Iterator[str]:
    yield header(environment, plan.asked)
    for task, series in store.results(number):
        yield line(replace(series, notes={**series.notes, "repetition": task.repetition}))
    counts = store.counts()
    if not counts.waiting:
        date = datetime.now(UTC).isoformat(timespec="seconds")
        yield footer({"seconds": round(store.seconds(number), 1), "date": date, "failed points": counts.failed})


def _write(path: Path, lines: Iterator[str]) -> None:
    """Write a file completely, or leave the old one."""
    name = ""
    try:
        with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=f".{path.name}-", delete=False) as file:
            name = file.name
            file.writelines(lines)
        os.chmod(name, 0o666 & ~_umask())
        os.replace(name, path)
    except OSError as error:
        raise BenchError(f"{str(path)!r} cannot be written: {error.strerror}") from None
    finally:
        with suppress(OSError):
            os.unlink(name)


def _umask() -> int:
    mask = os.umask(0o077)
    os.umask(mask)
    return mask
