# SPDX-License-Identifier: Apache-2.0
"""Keeps a sweep's points and results in an SQLite database. Each result is stored when it arrives, so a kill loses few.

Owns the database's file and a lock on it: a second process with the same file is refused. Use it in one thread.
"""

from __future__ import annotations

import fcntl
import json
import os
import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Final, NamedTuple, Self

from pyvmm import __version__
from pyvmm.bench.model import BenchError, Series, Value
from pyvmm.bench.sweep.plan import Plan, Task, differences
from pyvmm.bench.sweep.work import Answer

FORMAT: Final = 2
"""Of the database; another one's are refused."""

PATIENCE: Final = 60.0
"""Seconds that whoever reads the database may keep it from being written."""

_APPLICATION: Final = 0x7056_4D53
"""Marks SQLite files that are a sweep's ("pVMS")."""

_TABLES: Final = """
CREATE TABLE sweep (identity TEXT, asked TEXT, pyvmm TEXT, created REAL);
CREATE TABLE environments (id INTEGER PRIMARY KEY, data TEXT UNIQUE);
CREATE TABLE points (
    number INTEGER PRIMARY KEY, key TEXT UNIQUE, state TEXT, tries INTEGER, reason TEXT,
    worker TEXT, environment INTEGER REFERENCES environments, started REAL, ended REAL
);
CREATE TABLE series (point INTEGER REFERENCES points, position INTEGER, data TEXT, PRIMARY KEY (point, position));
"""
WAITING, DONE, FAILED = "waiting", "done", "failed"
_BEGIN_ANEW: Final = "--database FILE keeps this sweep elsewhere; --restart forgets what is there and begins anew"


class Counts(NamedTuple):
    """The numbers of points by state."""

    total: int
    done: int
    failed: int

    @property
    def waiting(self) -> int:
        return self.total - self.done - self.failed


class Store:
    """A sweep's database, as a context manager.

    Raises BenchError if ``path`` is in use, belongs to another plan, format or pyvmm (with the difference), is not a
    sweep's database, or cannot be written. ``restart`` discards the contents of a sweep's database. A database in which
    nothing was measured yet is taken over for this plan.
    """

    def __init__(self, path: str, plan: Plan, *, restart: bool = False) -> None:
        self.path = path
        self._plan = plan
        self._lock = self._locked()
        try:
            with self._told():
                self._db = sqlite3.connect(path, timeout=PATIENCE, isolation_level=None)
            try:
                self._open(restart)
            except BaseException:
                self._db.close()
                raise
        except BaseException:
            os.close(self._lock)
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._db.close()
        os.close(self._lock)  # last: closing a descriptor of its file would take the database's own locks

    def waiting(self) -> list[Task]:
        """Return the points still to be measured, in order."""
        with self._told():
            rows = self._db.execute("SELECT number FROM points WHERE state = ? ORDER BY number", (WAITING,))
            return [self._plan.tasks[number] for (number,) in rows]

    def counts(self) -> Counts:
        """Count the points."""
        with self._told():
            found = dict(self._db.execute("SELECT state, count(*) FROM points GROUP BY state"))
        return Counts(sum(found.values()), found.get(DONE, 0), found.get(FAILED, 0))

    def failures(self) -> list[tuple[Task, str]]:
        """Return the points that failed, and why."""
        with self._told():
            rows = self._db.execute("SELECT number, reason FROM points WHERE state = ? ORDER BY number", (FAILED,))
            return [(self._plan.tasks[number], reason) for number, reason in rows]

    def done(self, task: Task, answer: Answer) -> None:
        """Store the results of a point, all or nothing."""
        text = json.dumps(answer.environment, sort_keys=True)
        with self._transaction():
            self._db.execute("INSERT OR IGNORE INTO environments (data) VALUES (?)", (text,))
            [(environment,)] = self._db.execute("SELECT id FROM environments WHERE data = ?", (text,)).fetchall()
            self._db.executemany(
                "INSERT OR REPLACE INTO series VALUES (?, ?, ?)",
                [(task.number, at, json.dumps(series)) for at, series in enumerate(answer.series)],
            )
            self._db.execute(
                "UPDATE points SET state = ?, tries = tries + 1, reason = '', worker = ?, environment = ?, "
                "started = ?, ended = ? WHERE number = ?",
                (DONE, answer.worker, environment, answer.started, answer.ended, task.number),
            )

    def lost(self, task: Task, reason: str) -> None:
        """Record that a point lost its worker; it must still be measured."""
        self._tried(task, WAITING, reason)

    def fail(self, task: Task, reason: str) -> None:
        """Record that a point cannot be measured."""
        self._tried(task, FAILED, reason)

    def retry_failed(self) -> None:
        """Mark the failed points as waiting again."""
        with self._transaction():
            self._db.execute("UPDATE points SET state = ? WHERE state = ?", (WAITING, FAILED))

    def environments(self) -> list[tuple[int, dict[str, Value]]]:
        """Return the environments of the measured points, by number."""
        with self._told():
            rows = self._db.execute("SELECT id, data FROM environments ORDER BY id").fetchall()
        return [(number, json.loads(data)) for number, data in rows]

    def results(self, environment: int) -> Iterator[tuple[Task, Series]]:
        """Yield the results of one environment, in the order of the plan."""
        with self._told():
            rows = self._db.execute(
                "SELECT number, data FROM points JOIN series ON point = number WHERE environment = ? "
                "ORDER BY number, position",
                (environment,),
            )
            for number, data in rows:
                yield self._plan.tasks[number], Series.from_json(json.loads(data))

    def seconds(self, environment: int) -> float:
        """Return the seconds that all measurements in one environment took together."""
        with self._told():
            rows = self._db.execute("SELECT sum(ended - started) FROM points WHERE environment = ?", (environment,))
            return float(rows.fetchone()[0] or 0.0)

    def _tried(self, task: Task, state: str, reason: str) -> None:
        with self._transaction():
            self._db.execute(
                "UPDATE points SET state = ?, tries = tries + 1, reason = ? WHERE number = ?",
                (state, reason, task.number),
            )

    # -- the file

    def _locked(self) -> int:
        """Return a descriptor that holds the lock. The kernel releases the lock however this process ends."""
        try:
            lock = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError as error:
            hint = "--database FILE keeps the results elsewhere"
            raise BenchError(f"{self.path} cannot be written: {error.strerror}", hint=hint) from None
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(lock)
            if isinstance(error, BlockingIOError):
                raise BenchError(
                    f"{self.path} is in use: another process runs this sweep",
                    hint="wait for it, or end it: the same command then goes on where it stopped",
                ) from None
            raise BenchError(f"{self.path} cannot be locked: {error.strerror}") from None
        return lock

    def _open(self, restart: bool) -> None:
        with self._told():
            is_new = not self._db.execute("SELECT 1 FROM sqlite_master").fetchone()
            if not is_new and self._pragma("application_id") != _APPLICATION:
                raise BenchError(f"{self.path} is a database, but no sweep's", hint="--database FILE names another")
        if is_new or restart:
            self._create()
            return
        theirs = self._pragma("user_version")
        if theirs != FORMAT:
            self._refuse(f"its format is {theirs}, this pyvmm's is {FORMAT}")
        with self._told():
            rows = self._db.execute("SELECT identity, asked, pyvmm FROM sweep")
            identity, asked, version = rows.fetchone()
            is_untouched = not self._db.execute("SELECT 1 FROM points WHERE tries > 0").fetchone()
        if is_untouched and (identity, version) != (self._plan.identity, __version__):
            self._create()  # it has no results that could be mixed with others
            return
        if version != __version__:
            self._refuse(f"it was measured with pyvmm {version}, this is {__version__}")
        if identity != self._plan.identity:
            what = differences(self._plan.asked, json.loads(asked)) or ["the points that the cases make of it"]
            self._refuse(f"it is of another sweep than {self._plan.file}:" + "".join(f"\n  {each}" for each in what))

    def _create(self) -> None:
        with self._transaction():
            for (name,) in self._db.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall():
                self._db.execute(f'DROP TABLE "{name}"')
            for statement in filter(str.strip, _TABLES.split(";")):
                self._db.execute(statement)
            self._db.execute(f"PRAGMA application_id = {_APPLICATION}")
            self._db.execute(f"PRAGMA user_version = {FORMAT}")
            self._db.execute(
                "INSERT INTO sweep VALUES (?, ?, ?, ?)",
                (self._plan.identity, json.dumps(self._plan.asked), __version__, time.time()),
            )
            self._db.executemany(
                "INSERT INTO points (number, key, state, tries) VALUES (?, ?, ?, 0)",
                [(task.number, task.key, WAITING) for task in self._plan.tasks],
            )

    def _refuse(self, why: str) -> None:
        raise BenchError(f"{self.path} cannot be gone on with: {why}", hint=_BEGIN_ANEW)

    def _pragma(self, name: str) -> Any:
        with self._told():
            return self._db.execute(f"PRAGMA {name}").fetchone()[0]

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        with self._told():
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._db.execute("COMMIT")
            except BaseException:
                if self._db.in_transaction:  # if SQLite has not rolled back itself
                    self._db.execute("ROLLBACK")
                raise

    @contextmanager
    def _told(self) -> Iterator[None]:
        """Turn SQLite's errors into BenchError."""
        try:
            yield
        except sqlite3.Error as error:
            if getattr(error, "sqlite_errorcode", None) == sqlite3.SQLITE_FULL:
                raise BenchError(
                    f"{self.path} cannot grow: the disk is full",
                    hint="what was stored is whole; make room, and the same command goes on with the rest",
                ) from error
            if getattr(error, "sqlite_errorcode", None) == sqlite3.SQLITE_NOTADB:
                raise BenchError(f"{self.path} is no database", hint="--database FILE names another") from error
            raise BenchError(f"{self.path}: the database does not work: {error}") from error
