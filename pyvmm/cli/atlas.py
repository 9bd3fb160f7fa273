# SPDX-License-Identifier: Apache-2.0
"""``pyvmm atlas``: test claims about this kernel and guest memory. ``pyvmm atlas diff`` compares two runs.

Results go to stdout as they come, a table of all verdicts at the end, progress to stderr. Exit status 0 when every
experiment came to a verdict, whatever it is; 1 when one crashed. ``diff``: 0 no difference, 1 differences.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from pyvmm.cli.common import Help, add_common, require_arm64
from pyvmm.cli.progress import terminal_line
from pyvmm.errors import PyvmmError, UsageError
from pyvmm.interrupt import Interrupted, terminable
from pyvmm.memory.choices import BACKINGS
from pyvmm.protection import PROTECTIONS
from pyvmm.syntax.paths import OutputPath, open_output
from pyvmm.syntax.values import parse_seconds
from pyvmm.terminal import say

if TYPE_CHECKING:
    from pyvmm.atlas.claim import Claim
    from pyvmm.atlas.model import Atlas, Result
    from pyvmm.atlas.task import Task
    from pyvmm.plugins import PluginError
    from pyvmm.reports.look import Look

DIFF = "diff"
FEW = 4
"""Up to this many results are printed in full. With more, only the table is."""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Define the verb's options."""
    parser = subparsers.add_parser(
        "atlas",
        help="what this kernel does with guest memory, claim by claim",
        allow_abbrev=False,
        formatter_class=Help,
        usage="pyvmm atlas [options] [CLAIM ...]\n       pyvmm atlas diff [--json FILE] A.json B.json",
        description="Test claims about guest memory on this host's kernel, each with a new guest, in every\n"
        "applicable protection and backing. Report verdicts with their evidence.",
        epilog="examples:\n"
        "  pyvmm --lab atlas                                    everything, in the lab\n"
        "  pyvmm --lab atlas ownership                          one group\n"
        "  pyvmm --lab atlas a-second-share-is-refused          one claim, with its evidence\n"
        "  pyvmm --lab --host-kernel stable atlas --json old.json\n"
        "  pyvmm atlas diff old.json new.json\n"
        "exit status: 0 every experiment came to a verdict, 1 one crashed; of diff: 0 the same, 1 not",
    )
    parser.add_argument("claims", metavar="CLAIM", nargs="*", help="an id, a group, or an id without its group")
    which = parser.add_argument_group("what to try")
    which.add_argument("--protection", action="append", choices=PROTECTIONS, default=[], help="only this; repeatable")
    which.add_argument("--backing", action="append", choices=BACKINGS, default=[], help="only this; repeatable")
    which.add_argument("--list", action="store_true", help="name the claims instead of trying them")
    which.add_argument("--deadline", type=parse_seconds, metavar="SECONDS", help="for each experiment (60)")
    output = parser.add_argument_group("output")
    output.add_argument("--json", type=OutputPath, metavar="FILE", help="results as JSON, also the input of diff")
    output.add_argument("--html", type=OutputPath, metavar="FILE", help="a page to link to, with evidence and pictures")
    output.add_argument("--junit", type=OutputPath, metavar="FILE", help="results as JUnit's XML")
    output.add_argument("--map", type=OutputPath, metavar="FILE", help="page maps of the steps, as SVG")
    output.add_argument("-d", "--details", action="store_true", help="print the evidence of every result")
    add_common(parser)


def main(args: argparse.Namespace) -> int:
    """Do what the command line says; returns the exit status."""
    from pyvmm._native_source import require_fresh_native

    if args.claims[:1] == [DIFF]:
        return _diff(args)
    require_fresh_native()
    claims, faults = _claims(args)
    todo = _tasks(claims, args)
    if args.list:
        _list(todo)
        for fault in faults:
            say(f"pyvmm: {fault.message}")
        return 0
    require_arm64(args, "the atlas asks an arm64 host's kernel", kvm=True)
    files = _writable(args, claims)
    atlas, interrupt = _run(todo, claims, args)
    for write, path in files:
        _save(path, write(atlas))
    if interrupt is not None:
        raise interrupt
    return 1 if any(result.verdict.value == "crashed" for result in atlas.results) else 0


def main_in_lab(args: argparse.Namespace, flags: list[str]) -> int:
    """Try the claims in a lab. ``flags`` are the words before the verb there."""
    from pyvmm.cli.lab import run_verb

    if args.list:
        return main(args)
    if args.claims and args.claims[:1] != [DIFF]:
        # Report unknown claims before booting anything. The lab gets the packages that bring the known ones.
        _tasks(_claims(args)[0], args)
    return run_verb([*flags, *args.verb_argv], args)


def _claims(args: argparse.Namespace) -> tuple[list[Claim], list[PluginError]]:
    """Return the selected claims. For a list of all, add those of installed packages, and these packages' faults."""
    from pyvmm.atlas.claim import all_claims, brought_claims, select

    claims = select(args.claims, all_claims(args.claims))
    if args.claims or not args.list:
        return claims, []
    brought, faults = brought_claims()
    return [*claims, *brought], faults


def _tasks(claims: list[Claim], args: argparse.Namespace) -> list[Task]:
    from pyvmm.atlas.task import tasks

    todo = tasks(claims, args.protection, args.backing)
    if not todo:
        wanted = " and ".join(filter(None, (", ".join(args.protection), ", ".join(args.backing))))
        raise UsageError(f"none of these claims is tried with {wanted}", hint="pyvmm atlas --list says where each is")
    return todo


def _run(todo: list[Task], claims: list[Claim], args: argparse.Namespace) -> tuple[Atlas, KeyboardInterrupt | None]:
    """Try everything and show results as they come. After an interrupt, return the results so far and the interrupt."""
    from pyvmm.atlas.expected import expected
    from pyvmm.atlas.model import Atlas
    from pyvmm.atlas.report.text import details, line, table
    from pyvmm.experiment import environment
    from pyvmm.experiment.runner import run
    from pyvmm.reports.look import Look

    look = Look.of(sys.stdout)
    host = environment.host()
    wanted = expected(host, claims)
    results: list[Result] = []
    begun, date = time.monotonic(), datetime.now(UTC).isoformat(timespec="seconds")
    whole = args.details or len(todo) <= FEW
    interrupt = None
    with terminal_line() as show, terminable() as received:
        progress = show or (lambda _text: None)
        try:
            for result in run(todo, deadline=args.deadline):
                results.append(result)
                if received:  # raised where Python ignores exceptions, as in a finalizer
                    raise Interrupted(received[0])
                progress("")
                print((details if whole else line)(result, look, wanted), flush=True)
                if whole and result.pictures:
                    print(_steps(result, look), flush=True)
                progress(f"{len(results)} of {len(todo)}, {time.monotonic() - begun:.0f} s")
        except KeyboardInterrupt as stop:
            interrupt = stop
    times = {"date": date, "seconds": round(time.monotonic() - begun, 1)}
    atlas = Atlas(host, tuple(results), times)
    if len(results) > FEW:
        print(f"\n{table(atlas, look, wanted, _headings(claims))}")
    return atlas, interrupt


def _headings(claims: list[Claim]) -> dict[str, str]:
    """Return what each group is about."""
    return {claim.group: claim.heading for claim in claims}


def _steps(result: Result, look: Look) -> str:
    """Draw the page maps of an experiment's steps."""
    from pyvmm.observe.mapterm import render
    from pyvmm.observe.pagemap import PageMap

    lines: list[str] = []
    for picture in result.pictures:
        page_map = PageMap.from_runs(picture.runs)
        lines += [f"  {picture.title}", *render(page_map, width=look.width, height=12, colour=look.colours)]
    return look.finish("\n".join(lines))


def _list(todo: list[Task]) -> None:
    from pyvmm.reports.look import Look

    look = Look.of(sys.stdout)
    places: dict[str, list[str]] = {}
    claims = {}
    for task in todo:
        claims[task.claim.id] = task.claim
        places.setdefault(task.claim.id, []).append(str(task.place))
    group = None
    for id, claim in claims.items():
        if claim.group != group:
            group = claim.group
            print(f"{group}: {claim.heading}")
        print(f"  {id}\n" + "\n".join(look.wrap(claim.says, 6)))
        print("\n".join(look.wrap(f"tried in {', '.join(places[id])}", 6)))
    print(f"{len(claims)} claims, {len(todo)} experiments")


# -- files


def _writable(args: argparse.Namespace, claims: list[Claim]) -> list[tuple[Callable[[Atlas], str], str]]:
    """Open each requested output. Returns (format function, file) pairs. Raises UsageError for an unwritable path."""
    kinds: list[tuple[Callable[[Atlas], str], str | None]] = [
        (lambda atlas: json.dumps(atlas.to_json(), indent=1) + "\n", args.json),
        (lambda atlas: _html(atlas, claims), args.html),
        (lambda atlas: _junit(atlas, claims), args.junit),
        (_map, args.map),
    ]
    files = [(write, path) for write, path in kinds if path is not None]
    for _, path in files:
        os.close(open_output(path, keep=True))
    return files


def _save(path: str, text: str) -> None:
    try:
        Path(path).write_text(text, encoding="utf-8")
    except OSError as error:
        raise PyvmmError(f"{path!r} cannot be written: {error.strerror}") from None


def _html(atlas: Atlas, claims: list[Claim]) -> str:
    from pyvmm.atlas.expected import expected
    from pyvmm.atlas.report.html import render

    return render(atlas, expected(atlas.host, claims), _headings(claims))


def _junit(atlas: Atlas, claims: list[Claim]) -> str:
    from pyvmm.atlas.expected import expected
    from pyvmm.atlas.report.junit import render

    return render(atlas, expected(atlas.host, claims))


def _map(atlas: Atlas) -> str:
    from pyvmm.observe.mapsvg import svg_steps
    from pyvmm.observe.pagemap import PageMap

    steps = [
        (f"{result.id} {result.protection}/{result.backing}: {picture.title}", PageMap.from_runs(picture.runs))
        for result in atlas.results
        for picture in result.pictures
    ]
    if not steps:
        print(
            "pyvmm: no page map: none of these experiments records one; every-fresh-page-faults does", file=sys.stderr
        )
    return svg_steps(steps)


def _diff(args: argparse.Namespace) -> int:
    from pyvmm.atlas.model import Atlas
    from pyvmm.atlas.report import diff
    from pyvmm.reports.look import Look

    names = args.claims[1:]
    if len(names) != 2:
        raise UsageError(f"{len(names)} files given, diff compares two", hint="pyvmm atlas diff A.json B.json")
    comparison = diff.compare(*(Atlas.load(name) for name in names))
    print(diff.render(comparison, Look.of(sys.stdout), verbose=args.details))
    if args.json:
        _save(args.json, json.dumps(diff.to_json(comparison), indent=1) + "\n")
    return 0 if comparison.same else 1
