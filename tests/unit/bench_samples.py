# SPDX-License-Identifier: Apache-2.0
"""Invented runs for tests of reports: a realistic one, a hostile one, and short ways to make series.

``python tests/unit/bench_samples.py DIRECTORY`` writes the realistic one there as JSON lines, with all its reports.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from pyvmm.bench import model
from pyvmm.bench.model import Point, Run, Series

ENVIRONMENT: dict[str, model.Value] = {
    "kernel": "7.0.9-arm64", "version": "#1 SMP PREEMPT Debian 7.0.9-1", "machine": "aarch64", "mode": "protected",
    "protected VMs": "yes", "cpu": "implementer 0x41 part 0xd0c", "cpus": 4, "tcg": True, "page size": 4096,
    "command line": "kvm-arm.mode=protected mitigations=off lsm= audit=0 panic=-1", "pyvmm": "0.1.0",
    "python": "3.13.5", "counts": "time", "governor": "none", "pinning": "0,1,2,3", "clock source": "arch_sys_counter",
    "shmem huge pages": "never", "EL2 trace": "yes", "memory MiB": 3913, "emulator": "QEMU 7.2.22",
}  # fmt: skip

HOSTILE = [
    "</script><script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "<!--",
    "]]>",
    "&amp;&lt;",
    "'\"`",
    "\x1b[31mred\x1b[0m",
    "$\\frac{$",
    "\u202egnp.exe",
    "_hidden",
    'id="a" url(#b) href="#c"',
    "#1b1f24 var(--x)",
    "https://evil.example/",
    "漢字 \U0001f600",
    "",
]

ROUNDS = 5
TICK = 16.0
"""ns in a tick of a counter at 62.5 MHz: values are whole ticks."""


def series(
    values: Iterable[Any],
    *,
    case: str = "fault",
    metric: str = "touch",
    point: Point | None = None,
    rounds: Sequence[int] = (),
    warmup: int = 0,
    unit: str = "ns",
    **more: Any,
) -> Series:
    """Return a series with defaults for the rest."""
    more = {"clock": "guest", "per": "page"} | more
    more |= {name: tuple(more[name]) for name in ("places", "began") if name in more}
    point = {"protection": "none"} if point is None else point
    return Series(case, point, metric, unit=unit, values=tuple(values), warmup=warmup, rounds=tuple(rounds), **more)


def run(*some: Series, environment: dict[str, model.Value] | None = None, **more: Any) -> Run:
    """Return a run with defaults for the rest."""
    return Run(ENVIRONMENT if environment is None else environment, {}, some, {"seconds": 1.0}, **more)


def per_round(middles: Sequence[float], count: int = 40, *, seed: int = 1, spread: float = 0.02, **more: Any) -> Series:
    """Return a series whose rounds lie around ``middles``. No round is warm-up."""
    rng = random.Random(seed)
    values = [rng.gauss(middle, spread * middle) for middle in middles for _ in range(count)]
    return series(values, rounds=[count] * len(middles), **more)


def hostile() -> Run:
    """Return a run in which every text is hostile: case, metric, axis, its value, reason and note."""
    some = []
    for at in range(0, len(HOSTILE), 3):
        text = " ".join(HOSTILE[at : at + 3])
        for cpus in (1, 2):
            point: Point = {text: text, "cpus": cpus}
            some.append(
                series(
                    [1.0, 2.0, 3.0] * 10,
                    case=HOSTILE[0],
                    metric=text,
                    clock=text,
                    unit=text,
                    per=text,
                    point=point,
                    rule=text,
                    warmup=1,
                    notes={text: text},
                )
            )
    values = [1.0, 2.0, 3.0]
    for text in HOSTILE:
        some.append(series(values, case="fault", point={"what": text}, rounds=[3], places=(0, 1, 2), began=values))
        some.append(series([], case="fault", point={text: text}, unavailable=text))
        some.append(series(values, case="split", metric="whole", point={"what": text}))
        some.append(series(values, case="split", metric="EL2", point={"what": text}))
        some.append(series(values, case="peer", point={"peer": text}))
    return Run({**ENVIRONMENT, **{text: text for text in HOSTILE}, "kernel": HOSTILE[0]}, {"a": HOSTILE}, tuple(some))


# -- a realistic run

_COST = {"none": 14_000.0, "emulated": 15_500.0, "pkvm": 31_000.0}
_STATES = {"cold": 1.0, "allocated": 0.8, "populated": 0.55, "punched": 1.05, "dontneed": 0.95, "mapped": 0.011}
_SPLIT = {"EL2": 0.34, "account and pin": 0.21, "allocation and zeroing": 0.19, "exit and entry": 0.23}
_BASE: Point = {
    "protection": "none",
    "state": "cold",
    "access": "write",
    "order": "sequential",
    "backing": "memfd",
    "cpus": 1,
}


class _Making:
    def __init__(self, pages: int) -> None:
        self._rng, self._pages = random.Random(7), pages
        self.series: list[Series] = []

    def _cost(self, middle: float, page: int) -> float:
        """Return the cost of a page: skewed, sometimes with a page table, rarely with an interruption."""
        value = middle * self._rng.lognormvariate(0, 0.08)
        value *= 1.7 if page % 512 == 0 else 1
        value *= self._rng.uniform(4, 40) if self._rng.random() < 0.004 else 1
        return round(max(round(value / TICK), 1) * TICK, 3)

    def keep(
        self,
        case: str,
        metric: str,
        point: Point,
        middle: float,
        *,
        pages: int = 0,
        clock: str = "guest",
        unit: str = "ns",
        per: str = "page",
        places: list[int] | None = None,
        **notes: Any,
    ) -> None:
        """Make five rounds, the first of them warm-up."""
        pages = pages or self._pages
        shift = [self._rng.lognormvariate(0, 0.01) for _ in range(ROUNDS)]
        values = [self._cost(middle * each, page) for each in shift for page in range(pages)]
        picture: dict[str, Any] = {}
        if places:
            began, at = [], 0.0
            for value in values[-pages:]:
                began.append(round(at, 1))
                at += value
            none = [0] * (ROUNDS - 1) * pages
            picture = {"places": (*none, *places), "began": (*map(float, none), *began)}
        self.series.append(
            Series(
                case,
                point,
                metric,
                clock,
                unit,
                per,
                tuple(values),
                warmup=pages,
                rule="the first round",
                rounds=(pages,) * ROUNDS,
                notes=notes,
                **picture,
            )
        )

    def cannot(self, case: str, point: Point, why: str) -> None:
        self.series.append(Series(case, point, "cost", "guest", "ns", "page", unavailable=why))

    def order(self, how: str) -> list[int]:
        """Page numbers in the order they are touched."""
        pages = list(range(self._pages))
        if how == "random":
            self._rng.shuffle(pages)
        return [page * 16 for page in pages] if how == "strided" else pages


def realistic(pages: int = 256) -> Run:
    """Return a run of every case in all protections, like that of an emulated host with a trace at EL2."""
    made = _Making(pages)
    for protection, cost in _COST.items():
        base: Point = {**_BASE, "protection": protection}
        for state, factor in _STATES.items():
            made.keep("fault", "touch", {**base, "state": state}, cost * factor, places=made.order("sequential"))
        for order in ("random", "strided"):
            made.keep("fault", "touch", {**base, "order": order}, cost * 1.1, places=made.order(order))
        for access in ("read", "execute"):
            made.keep("fault", "touch", {**base, "access": access}, cost * 0.97)
        for cpus in (2, 3, 4):
            made.keep("fault", "touch", {**base, "cpus": cpus}, cost * (1 + 0.35 * (cpus - 1)))
        made.keep("fault", "touch", {**base, "backing": "thp"}, cost * 22, pages=max(pages // 32, 1))
        if protection == "pkvm":
            made.cannot("fault", {**base, "backing": "guest_memfd"}, "KVM_CREATE_GUEST_MEMFD: EINVAL: no such memory")
        made.keep("fault", "el2", base, cost * 0.3, pages=32, clock="el2")
        made.keep("fault", "KVM's exits", base, 32.0, pages=1, clock="kvm", unit="count")
        for size in (16, 64, 256, 1024):
            made.keep(
                "teardown",
                "close",
                {"protection": protection, "size": size},
                cost * 40 * size,
                pages=8,
                clock="host",
                per="VM",
            )
        made.keep(
            "footprint",
            "PSS less guest memory",
            {"protection": protection},
            9e6,
            pages=2,
            clock="memory",
            unit="bytes",
            per="VM",
        )
    exits = {"hvc": 2_300.0, "MMIO in KVM": 2_900.0, "MMIO in C": 4_800.0, "MMIO in Python": 31_000.0}
    for what, cost in exits.items():
        made.keep("exit", "trip", {"protection": "none", "what": what}, cost, per="exit", pages=1200 * pages // 256)
    for state in ("touched", "untouched"):
        made.keep("share", "share", {"protection": "pkvm", "state": state}, 9_000 if state == "touched" else 41_000)
    for protection in ("none", "pkvm"):
        for what, share in {"whole": 1.0, **_SPLIT}.items():
            point: Point = {"protection": protection, "backing": "memfd"}
            if protection == "none" and what == "EL2":
                made.cannot("split", point, "no EL2 trace: the kernel has no remotes/hypervisor")
            else:
                made.keep("split", what, point, _COST[protection] * share)
    for peer, cost in {"bare loop": 4_650.0, "twin": 38_000.0, "qemu": 11_200.0}.items():
        point = {"what": "store to a register file", "beside": peer}
        made.keep("peer", "exit", {**point, "peer": peer}, cost, pages=1, per="exit", clock="host")
        made.keep("peer", "exit", {**point, "peer": "pyvmm"}, 4_800.0, pages=1, per="exit", clock="host")
    made.cannot("peer", {"peer": "demand_paging_test"}, "demand_paging_test is not there: it has not been built")
    return Run(ENVIRONMENT, {"cases": ["all"]}, tuple(made.series), {"seconds": 171.3, "date": "2026-01-02 03:04 UTC"})


def text(run: Run) -> str:
    """Return a run as JSON lines, as it is stored."""
    end = model.footer(run.end) if run.end is not None else ""
    return model.header(run.environment, run.asked) + "".join(map(model.line, run.series)) + end


def _main() -> None:
    from pyvmm.bench.report import figures, html, table

    directory, made = Path(sys.argv[1]), realistic()
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "run.jsonl").write_text(text(made))
    (directory / "run.txt").write_text(table.text(made))
    (directory / "run.html").write_text(html.render(made))
    figures.save(made, directory / "figures")


if __name__ == "__main__":
    _main()
