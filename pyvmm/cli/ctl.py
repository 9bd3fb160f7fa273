# SPDX-License-Identifier: Apache-2.0
"""``pyvmm ctl``: control a run of another process, or query it, through its socket.

Name the run by its process ID, or by the path of its ``--socket``. Without either, the user's only run is meant.
"""

from __future__ import annotations

import argparse
import json
import os
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from pyvmm.cli.common import Help, add_common
from pyvmm.errors import PyvmmError, UsageError, hex_
from pyvmm.syntax.values import parse_size

if TYPE_CHECKING:
    from collections.abc import Callable

PATIENCE: Final = 60.0
"""Seconds that a run has to carry out an order, and to end after a stop."""
LONG: Final = 3600.0
"""Seconds that a run has to write all of its memory."""


class Order(NamedTuple):
    """An order: its argument's name, whether the argument is required, and the line of --help."""

    argument: str | None
    needed: bool
    help: str


ORDERS: Final = {
    "info": Order(None, False, "what the machine is, and whether it runs or is paused"),
    "counters": Order(None, False, "what has been counted: exits, shares, pages"),
    "pause": Order(
        None,
        False,
        "make vCPUs, devices and the guest's counters stand still: its wall clock lags from then on. A deadline "
        "goes on, and so do the counters of a pkvm guest, whose Linux may report soft lockups",
    ),
    "resume": Order(None, False, "resume vCPUs and devices"),
    "stop": Order(None, False, "end the run, and return when it has ended"),
    "kick": Order("text", False, "type TEXT, if given, and Return on the console; ^C is Ctrl-C, without Return"),
    "break": Order("key", False, "send a BREAK and KEY on the UART, which Linux takes as SysRq: h lists the keys"),
    "balloon": Order("size", False, "print the balloon's size; with SIZE, have it take that much memory first"),
    "snapshot": Order("file", True, "write the guest to FILE, for pyvmm run --restore; protection none only"),
}


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Define the verb's options."""
    orders = "".join(
        f"  {name + (f' {_shown(order)}' if order.argument else ''):16} {order.help}\n"
        for name, order in ORDERS.items()
    )
    parser = subparsers.add_parser(
        "ctl",
        help="control a running guest",
        allow_abbrev=False,
        formatter_class=Help,
        usage="pyvmm ctl [-h] [--json] [PID|PATH] ORDER [ARGUMENT]",
        description="Give an order to the run of process PID, to the one whose --socket is PATH, or to the only one.",
        epilog=f"orders:\n{orders}\n"
        "exit status: 0 done, 1 the run refused or ended first, 2 no such run or order\n\n"
        "examples:\n"
        "  pyvmm ctl info\n"
        "  pyvmm ctl 1234 pause\n"
        "  pyvmm ctl --json ./vm.sock counters | jq .pages",
    )
    parser.add_argument("words", nargs="+", metavar="ORDER", help=argparse.SUPPRESS)
    parser.add_argument("--json", action="store_true", help="print the answer as a line of JSON")
    add_common(parser)


def main(args: argparse.Namespace) -> int:
    """Send the order, print the answer, and return the exit status."""
    from pyvmm.session.connection import Connection, only_one
    from pyvmm.terminal import clean

    where, name, members = parse(args.words)
    with Connection(only_one() if where is None else where) as connection:
        answer = connection.ask(name, patience=LONG if name == "snapshot" else PATIENCE, **members)
        if name == "stop":
            if answer is not None and not connection.wait_for_end(PATIENCE):
                raise PyvmmError(f"{connection.name} got the order to stop, but has not ended within {PATIENCE:g} s")
            answer = {"state": "ended"}
        if answer is None:
            raise PyvmmError(f"{connection.name} ended before it could answer")
    print(json.dumps(answer) if args.json else clean("\n".join(_TEXT.get(name, _plain)(answer))))
    return 0


def parse(words: list[str]) -> tuple[int | str | None, str, dict[str, object]]:
    """Return the run that ``words`` name (None: the only one), the order, and its members. Raises UsageError."""
    where: int | str | None = None
    if words[0] not in ORDERS:
        where = int(words[0]) if words[0].isascii() and words[0].isdecimal() else words[0]
        words = words[1:]
    if not words or words[0] not in ORDERS:
        problem = f"{words[0]!r} is not an order" if words else f"no order for {where}"
        raise UsageError(problem, hint=f"the orders are {', '.join(ORDERS)}; pyvmm ctl --help tells more")
    name, *rest = words
    order = ORDERS[name]
    if order.needed and not rest:
        raise UsageError(f"{name} needs a {order.argument}", hint=f"pyvmm ctl {name} {_shown(order)}")
    if len(rest) > (order.argument is not None):
        raise UsageError(f"{name} takes {'one argument' if order.argument else 'no argument'}, not {' '.join(rest)!r}")
    return where, name, {str(order.argument): _member(order, rest[0])} if rest else {}


def _member(order: Order, text: str) -> object:
    """Return the request member for an argument."""
    if order.argument == "file":
        return os.path.abspath(text)  # the run may be in another directory
    if order.argument == "size":
        try:
            return parse_size(text)
        except argparse.ArgumentTypeError as error:
            raise UsageError(str(error)) from None
    return text


def _shown(order: Order) -> str:
    word = str(order.argument).upper()
    return word if order.needed else f"[{word}]"


# -- answers in words


def _plain(answer: Any) -> list[str]:
    return [f"{name}: {value}" for name, value in answer.items()]


def _info(answer: Any) -> list[str]:
    mib = answer["memory"] >> 20
    lines = [
        f"{answer['kernel']}: {answer['state']}, {answer['elapsed_ns'] / 1e9:.1f} s since its start, "
        f"process {answer['pid']}",
        f"protection {answer['protection']}, {mib} MiB of {answer['backing']}, {answer['cpus']} "
        f"vCPU{'' if answer['cpus'] == 1 else 's'}",
    ]
    rows = [(slot["gpa"], slot["size"], f"memory: {slot['backing']}", None) for slot in answer["slots"]]
    for device in answer["devices"]:
        name = ", ".join(filter(None, (device["name"], device.get("about"))))
        rows.append((device["gpa"], device["size"], name, device["spi"]))
    for gpa, size, name, spi in sorted(rows):
        lines.append(f"  {hex_(gpa):>12} {size:#10x}  {name}{'' if spi is None else f', SPI {spi}'}")
    return lines


def _counters(answer: Any) -> list[str]:
    lines = [f"{answer['elapsed_ns'] / 1e9:.1f} s"]
    for number, vcpu in enumerate(answer["vcpus"]):
        exits = ", ".join(f"{name} {count[0]}" for name, count in vcpu["exits"].items()) or "none"
        lines.append(f"vCPU {number} exits: {exits}")
    pages = ", ".join(f"{name} {count}" for name, count in answer["pages"].items() if count) or "none"
    lines.append(f"pages: {pages}")
    lines.append(f"kicks without an exit: {answer['kicks']}")
    lines.append(f"shares {answer['shares']}, unshares {answer['unshares']}, refused {answer['refused']}")
    return lines


_TEXT: Final[dict[str, Callable[[Any], list[str]]]] = {"info": _info, "counters": _counters}
