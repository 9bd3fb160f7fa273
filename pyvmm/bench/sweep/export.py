# SPDX-License-Identifier: Apache-2.0
"""Writes a sweep's results as results files, one for each environment that points were measured in. Owns nothing.

A results file tells of one environment, and numbers of two do not compare; so a sweep of several machines makes several
files: FILE itself where there is one, ``FILE`` with ``-1``, ``-2`` and so on before its suffix where there are more.
Repetitions are series of their own; ``repetition`` in their notes counts them from 1.
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
    """Write what is stored, and return the names of the files. BenchError where one cannot be written.

    A file of a sweep that is not through has no last line, as one of a run that was cut off.
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
    """Write a file whole, or leave what there was."""
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
