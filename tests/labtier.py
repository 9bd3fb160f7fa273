"""The test tiers: what cannot run on this machine runs in the lab, or is counted in one line that says why not.

``kvm`` tests need a /dev/kvm of any architecture. ``pkvm`` tests need a pKVM host: this one if it is one, else a lab in
which a second pytest runs all selected ones in one boot and streams its reports back; they are replayed here as if the
tests had run here. ``lab`` tests need what the lab needs. In CI (``CI`` set) a tier without its means fails; elsewhere
it is skipped.
"""

from __future__ import annotations

import json
import os
import queue
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from pyvmm.errors import PyvmmError

IN_LAB = os.environ.get("PYVMM_IN_LAB") == "1"
SHOWN = ("debian:", "own:", "passt", "e2fsprogs", "gdb")
"""What tests find in the lab beside what it has: guests' kernels, programs on PATH. The project's kernel is built for
that in CI only; elsewhere tests that need what there is none of are skipped (see tests/pkvm/shown.py)."""
PATIENCE = float(os.environ.get("PYVMM_LAB_TEST_TIMEOUT", "1800"))
"""Seconds that a test may take in the lab, its share of other tests' time on a busy machine included."""

Why = Callable[[], str | None]
"""Says why a tier cannot run, None where it can."""


def no_kvm() -> str | None:
    """Say why /dev/kvm cannot be used."""
    from pyvmm.kvm.system import System

    try:
        System.open().close()
    except PyvmmError as error:
        return error.message
    return None


def host_is_pkvm() -> bool:
    """Ask whether protected VMs run right here."""
    from pyvmm.cli.demo import runs_protected_guests

    return runs_protected_guests()


def no_lab() -> str | None:
    """Say why no lab can be booted here."""
    from pyvmm.lab.image import usable_image
    from pyvmm.lab.needs import require

    try:
        require(building=usable_image() is None)
    except PyvmmError as error:
        return str(error)
    return None


class Tiers:
    """Runs, forwards or skips each test by its marks; says at the end what happened to a tier as a whole."""

    def __init__(self, config: pytest.Config) -> None:
        self._config = config
        self._missing: dict[str, str] = {}
        self._skipped: dict[str, int] = {}
        self._forwarded: dict[str, pytest.Item] = {}
        self._lab: InnerPytest | None = None

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        """Decide for all tests that were selected."""
        checks: dict[str, Why] = {"kvm": no_kvm, "lab": no_lab}
        pkvm = [item for item in session.items if item.get_closest_marker("pkvm")]
        if pkvm and not IN_LAB and not host_is_pkvm():
            checks["pkvm"] = no_lab
            self._forwarded = {item.nodeid: item for item in pkvm}
        for tier, why_not in checks.items():
            if any(item.get_closest_marker(tier) for item in session.items) and (why := why_not()):
                self._missing[tier] = why

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item, nextitem: pytest.Item | None) -> bool | None:
        """Stand in for the test where it cannot run here."""
        if item.nodeid in self._forwarded and self._lab is None and "pkvm" not in self._missing:
            self._start_lab()
        for tier, why in self._missing.items():
            if item.get_closest_marker(tier):
                self._skipped[tier] = self._skipped.get(tier, 0) + 1
                self._replay(item, nextitem, iter([self._no_means(item, tier, why)]))
                return True
        if self._lab is None or item.nodeid not in self._forwarded:
            return None
        self._replay(item, nextitem, self._lab.reports(item))
        return True

    def _start_lab(self) -> None:
        try:
            self._lab = InnerPytest(self._config, list(self._forwarded))
        except PyvmmError as error:
            self._missing["pkvm"] = str(error)

    def _replay(self, item: pytest.Item, nextitem: pytest.Item | None, reports: Iterator[pytest.TestReport]) -> None:
        item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
        for report in reports:
            item.ihook.pytest_runtest_logreport(report=report)
        item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
        # What earlier tests set up and the next does not need ends here, as the runner would have it.
        item.session._setupstate.teardown_exact(nextitem)

    def _no_means(self, item: pytest.Item, tier: str, why: str) -> pytest.TestReport:
        if os.environ.get("CI"):
            return failure(item, f"the {tier} tier cannot run, and in CI it must: {why}")
        # One place for all, so that pytest folds them into one line.
        return report(item, "skipped", (__file__, 1, f"{tier} tier: {why}"))

    def pytest_sessionfinish(self) -> None:
        if self._lab is not None:
            self._lab.close()

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        for tier, count in self._skipped.items():
            terminalreporter.write_line(f"{tier} tier: {count} tests not run: {self._missing[tier].splitlines()[0]}")
        if self._lab is not None:
            terminalreporter.write_line(f"pkvm tier: {len(self._forwarded)} tests ran in the lab: {self._lab.title}")


def report(item: pytest.Item, outcome: str, longrepr: object) -> pytest.TestReport:
    """Make a report of a test that was not run at all."""
    when = "call" if outcome == "failed" else "setup"
    keywords = dict.fromkeys(item.keywords, 1)
    return pytest.TestReport(item.nodeid, item.location, keywords, outcome, longrepr, when, duration=0.0)


def failure(item: pytest.Item, why: str) -> pytest.TestReport:
    return report(item, "failed", why)


class InnerPytest:
    """A pytest in a lab, running ``nodeids`` in order while its reports are taken one test at a time."""

    def __init__(self, config: pytest.Config, nodeids: list[str]) -> None:
        from pyvmm.lab import Lab, build_image
        from pyvmm.lab.ownkernel import build_kernel
        from pyvmm.lab.peers import prepare

        self._config = config
        self._queue: queue.Queue[dict[str, object] | None] = queue.Queue()
        self._early: dict[str, list[pytest.TestReport]] = {}
        self._finished: set[str] = set()
        self._ended: str | None = None
        self._said = bytearray()
        self._pending = b""
        progress = self._progress()
        image = build_image(progress=progress)
        if os.environ.get("CI"):
            build_kernel(progress=progress)
        self._shown = prepare(SHOWN, progress=progress)
        self.title = f"{image.manifest.release} under QEMU"
        # Booted here, not in the thread: QEMU is told to end with the thread that started it.
        self._lab = Lab(image=image, cwd=config.rootpath, arguments=self._shown.paths)
        self._lab.__enter__()
        self._worker = threading.Thread(target=self._run, args=(nodeids,), name="pyvmm-lab-tests")
        self._worker.start()

    def _progress(self) -> Callable[[str, float], None]:
        terminal = self._config.pluginmanager.getplugin("terminalreporter")
        steps: list[str] = []

        def progress(what: str, _share: float) -> None:
            if what not in steps:
                steps.append(what)
                if terminal is not None:
                    terminal.write_line(f"building the lab: {what}")

        return progress

    def _run(self, nodeids: list[str]) -> None:
        option = self._config.option
        command = [
            "python3", "-m", "pytest", "-p", "no:cacheprovider", f"--tb={option.tbstyle}", "-q", "-rN",
            *(["-l"] if option.showlocals else []), *(["--runxfail"] if option.runxfail else []), *nodeids,
        ]  # fmt: skip
        ci = {"CI": os.environ["CI"]} if os.environ.get("CI") else {}
        try:
            status = self._lab.run(
                # Reports are what its stdout carries; everything else it says goes to stderr.
                ["/bin/sh", "-c", 'exec "$@" 3>&1 1>&2', "sh", *command],
                stdout=self._take,
                stderr=self._said.extend,
                env={"PYVMM_REPORTS_FD": "3", "COLUMNS": "120", **self._shown.environment, **ci},
            )
            said = bytes(self._said[-3000:]).decode(errors="replace")
            self._ended = f"the lab's pytest ended with status {status} before this test; it said:\n{said}"
        except Exception as error:
            self._ended = str(error)
        self._queue.put(None)

    def _take(self, data: bytes) -> None:
        *lines, self._pending = (self._pending + data).split(b"\n")
        for line in lines:
            self._queue.put(json.loads(line))

    def reports(self, item: pytest.Item) -> Iterator[pytest.TestReport]:
        """Give a test's reports as they come in; a failure where they never will."""
        yield from self._early.pop(item.nodeid, [])
        deadline = time.monotonic() + PATIENCE
        while item.nodeid not in self._finished:
            if self._ended is not None and self._queue.empty():
                yield failure(item, self._ended)
                return
            try:
                message = self._queue.get(timeout=max(deadline - time.monotonic(), 0.01))
            except queue.Empty:
                self._ended = f"no word from the lab for {PATIENCE:.0f} s; its console:\n{self._lab.console()[-2000:]}"
                self.close()
                continue
            if message is None:
                continue
            if "finished" in message:
                self._finished.add(str(message["finished"]))
                continue
            got = self._restore(message)
            if got.nodeid == item.nodeid:
                yield got
            else:  # this session runs in another order
                self._early.setdefault(got.nodeid, []).append(got)

    def _restore(self, data: dict[str, object]) -> pytest.TestReport:
        got = self._config.hook.pytest_report_from_serializable(config=self._config, data=data)
        # JSON knows no tuples, pytest insists on them.
        got.location = tuple(got.location)
        if isinstance(got.longrepr, list):
            got.longrepr = tuple(got.longrepr)
        return got

    def close(self) -> None:
        """End the lab, and with it the pytest in it."""
        self._lab.close()
        self._worker.join(timeout=30)


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
