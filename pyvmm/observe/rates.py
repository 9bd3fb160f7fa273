# SPDX-License-Identifier: Apache-2.0
"""How busy a running machine is: take readings of its counters, and compute rates from two of them.

A reading is a plain dict, because it goes to other processes as JSON. It reads existing counters and /proc, without
disturbing the vCPUs. Owns nothing.

Exits are those that reach this process. Virtqueue kicks that the kernel takes are counted separately.

Of a vCPU's time, "vmm" is from KVM_RUN's return to the next entry, by the native loop's clock. The rest, inside
KVM_RUN, is divided by the kernel's accounting of the thread, sampled in ticks of 10 ms: "guest", which includes EL2,
and "kernel". The remainder is "waiting": the vCPU is halted or off, or other tasks have the CPU.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

from pyvmm import __version__
from pyvmm.labenv import TCG_NOTE, in_lab
from pyvmm.memory.ledger import PageState
from pyvmm.pages import HOST_PAGE
from pyvmm.protection import Protection
from pyvmm.vcpu.counters import EXITS

if TYPE_CHECKING:
    from pyvmm._native import pv_vcpu
    from pyvmm.machine.machine import Machine

Reading = dict[str, Any]
Report = dict[str, Any]

TIMES: Final = ("guest", "kernel", "vmm", "waiting")
"""What a vCPU's time is divided into; see above."""
_CONVERSIONS: Final = ("shares", "unshares", "refused")
_RATES: Final = (*_CONVERSIONS, "kicks")
_NS_A_TICK: Final = 1_000_000_000 // os.sysconf("SC_CLK_TCK")
_SYSTEM, _GUEST = 14, 42
"""stime and guest_time in /proc/PID/stat, counted from 0 (man 5 proc_pid_stat)."""
_STATUS: Final = "/proc/self/status"
_status: int | None = None
"""Its descriptor, if the process keeps it open."""


def take_reading(machine: Machine) -> Reading:
    """Return a reading of ``machine``. Times are in ns; points in time are of CLOCK_MONOTONIC."""
    config = machine.config
    tids = {thread.name: thread.native_id for thread in threading.enumerate()}
    vm = machine.native
    return {
        "pyvmm": __version__,
        "pid": os.getpid(),
        "kernel": config.title,
        "protection": config.protection.value,
        "backing": config.backing,
        "memory": config.memory,
        "tcg": in_lab(),
        "ns": time.monotonic_ns(),
        "elapsed_ns": machine.elapsed_ns,
        "pages": {state.name.lower(): vm.pages[state] for state in PageState},
        "donated": donated() if config.protection is Protection.PKVM else None,
        "kicks": machine.kicks,
        "shares": vm.shares,
        "unshares": vm.unshares,
        "refused": vm.refused,
        "vcpus": [
            {**_counted(native, machine.elapsed_ns), **_accounted(tids.get(f"pyvmm-vcpu{native.index}"))}
            for native in machine.natives
        ],
    }


def keep_status_open() -> None:
    """Open now what :func:`donated` reads, for a process that soon opens no more files."""
    global _status
    if _status is None:
        _status = os.open(_STATUS, os.O_RDONLY | os.O_CLOEXEC)


def donated() -> int:
    """Return the number of pages that this process has locked: under pkvm those donated to its guest."""
    if _status is not None:
        text = os.pread(_status, 1 << 16, 0)
    else:
        with open(_STATUS, "rb", buffering=0) as file:
            text = file.read()
    return int(text[text.index(b"VmLck:") + 6 :].split(None, 1)[0]) * 1024 // HOST_PAGE


def _counted(native: pv_vcpu, elapsed_ns: int) -> dict[str, Any]:
    stats = [native.stats[code] for code in EXITS]
    kvm_run, vmm = sum(s.guest_ns for s in stats), sum(s.vmm_ns for s in stats)
    # The current interval is counted when it ends. Until then it is the uncounted time.
    rest = max(0, elapsed_ns - kvm_run - vmm)
    kvm_run, vmm = (kvm_run + rest, vmm) if native.tid else (kvm_run, vmm + rest)
    exits = zip(EXITS.values(), stats, strict=True)
    return {
        "exits": {name: [s.count, s.guest_ns, s.vmm_ns] for name, s in exits if s.count},
        "kvm_run_ns": kvm_run,
        "vmm_ns": vmm,
    }


def _accounted(tid: int | None) -> dict[str, int | None]:
    """Return the kernel's accounting of a thread, or None if it has ended."""
    try:
        with open(f"/proc/self/task/{tid}/stat") as file:
            # The name, in parentheses, may have anything in it.
            fields = file.read().rpartition(")")[2].split()
    except OSError:
        return {"guest_cpu_ns": None, "kernel_cpu_ns": None}
    guest, kernel = (int(fields[at - 2]) * _NS_A_TICK for at in (_GUEST, _SYSTEM))
    return {"guest_cpu_ns": guest, "kernel_cpu_ns": kernel}


def since_start(now: Reading) -> Report:
    """Report on a run from its beginning."""
    nothing = {"exits": {}, "kvm_run_ns": 0, "vmm_ns": 0, "guest_cpu_ns": 0, "kernel_cpu_ns": 0}
    before = {**now, "ns": now["ns"] - now["elapsed_ns"], **dict.fromkeys(_RATES, 0)}
    return report({**before, "vcpus": [nothing] * len(now["vcpus"])}, now)


def report(before: Reading, now: Reading) -> Report:
    """Compute a report from two readings of one machine: rates per second, shares of time from 0 to 1."""
    seconds = max(now["ns"] - before["ns"], 1) / 1e9
    vcpus = [_vcpu(old, new, seconds) for old, new in zip(before["vcpus"], now["vcpus"], strict=True)]
    names = {name for vcpu in vcpus for name in vcpu["kinds"]}
    kinds = {name: [sum(vcpu["kinds"].get(name, (0, 0, 0))[i] for vcpu in vcpus) for i in range(3)] for name in names}
    about = ("pid", "kernel", "protection", "backing", "memory", "tcg", "elapsed_ns", "pages", "donated")
    return {
        **{key: now[key] for key in about},
        "seconds": round(seconds, 6),
        "exits_per_second": round(sum(count for count, _, _ in kinds.values()) / seconds, 3),
        "exits": {
            name: {
                "per_second": round(count / seconds, 3),
                "kvm_run_us": round(kvm_run / count / 1000, 3),
                "vmm_us": round(vmm / count / 1000, 3),
            }
            for name, (count, kvm_run, vmm) in sorted(kinds.items(), key=lambda kind: -kind[1][0])
            if count
        },
        **{f"{what}_per_second": round((now[what] - before[what]) / seconds, 3) for what in _RATES},
        "time": {name: _mean([vcpu["time"][name] for vcpu in vcpus]) for name in TIMES},
        "vcpus": [{"exits_per_second": vcpu["exits_per_second"], "time": vcpu["time"]} for vcpu in vcpus],
    }


def _mean(shares: list[float | None]) -> float | None:
    known = [share for share in shares if share is not None]
    return round(sum(known) / len(known), 4) if len(known) == len(shares) else None


def _vcpu(before: Mapping[str, Any], now: Mapping[str, Any], seconds: float) -> dict[str, Any]:
    kinds = {
        name: [new - old for new, old in zip(values, before["exits"].get(name, (0, 0, 0)), strict=True)]
        for name, values in now["exits"].items()
    }
    times = _times(before, now, seconds)
    return {
        "kinds": kinds,
        "exits_per_second": round(sum(count for count, _, _ in kinds.values()) / seconds, 3),
        "time": {name: None if share is None else round(share, 4) for name, share in times.items()},
    }


def _times(before: Mapping[str, Any], now: Mapping[str, Any], seconds: float) -> dict[str, float | None]:
    vmm = min(max(0.0, (now["vmm_ns"] - before["vmm_ns"]) / 1e9 / seconds), 1.0)
    if now["guest_cpu_ns"] is None:
        return {"guest": None, "kernel": None, "vmm": vmm, "waiting": None}
    # A new thread starts at 0.
    guest, kernel = (max(0.0, (now[k] - (before[k] or 0)) / 1e9 / seconds) for k in ("guest_cpu_ns", "kernel_cpu_ns"))
    # Ticks may exceed the elapsed time a little. Kernel time of the VMM's own calls is already in "vmm".
    guest = min(guest, 1.0 - vmm)
    kernel = min(kernel, 1.0 - vmm - guest)
    return {"guest": guest, "kernel": kernel, "vmm": vmm, "waiting": max(0.0, 1.0 - vmm - guest - kernel)}


def lines(report: Report, *, width: int = 80, height: int = 40) -> list[str]:
    """Write a report as at most ``height`` lines of ``width``, with as many vCPUs as fit."""
    vcpus, exits = report["vcpus"], report["exits"]
    found = [
        f"{report['kernel']}: protection {report['protection']}, {len(vcpus)} vCPU{'' if len(vcpus) == 1 else 's'}, "
        f"{report['memory'] >> 20} MiB of {report['backing']}",
        f"process {report['pid']}, after {report['elapsed_ns'] / 1e9:.1f} s; of the last {report['seconds']:.1f} s:",
        "",
        f"{'exit':<16}{'exits/s':>12}{'KVM_RUN us':>13}{'VMM us':>10}",
        *(
            f"{name:<16}{kind['per_second']:>12,.0f}{kind['kvm_run_us']:>13,.1f}{kind['vmm_us']:>10,.1f}"
            for name, kind in exits.items()
        ),
        *([] if exits else ["none"]),
        "",
        f"{'vCPU':<16}{'exits/s':>12}" + "".join(f"{name:>10}" for name in TIMES),
        _row("all", report),
    ]
    pages = report["pages"]
    shown = {name: count for name, count in pages.items() if count or name in ("private", "shared")}
    if report["donated"] is not None:
        # The kernel does not report which pages are donated, only their number.
        assumed = {"private": "private or untouched"}
        shown = {"donated": report["donated"], **{assumed.get(name, name): shown[name] for name in shown}}
    rest = [
        "",
        "pages: " + ", ".join(f"{count:,} {name}" for name, count in shown.items()),
        "a second: "
        + ", ".join(f"{report[f'{what}_per_second']:,.0f} {what}" for what in _CONVERSIONS)
        + (f", {report['kicks_per_second']:,.0f} kicks without an exit" if report["kicks_per_second"] else ""),
        *([TCG_NOTE] * report["tcg"]),
    ]
    room = height - len(found) - len(rest)
    each = [_row(str(index), vcpu) for index, vcpu in enumerate(vcpus)] if len(vcpus) > 1 else []
    if len(each) > max(room, 0):
        each = [*each[: max(room - 1, 0)], f"and {len(each) - max(room - 1, 0)} vCPUs more"]
    return [line[:width] for line in (*found, *each, *rest)][:height]


def _row(name: str, of: Mapping[str, Any]) -> str:
    shares = "".join(f"{'-':>10}" if share is None else f"{share:>10.1%}" for share in of["time"].values())
    return f"{name:<16}{of['exits_per_second']:>12,.0f}{shares}"
