# SPDX-License-Identifier: Apache-2.0
"""``pyvmm bench``: measure and report the cost of a fault, an exit, a share and a conversion.

Measuring and reporting are separate. The host of the guest writes result lines. A host with numpy makes the table and
the pages from them. With ``pyvmm --lab bench`` the lab only measures, and the workstation reports.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, TextIO

from pyvmm.cli.common import Help, add_common, require_arm64
from pyvmm.errors import HostError, PyvmmError, UsageError
from pyvmm.interrupt import Interrupted, terminable
from pyvmm.syntax.paths import OutputPath, open_output
from pyvmm.syntax.values import parse_count, parse_seconds
from pyvmm.terminal import say

if TYPE_CHECKING:
    from pyvmm.bench.collect import Plan
    from pyvmm.bench.model import Run, Series, Value

COMPARE, REPORT, SWEEP = "compare", "report", "sweep"
CANNOT_TELL = 3
"""Exit status of a comparison that shows no difference, and does not exclude one either."""
STILL = 15.0
"""Seconds between two lines of progress where stderr is no terminal."""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Define the verb's options."""
    from pyvmm.cli import bench_sweep

    parser = subparsers.add_parser(
        "bench",
        help="what a fault, an exit, a share, a conversion costs",
        allow_abbrev=False,
        formatter_class=Help,
        usage="pyvmm bench [options] [CASE ...]\n"
        "       pyvmm bench compare [--margin PERCENT] [--across AXIS=ONE,OTHER] A.jsonl [B.jsonl]\n"
        "       pyvmm bench report [--html FILE] [--figures DIR] RESULTS\n"
        "       pyvmm bench sweep [options] PLAN.toml",
        description="Measure what guest memory costs: each case at the points of its axes, a process each.\n"
        "Without --axis, every value of every axis is measured in every protection, the other axes at their first "
        "value.",
        epilog="examples:\n"
        "  pyvmm --lab bench --quick --html bench.html           the quick set, in the lab\n"
        "  pyvmm --lab --lab-icount bench fault exit             in instructions, which repeat\n"
        "  pyvmm --lab bench fault --axis protection=none,pkvm --axis cpus=1,4 --json a.jsonl\n"
        "  pyvmm --lab bench fault --axis protection=pkvm --versus state=populated\n"
        "exit status of compare: 0 the same, 1 something differs, 2 nothing can be compared, 3 cannot tell of some",
    )
    parser.add_argument("words", metavar="CASE", nargs="*", help="cases to measure (all); --list names them")
    which = parser.add_argument_group("what to measure")
    which.add_argument("--quick", action="store_true", help="a few points of each case")
    which.add_argument(
        "--axis",
        action="append",
        default=[],
        metavar="AXIS=VALUE[,VALUE...]",
        help="these values, and every combination with other --axis",
    )
    which.add_argument("--versus", metavar="AXIS=VALUE", help="measure each point in turns with this one, and compare")
    which.add_argument("--turns", type=parse_count, default=10, metavar="N", help="of --versus (10)")
    which.add_argument(
        "--rounds",
        type=parse_count,
        metavar="N",
        help="of each point, besides the first, which is warm-up (6)",
    )
    which.add_argument("--peers", action="store_true", help="also measure others: a bare C loop, QEMU, selftests")
    which.add_argument("--list", action="store_true", help="name cases and axes instead of measuring")
    which.add_argument("--deadline", type=parse_seconds, metavar="SECONDS", help="for each point (the case's own)")
    output = parser.add_argument_group("output")
    output.add_argument(
        "--json", type=OutputPath, metavar="FILE", help="the raw results, JSON lines; of compare its verdicts"
    )
    output.add_argument(
        "--html", type=OutputPath, metavar="FILE", help="a page with figures and the raw results; of compare its table"
    )
    output.add_argument("--figures", type=OutputPath, metavar="DIR", help="the figures as SVG and PNG")
    judged = parser.add_argument_group("compare")
    judged.add_argument("--across", metavar="AXIS=ONE,OTHER", help="compare two values of an axis in one file")
    judged.add_argument(
        "--margin", type=_percent, metavar="PERCENT", help="medians that differ by no more are the same (1)"
    )
    parser.add_argument("--collect", action="store_true", help=argparse.SUPPRESS)
    bench_sweep.add_options(parser)
    add_common(parser)


def main(args: argparse.Namespace) -> int:
    """Run the verb on this host and return its exit status."""
    if (sub := _SUBVERBS.get(_first(args))) is not None:
        return sub(args)
    plan = _plan(args)
    if args.list:
        _list(args.words)
        return 0
    require_arm64(args, "the benchmark's guests are arm64", kvm=True)
    if args.collect:
        with _interruptible(sys.stdout.write) as take:
            return _collect(plan, args, take)
    return _run(args, lambda take: _collect(plan, args, take))


def main_in_lab(args: argparse.Namespace, flags: list[str]) -> int:
    """Measure in a lab and report here. ``flags`` are the words before the verb there."""
    if _first(args) in _SUBVERBS:
        raise UsageError(f"bench {_first(args)} does not run in the lab", hint="pyvmm " + shlex.join(args.verb_argv))
    if args.list:
        return main(args)
    plan = _plan(args)  # reports a wrong command line before booting anything
    args.lab_with = list(dict.fromkeys(kernel for step in plan.steps() for kernel in step.case.kernels(step.point)))

    def collect(take: Callable[[str], None]) -> int:
        from pyvmm.cli.lab import prepare_peers, run_verb

        peers = prepare_peers() if args.peers else None
        return run_verb(
            [*flags, *args.verb_argv, "--collect"],
            args,
            outputs=(),
            stdout=Lines(take),
            visible=peers.paths if peers else (),
            env=peers.environment if peers else None,
        )

    return _run(args, collect)


class Lines:
    """Cuts a stream of bytes into lines."""

    def __init__(self, take: Callable[[str], None]) -> None:
        self._take, self._rest = take, b""

    def __call__(self, data: bytes) -> None:
        """Take some bytes."""
        *whole, self._rest = (self._rest + data).split(b"\n")
        for each in whole:
            self._take(each.decode() + "\n")


def _first(args: argparse.Namespace) -> str:
    return args.words[0] if args.words else ""


# -- measuring


def _plan(args: argparse.Namespace) -> Plan:
    from pyvmm.bench.collect import Plan
    from pyvmm.bench.model import ROUNDS

    axes: dict[str, list[Value]] = {}
    for text in args.axis:
        axis, value = _pair("--axis", text)
        axes.setdefault(axis, []).extend(value.split(","))
    versus = _pair("--versus", args.versus) if args.versus else None
    rounds = ROUNDS if args.rounds is None else 1 + args.rounds
    plan = Plan(tuple(args.words), axes, args.quick, versus, args.turns, rounds)
    plan.steps()
    return plan


def _pair(option: str, text: str) -> tuple[str, str]:
    axis, _, value = text.partition("=")
    if not axis or not value:
        raise UsageError(f"{option} {text}: expected AXIS=VALUE, for example {option} protection=pkvm")
    return axis, value


def _collect(plan: Plan, args: argparse.Namespace, say: Callable[[str], object]) -> int:
    from pyvmm._native_source import require_fresh_native
    from pyvmm.bench.collect import measure

    require_fresh_native()

    def tell(text: str) -> None:
        say(text)
        if args.collect:
            sys.stdout.flush()

    measure(plan, tell, deadline=args.deadline, peers=_peers if args.peers else None)
    return 0


def _peers() -> list[Series]:
    from pyvmm.bench.peers import PEERS

    return [series for peer in PEERS.values() for series in peer()]


def _run(args: argparse.Namespace, collect: Callable[[Callable[[str], None]], int]) -> int:
    """Measure with ``collect`` and report. When measuring is cut short, report the results so far."""
    from pyvmm.bench.collect import Collector

    no_report = _why_no_report(args)
    status, stopped = 0, None
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(_writable(args.json)) if args.json else None
        if args.html:
            stack.enter_context(_writable(args.html)).close()
        collector = Collector(file, args.json or "", stack.enter_context(_progress()))
        try:
            with _interruptible(collector.take) as take:
                status = collect(take)
        except (KeyboardInterrupt, PyvmmError) as why:
            stopped = why
    run = collector.run()
    if no_report:
        say(f"pyvmm: no table: {no_report}")
    elif run is not None and run.series:
        try:
            _show(run, args)
        except PyvmmError:
            if stopped is None:  # which says more
                raise
    if stopped is not None:
        raise stopped
    if collector.failed is not None:
        raise collector.failed
    crashed = run is not None and any(series.notes.get("crashed") for series in run.series)
    return status or (1 if crashed else 0)


@contextlib.contextmanager
def _interruptible(take: Callable[[str], object]) -> Iterator[Callable[[str], None]]:
    """Let a signal end the measuring, which then restores the host's settings. Yields the function that takes lines."""
    with terminable(once=True) as received:

        def take_until(text: str) -> None:
            take(text)
            if received:  # raised where Python ignores exceptions, as in a finalizer
                raise Interrupted(received[0])

        yield take_until


def _why_no_report(args: argparse.Namespace) -> str:
    """Return why there will be no report if raw results suffice; raise HostError if they do not."""
    from pyvmm.bench.statistics import require

    try:
        require()
    except HostError as error:
        if not args.json or args.html or args.figures:
            raise
        return error.message
    return ""


@contextlib.contextmanager
def _progress() -> Iterator[Callable[[int, int, str], None]]:
    """Show points done and the time left on stderr: a bar on a terminal, else a line now and then."""
    if not sys.stderr.isatty():
        begun = last_line = time.monotonic()

        def tell(done: int, points: int, _last: str) -> None:
            nonlocal last_line
            now = time.monotonic()
            if now - last_line >= STILL and done < points:
                last_line = now
                left = (now - begun) / done * (points - done)
                print(f"pyvmm: bench: {done} of {points} points, {left:.0f} s left", file=sys.stderr, flush=True)

        yield tell
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description:<20}"),
        BarColumn(30),
        MofNCompleteColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    # No refresh thread: on this host each point is measured in a fork of this process.
    with Progress(*columns, console=Console(stderr=True), transient=True, auto_refresh=False) as display:
        task = display.add_task("starting", total=None)
        yield lambda done, points, last: display.update(
            task, completed=done, total=points or None, description=last, refresh=True
        )


@contextlib.contextmanager
def _writable(path: str) -> Iterator[TextIO]:
    """Open a file before hours are spent on what goes into it."""
    file = open(open_output(path), "w", encoding="utf-8")  # noqa: SIM115
    try:
        yield file
    finally:
        # The writer has flushed every line, and has reported failures.
        with contextlib.suppress(OSError):
            file.close()


# -- reporting


def _show(run: Run, args: argparse.Namespace) -> None:
    from pyvmm.bench.collect import sides
    from pyvmm.bench.report import table
    from pyvmm.reports.look import Look

    look = Look.of(sys.stdout)
    if run.asked.get("versus"):
        _compare_sides(*sides(run), args, paired=True)
    else:
        print(table.text(run, look), flush=True)
    _save(run, args)


def _save(run: Run, args: argparse.Namespace) -> None:
    from pyvmm.bench.report import figures, html

    if args.html:
        _write(args.html, html.render(run))
    if args.figures:
        figures.save(run, args.figures)


def _write(path: str, text: str) -> None:
    try:
        with open(path, "w", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise PyvmmError(f"{path!r} cannot be written: {error.strerror}") from None


def _report(args: argparse.Namespace) -> int:
    from pyvmm.bench.statistics import require

    require()
    [path] = _files(args, "report", 1, 1)
    _show(_read(path), args)
    return 0


def _compare(args: argparse.Namespace) -> int:
    from pyvmm.bench.collect import across, sides
    from pyvmm.bench.model import BenchError
    from pyvmm.bench.statistics import require

    require("numpy", "scipy")
    if args.figures:
        raise UsageError("bench compare draws no figures", hint="--html FILE and --json FILE write the comparison")
    paths = _files(args, "compare", 1, 1 if args.across else 2)
    axis, values = "", list[str]()
    if args.across:
        axis, text = _pair("--across", args.across)
        values = text.split(",")
        if len(values) != 2 or not all(values):
            raise UsageError(f"--across {args.across}: expected two values, for example --across state=cold,populated")
    runs = [_read(path) for path in paths]
    try:
        if values:
            return _compare_sides(*across(runs[0], axis, values), args)
        if len(runs) == 1:
            return _compare_sides(*sides(runs[0]), args, paired=True)
        return _compare_sides(runs[0], runs[1], args)
    except BenchError as error:
        raise UsageError(error.message, hint=error.hint) from None


def _compare_sides(one: Run, two: Run, args: argparse.Namespace, *, paired: bool = False) -> int:
    from pyvmm.bench import compare
    from pyvmm.reports.look import Look

    margin = compare.MARGIN if args.margin is None else args.margin
    comparison = compare.compare(one, two, paired=paired, margin=margin)
    print(compare.text(comparison, Look.of(sys.stdout)), flush=True)
    if args.words[:1] == [COMPARE]:  # a run in turns is saved as a run
        if args.html:
            _write(args.html, compare.html(comparison))
        if args.json:
            _write(args.json, json.dumps(compare.to_json(comparison), indent=1) + "\n")
    return 1 if comparison.differs else CANNOT_TELL if comparison.undecided else 0


def _percent(text: str) -> float:
    """Return a share of 1."""
    try:
        value = float(text.removesuffix("%"))
    except ValueError:
        value = -1.0
    if not 0 < value < 100:
        raise argparse.ArgumentTypeError(f"{text!r} is not a percentage above 0 and below 100")
    return value / 100


def _read(path: str) -> Run:
    from pyvmm.bench import model
    from pyvmm.bench.report import embedded

    try:
        return embedded.read_html(path) if path.endswith((".html", ".htm")) else model.read(path)
    except model.BenchError as error:
        raise UsageError(error.message, hint=error.hint) from None


def _files(args: argparse.Namespace, verb: str, least: int, most: int) -> list[str]:
    files: list[str] = args.words[1:]
    if not least <= len(files) <= most:
        wanted = str(least) if least == most else f"{least} or {most}"
        raise UsageError(f"bench {verb}: {len(files)} files given, it takes {wanted}")
    return files


def _sweep(args: argparse.Namespace) -> int:
    from pyvmm.cli import bench_sweep

    return bench_sweep.main(args)


_SUBVERBS: Mapping[str, Callable[[argparse.Namespace], int]] = {COMPARE: _compare, REPORT: _report, SWEEP: _sweep}


def _list(words: list[str]) -> None:
    """List cases, their subject and their axes. Without ``words``, include those of installed packages."""
    import textwrap

    from pyvmm.bench.case import brought_cases, select

    brought, faults = ([], []) if words else brought_cases()
    for case in [*select(words), *brought]:
        print(f"{case.name}: {len(case.points())} points, {len(case.points(quick=True))} of them quick")
        print(textwrap.fill(case.says, 110, initial_indent="  ", subsequent_indent="  "))
        for axis, values in case.axes.items():
            print(f"    {axis:<12} {', '.join(map(str, values))}")
    for fault in faults:
        say(f"pyvmm: {fault.message}")
