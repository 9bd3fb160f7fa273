# SPDX-License-Identifier: Apache-2.0
"""``pyvmm bench sweep``: measure all points of a TOML plan on this host, in several labs, or over a fleet.

Results go to the sweep's database, and from there to results files. Everything else goes to stderr. Exit status: 0
every point was measured, 1 some could not be, 128 + N signal N ended the sweep.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shlex
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pyvmm import plugins
from pyvmm.cli.progress import terminal_line
from pyvmm.errors import HostError, UsageError
from pyvmm.interrupt import Interrupted, terminable
from pyvmm.labenv import in_lab
from pyvmm.syntax.paths import OutputPath
from pyvmm.syntax.values import parse_count, parse_size
from pyvmm.terminal import clean, say

if TYPE_CHECKING:
    from pyvmm.bench.sweep.plan import Plan
    from pyvmm.bench.sweep.store import Counts, Store
    from pyvmm.bench.sweep.workers import Workers
    from pyvmm.lab import Lab

SILENCE = 30.0
"""Seconds between two lines of progress where stderr is no terminal."""
FEW = 10
"""Failed points to list one by one."""

ABOUT = """\
PLAN.toml names values of axes, and every combination is measured:  case = "fault", repeat = 3, then [axes] with
protection = ["none", "pkvm"], pages = [256, 1024]; [lab] with host-kernel, mode, icount, mem, cpus where it is to be
measured in labs; several cases as [[sweep]] tables. Results are kept as they arrive, and the same command goes on where
it stopped. A fleet is "dask scheduler" on one machine and "dask worker --nthreads 1 tcp://HOST:8786" on every one.
Labs at once share this machine's CPUs: only where they count instructions (icount) do they not disturb each other."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``bench sweep`` that ``bench`` does not already have (--json, --list, --deadline)."""
    group = parser.add_argument_group("sweep", ABOUT)
    where = group.add_mutually_exclusive_group()
    where.add_argument("--labs", type=parse_count, metavar="N", help="measure in N labs at once (1 with a [lab])")
    where.add_argument("--scheduler", metavar="ADDRESS", help="measure at the workers of a dask scheduler")
    group.add_argument("--database", type=OutputPath, metavar="FILE", help="where results are kept (PLAN.sqlite)")
    group.add_argument("--restart", action="store_true", help="delete the results in the database and start again")
    group.add_argument("--retry-failed", action="store_true", help="measure failed points again")


def main(args: argparse.Namespace) -> int:
    """Do what ``bench sweep PLAN.toml`` says; returns the exit status.

    With --json, each environment gets its own results file.
    """
    from pyvmm.bench.case import REGISTRY, all_cases
    from pyvmm.bench.sweep import plan as plans
    from pyvmm.bench.sweep.store import Store
    from pyvmm.lab.staging import staged

    files = args.words[1:]
    if len(files) != 1:
        raise UsageError(f"bench sweep: {len(files)} files given, it takes 1")
    if in_lab():
        raise UsageError("a sweep boots its labs itself", hint=f"pyvmm bench sweep --labs 1 {files[0]}")
    plan = plans.read(files[0], all_cases(), REGISTRY.plug_in)
    if args.deadline is not None:
        plan = replace(plan, tasks=tuple(replace(task, deadline=args.deadline) for task in plan.tasks))
    if args.list:
        print(clean("\n".join(task.key for task in plan.tasks)))
        return 0
    if plan.left_out:
        _say(f"{plan.left_out} combinations are invalid and left out")
    if args.json is not None and not os.access(Path(args.json).parent, os.W_OK | os.X_OK):
        raise UsageError(f"{args.json!r} cannot be written: its directory is missing or read-only")
    database = args.database or str(Path(files[0]).with_suffix(".sqlite"))
    with Store(database, plan, restart=args.restart) as store, contextlib.ExitStack() as signals:
        signals.enter_context(terminable(once=True))
        if args.retry_failed:
            store.retry_failed()
        number = None
        if waiting := store.counts().waiting:
            if waiting < len(plan.tasks):
                _say(f"{database}: going on with {waiting} of {len(plan.tasks)} points")
            brought = plugins.asked() if _wants_labs(args, plan) else []
            with staged(brought) as packages, _workers(args, plan, packages) as workers:
                number = _run(store, workers, signals)
        _tell(store, args)
        if args.json is not None and store.counts().done:
            from pyvmm.bench.sweep.export import export

            files = export(store, plan, args.json)
            if len(files) > 1:
                _say(f"measured in {len(files)} environments, one file each: {' '.join(files)}")
        failed = store.counts().failed
    if number is not None:
        raise Interrupted(number)
    return 1 if failed else 0


def _run(store: Store, workers: Workers, signals: contextlib.ExitStack) -> int | None:
    from pyvmm.bench.sweep.run import Sweep

    with _progress() as show:
        sweep = Sweep(store, workers, lambda counts, left: show(_progress_line(counts, left, workers.title)))
        signals.enter_context(terminable(sweep.interrupt))  # to the end: on the way out, signals wait
        return sweep.run()


def _wants_labs(args: argparse.Namespace, plan: Plan) -> bool:
    return args.labs is not None or plan.lab is not None


def _workers(args: argparse.Namespace, plan: Plan, packages: Path | None) -> Workers:
    from pyvmm.bench.sweep import workers

    if args.scheduler is not None:
        if plan.lab is not None:
            raise UsageError(
                f"{plan.file} has a [lab], but a fleet measures on its own machines", hint="leave one of them out"
            )
        return workers.Fleet(args.scheduler)
    if _wants_labs(args, plan):
        return workers.Labs(args.labs or 1, _lab_maker(plan.file, plan.lab or {}, packages))
    if os.uname().machine != "aarch64":
        raise HostError(
            f"this host is {os.uname().machine}; costs are measured on an arm64 one",
            hint="--labs 1 measures in the lab, an emulated arm64 host",
        )
    return workers.Here()


def _lab_maker(file: str, table: dict[str, Any], packages: Path | None) -> Callable[[], Lab]:
    """Return a maker of labs for a plan's [lab] table. The labs see only the project's tree and ``packages``."""
    from pyvmm.lab import Lab, LabOptions, build_image, kernels
    from pyvmm.lab.image import usable_image
    from pyvmm.lab.needs import require

    icount = table.get("icount", False)
    try:
        options = LabOptions(
            mode=table.get("mode", "protected"),
            cpus=table.get("cpus", 1 if icount else 2),
            memory=parse_size(str(table.get("mem", "2G"))) >> 20,
            icount=icount,
        )
    except (UsageError, argparse.ArgumentTypeError) as error:
        raise UsageError(f"{file}: [lab]: {error}") from None
    kernel = table.get("host-kernel", kernels.DEFAULT)
    require(building=usable_image(kernel=kernel) is None)
    with _progress() as show:
        image = build_image(kernel, progress=lambda what, _share: show(f"lab: {what}"))
    return lambda: Lab(options, image=image, cwd=Path(os.sep), packages=packages)


def _tell(store: Store, args: argparse.Namespace) -> None:
    """Print how the sweep ended, and the command that continues it."""
    counts = store.counts()
    again = shlex.join(["pyvmm", *(word for word in args.verb_argv if word not in ("--restart", "--retry-failed"))])
    failures = store.failures()
    for task, reason in failures[:FEW]:
        _say(f"failed: {task.key}: {reason.splitlines()[0]}")
    if len(failures) > FEW:
        _say(f"failed: {len(failures) - FEW} more, in {store.path}")
    _say(f"{counts.done} of {counts.total} points measured, in {store.path}")
    if counts.waiting:
        _say(f"{counts.waiting} points are left; to continue: {again}")
    elif counts.failed:
        _say(f"to try those that failed again: {again} --retry-failed")


def _progress_line(counts: Counts, left: float | None, who: str) -> str:
    failed = f", {counts.failed} failed" if counts.failed else ""
    time_left = "" if left is None or not counts.waiting else f", {_duration(left)} left"
    return f"{counts.done + counts.failed} of {counts.total} points{failed}{time_left}; {who}"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s" if minutes else f"{rest} s"


@contextlib.contextmanager
def _progress() -> Iterator[Callable[[str], None]]:
    """Keep a line of progress on stderr: permanent on a terminal, else now and then."""
    with terminal_line() as show:
        if show:
            yield show
            return
    last = ("", float("-inf"))

    def say(text: str) -> None:
        nonlocal last
        if text != last[0] and time.monotonic() - last[1] > SILENCE:
            _say(text)
            last = (text, time.monotonic())

    yield say


def _say(text: str) -> None:
    say(f"pyvmm: {text}")
