# SPDX-License-Identifier: Apache-2.0
"""The test tiers: tests that cannot run on this machine run in the lab, or are counted in one line that says why not.

``kvm`` tests need a /dev/kvm of any architecture. ``pkvm`` tests need a pKVM host: this one if it is one, else a lab in
which a second pytest runs the selected ones in order while the others run here. After these, a second lab runs
the remaining tests from the last file to the first, until the two meet. Reports are replayed last, as if the tests had
run here. ``lab`` tests need what the lab needs. If a tier cannot run, it fails in CI (``CI`` set); elsewhere it is
skipped.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import pytest

from pyvmm.errors import PyvmmError
from pyvmm.labenv import in_lab
from tests import nightly

SHOWN = ("debian:", "own:", "passt", "e2fsprogs", "gdb")
"""What tests find in the lab beside what it has: guests' kernels, programs on PATH. The project's kernel is built for
that in CI only; elsewhere tests that need what there is none of are skipped (see tests/pkvm/required.py)."""
PATIENCE = float(os.environ.get("PYVMM_LAB_TEST_TIMEOUT", "1800"))
"""Seconds that a test may take in the lab, its share of other tests' time on a busy machine included."""

POLL = 0.05
"""Seconds between two looks at what has come from the lab."""

Why = Callable[[], str | None]
"""Says why a tier cannot run, None where it can."""


def no_kvm() -> str | None:
    """Return why /dev/kvm cannot be used."""
    from pyvmm.kvm.system import System

    try:
        System.open().close()
    except PyvmmError as error:
        return error.message
    return None


def host_is_pkvm() -> bool:
    """Return whether protected VMs run on this host."""
    from pyvmm.cli.demo import runs_protected_guests

    return runs_protected_guests()


def no_lab() -> str | None:
    """Return why no lab can be booted here."""
    from pyvmm.lab.image import usable_image
    from pyvmm.lab.needs import require

    try:
        require(building=usable_image() is None)
    except PyvmmError as error:
        return str(error)
    return None


class Tiers:
    """Runs, forwards or skips each test by its marks. Reports at the end what happened to each tier as a whole."""

    def __init__(self, config: pytest.Config) -> None:
        self._config = config
        self._missing: dict[str, str] = {}
        self._skipped: dict[str, int] = {}
        self._forwarded: dict[str, pytest.Item] = {}
        self._labs: Labs | None = None

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        """Decide where each selected test runs."""
        checks: dict[str, Why] = {"kvm": no_kvm, "lab": no_lab}
        pkvm = [item for item in session.items if item.get_closest_marker("pkvm")]
        if pkvm and not in_lab() and not host_is_pkvm():
            checks["pkvm"] = no_lab
            self._forwarded = {item.nodeid: item for item in pkvm}
        for tier, why_not in checks.items():
            if any(item.get_closest_marker(tier) for item in session.items) and (why := why_not()):
                self._missing[tier] = why
        # They come last: the lab runs them while the others run here.
        session.items.sort(key=lambda item: item.nodeid in self._forwarded)

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item, nextitem: pytest.Item | None) -> bool | None:
        """Report for a test that cannot run here."""
        if self._forwarded and self._labs is None and "pkvm" not in self._missing:
            self._labs = Labs(self._config, list(self._forwarded))
        if self._labs is not None and item.nodeid in self._forwarded:
            try:
                self._labs.wait_for_first()
            except PyvmmError as error:
                self._missing["pkvm"] = str(error)
        for tier, why in self._missing.items():
            if item.get_closest_marker(tier):
                self._skipped[tier] = self._skipped.get(tier, 0) + 1
                self._replay(item, nextitem, iter([self._no_means(item, tier, why)]))
                return True
        if self._labs is None or item.nodeid not in self._forwarded:
            return None
        self._labs.add_second()
        self._replay(item, nextitem, self._labs.reports(item))
        return True

    def _replay(self, item: pytest.Item, nextitem: pytest.Item | None, reports: Iterator[pytest.TestReport]) -> None:
        item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
        for report in reports:
            item.ihook.pytest_runtest_logreport(report=report)
        item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
        # Tear down what earlier tests set up and the next does not need, as the runner would.
        item.session._setupstate.teardown_exact(nextitem)

    def _no_means(self, item: pytest.Item, tier: str, why: str) -> pytest.TestReport:
        if os.environ.get("CI"):
            return failure(item, f"the {tier} tier cannot run, and in CI it must: {why}")
        # All have one location, so that pytest folds them into one line.
        return report(item, "skipped", (__file__, 1, f"{tier} tier: {why}"))

    def pytest_sessionfinish(self) -> None:
        if self._labs is not None:
            self._labs.close()

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        for tier, count in self._skipped.items():
            terminalreporter.write_line(f"{tier} tier: {count} tests not run: {self._missing[tier].splitlines()[0]}")
        if self._labs is not None and self._labs.title is not None:
            terminalreporter.write_line(f"pkvm tier: {len(self._forwarded)} tests ran in the lab: {self._labs.title}")
            if (why := self._labs.why_no_second) is not None:
                terminalreporter.write_line(f"pkvm tier: one lab ran them all, as a second one did not come up: {why}")


def report(
    item: pytest.Item, outcome: Literal["failed", "skipped"], longrepr: str | tuple[str, int, str]
) -> pytest.TestReport:
    """Make a report of a test that was not run."""
    when: Literal["call", "setup"] = "call" if outcome == "failed" else "setup"
    keywords: dict[str, Literal[1]] = dict.fromkeys(item.keywords, 1)
    return pytest.TestReport(item.nodeid, item.location, keywords, outcome, longrepr, when, duration=0.0)


def failure(item: pytest.Item, why: str) -> pytest.TestReport:
    return report(item, "failed", why)


class Labs:
    """The labs that run ``nodeids``: the first runs all in order, the second begins with the last file."""

    def __init__(self, config: pytest.Config, nodeids: list[str]) -> None:
        self._config = config
        self._nodeids = nodeids
        self._first = InnerPytest(config, nodeids)
        self._second: InnerPytest | None = None

    @property
    def title(self) -> str | None:
        """What the first lab runs on, once it is up."""
        return self._first.title

    @property
    def why_no_second(self) -> str | None:
        """Why the second lab did not come up, in a line; None if it did, is still starting, or was not wanted."""
        second = self._second
        if second is None or second.title is not None or second.ended is None:
            return None
        return " ".join(second.ended.split("\n", 2)[:2])

    def wait_for_first(self) -> None:
        """Wait until the first lab is up, showing what must be built. Raises PyvmmError if no lab can come up."""
        while self.title is None:
            if self._first.ended is not None:
                raise PyvmmError(self._first.ended)
            if not self._first.read():
                time.sleep(POLL)

    def add_second(self) -> None:
        """Start the second lab, unless it was started. The first lab keeps its current file."""
        if self._second is not None:
            return
        while self._first.read():
            pass
        files: dict[str, list[str]] = {}
        for nodeid in self._nodeids:
            if nodeid not in self._first.finished:
                files.setdefault(nodeid.partition("::")[0], []).append(nodeid)
        if left := list(files.values())[:0:-1]:
            self._second = InnerPytest(self._config, [nodeid for file in left for nodeid in file])

    def reports(self, item: pytest.Item) -> Iterator[pytest.TestReport]:
        """Return a test's reports when a lab has finished it, or a failure if no lab will."""
        deadline = time.monotonic() + PATIENCE
        labs = [self._first, *([self._second] if self._second else [])]
        while True:
            came = [lab.read() for lab in labs]
            if done := [lab for lab in labs if item.nodeid in lab.finished]:
                yield from done[0].taken(item.nodeid)
                return
            # A second lab that never comes up does no harm: the first runs every test.
            broken = [lab.ended for lab in labs if lab.ended and lab.left and (lab is self._first or lab.title)]
            if broken:
                yield failure(item, broken[0])
                return
            if time.monotonic() > deadline:
                self._first.ended = f"no word from the lab for {PATIENCE:.0f} s"
                self.close()
            elif not any(came):
                time.sleep(POLL)

    def close(self) -> None:
        """End the labs, and with them the pytests in them."""
        for lab in filter(None, [self._first, self._second]):
            lab.close()


class InnerPytest:
    """A pytest in a lab that runs ``nodeids`` in order. Its reports are taken one test at a time.

    It runs in a separate process (labrun.py) and writes to a file. Tests that run here meanwhile, and count
    threads, fork, or look at the clock, notice only its use of the CPUs.
    """

    def __init__(self, config: pytest.Config, nodeids: list[str]) -> None:
        self._config = config
        self._nodeids = nodeids
        self._early: dict[str, list[pytest.TestReport]] = {}
        self.finished: set[str] = set()
        self.ended: str | None = None
        self._position = 0
        self._pending = b""
        self._steps: list[str] = []
        self.title: str | None = None
        option = config.option
        command = [
            "python3",
            "-m",
            "pytest",
            "-p",
            "no:cacheprovider",
            f"--tb={option.tbstyle}",
            "-q",
            "-rN",
            *(["-l"] if option.showlocals else []),
            *(["--runxfail"] if option.runxfail else []),
            *nodeids,
        ]
        environment = {name: os.environ[name] for name in ("CI", nightly.VARIABLE) if name in os.environ}
        asked = {"command": command, "environment": environment, "shown": SHOWN}
        self._answers, self._said = os.memfd_create("reports"), os.memfd_create("said")
        self._process = subprocess.Popen(
            [sys.executable, Path(__file__).with_name("labrun.py"), str(self._answers)],
            cwd=config.rootpath,
            pass_fds=[self._answers],
            stdin=subprocess.PIPE,
            stdout=self._said,
            stderr=self._said,
            start_new_session=True,
        )
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(asked).encode() + b"\n")
        self._process.stdin.flush()

    @property
    def left(self) -> bool:
        """Whether it has unfinished tests."""
        return not self.finished.issuperset(self._nodeids)

    def taken(self, nodeid: str) -> list[pytest.TestReport]:
        """Return a finished test's reports."""
        return self._early.pop(nodeid, [])

    def read(self) -> bool:
        """Read new lines; return False if there are none. ``ended`` says why no more will come, once that is so."""
        came = self._read()
        if not came and self.ended is None and self._process.poll() is not None and not self._read():
            said = os.pread(self._said, 1 << 20, 0)[-3000:].decode(errors="replace")
            self.ended = f"the lab's process ended with status {self._process.returncode}:\n{said}"
        return came

    def _read(self) -> bool:
        """Read new lines; return False if there are none."""
        data = os.pread(self._answers, 1 << 20, self._position)
        self._position += len(data)
        *lines, self._pending = (self._pending + data).split(b"\n")
        for line in lines:
            self._take(json.loads(line))
        return bool(data)

    def _take(self, message: dict[str, object]) -> None:
        if "step" in message:
            self._tell(str(message["step"]))
        elif "title" in message:
            self.title = str(message["title"])
        elif "failed" in message or "ended" in message:
            self.ended = str(message.get("failed", message.get("ended")))
        elif "finished" in message:
            self.finished.add(str(message["finished"]))
        else:
            got = self._restore(message)
            self._early.setdefault(got.nodeid, []).append(got)

    def _tell(self, step: str) -> None:
        terminal: Any = self._config.pluginmanager.getplugin("terminalreporter")
        if step not in self._steps:
            self._steps.append(step)
            if terminal is not None:
                terminal.write_line(f"building the lab: {step}")

    def _restore(self, data: dict[str, object]) -> pytest.TestReport:
        got: pytest.TestReport = self._config.hook.pytest_report_from_serializable(config=self._config, data=data)
        # JSON has no tuples, but pytest needs them.
        path, line, name = got.location
        got.location = path, line, name
        longrepr: Any = got.longrepr
        if isinstance(longrepr, list):
            path, line, why = longrepr
            got.longrepr = path, line, why
        return got

    def close(self) -> None:
        """End the lab, and with it the pytest in it."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


class Reporter:
    """In the lab: writes every report as a line of JSON."""

    def __init__(self, config: pytest.Config, fd: int) -> None:
        self._config = config
        self._file = os.fdopen(fd, "w")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._write(self._config.hook.pytest_report_to_serializable(config=self._config, report=report))

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        self._write({"finished": nodeid})

    def _write(self, data: dict[str, object]) -> None:
        self._file.write(json.dumps(data, default=str) + "\n")
        self._file.flush()
