# SPDX-License-Identifier: Apache-2.0
"""The payloads also run on another VMM: QEMU's virt machine. They learn its addresses from its device tree.

There is no KVM and no pyvmm device. The tests cover start, MMU, vectors, device tree, UART, PSCI and atomics.
"""

from __future__ import annotations

import re
import shutil
import subprocess

import pytest

from pyvmm import payloads

QEMU = shutil.which("qemu-system-aarch64")
pytestmark = pytest.mark.skipif(QEMU is None, reason="qemu-system-aarch64 is not installed")


def qemu(payload: str, bootargs: str = "", *, cpus: int = 1, machine: str = "virt", limit: float = 60) -> str:
    """Run until power-off and return the UART's output. Kills a run that takes longer than ``limit``."""
    command = [
        str(QEMU),
        "-M",
        machine,
        "-cpu",
        "neoverse-n1",
        "-smp",
        str(cpus),
        "-m",
        "128",
        "-nodefaults",
        "-display",
        "none",
        "-serial",
        "stdio",
        "-no-reboot",
        "-kernel",
        payloads.path_of(payload),
        "-append",
        bootargs,
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=limit, check=True, stdin=subprocess.DEVNULL)
    return done.stdout


def qemu_until(payload: str, pattern: str, bootargs: str = "") -> re.Match[str]:
    """Run a payload that never ends until a line matches, then kill it."""
    command = [
        str(QEMU),
        "-M",
        "virt",
        "-cpu",
        "neoverse-n1",
        "-m",
        "128",
        "-nodefaults",
        "-display",
        "none",
        "-serial",
        "stdio",
        "-kernel",
        payloads.path_of(payload),
        "-append",
        bootargs,
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL, text=True) as process:
        try:
            assert process.stdout is not None
            for line in process.stdout:
                if found := re.search(pattern, line):
                    return found
        finally:
            process.kill()
    raise AssertionError(f"no line matched {pattern!r}")


@pytest.mark.parametrize(("machine", "cpus"), [("virt", 1), ("virt,gic-version=3", 8)])
def test_hello_reads_the_device_tree_it_is_given(machine: str, cpus: int) -> None:
    printed = qemu("hello", cpus=cpus, machine=machine)
    assert printed.startswith("hello from a plain guest\n")
    assert f"{cpus} vCPU{'s' * (cpus > 1)}, 128 MiB" in printed


def test_smp_starts_counts_and_stops_every_vcpu() -> None:
    printed = qemu("smp", "rounds=5000", cpus=8)
    assert [int(n) for n in re.findall(r"^vCPU (\d): up", printed, re.M)] == list(range(8))
    assert "counted 40000 of 40000\n" in printed
    assert "all but the first are off again\n" in printed
    assert "CPU_ON of this vCPU says -4, of one that is not there -2\n" in printed


@pytest.mark.parametrize("access", ["read", "write", "execute"])
@pytest.mark.parametrize("order", ["sequential", "random", "strided"])
def test_touch_measures_every_page_of_every_pass(order: str, access: str) -> None:
    printed = qemu("touch", f"order={order} access={access} pages=100 stride=3 repeat=3")
    passes = re.findall(
        r"^touch: pass=(\d) order=(\w+) access=(\w+) pages=100 stride=(\d+) min=(\d+) median=(\d+) max=(\d+) "
        r"total=(\d+) hz=\d+$",
        printed,
        re.M,
    )
    assert [p[:4] for p in passes] == [(str(n), order, access, "3" if order == "strided" else "1") for n in range(3)]
    for least, median, most, total in [map(int, p[4:]) for p in passes]:
        assert 0 < least <= median <= most < total
        assert 100 * least <= total <= 100 * most


def test_touch_refuses_more_memory_than_the_guest_has() -> None:
    assert qemu("touch", "pages=100000") == "touch: not enough memory for 100000 pages, 1 apart\n"


@pytest.mark.parametrize(
    ("way", "exception_class", "far"),
    [("undefined", 0x00, None), ("unmapped", 0x25, 0xDEAD_0000_0000), ("jump", 0x21, 0xDEAD_0000_0000)],
)
def test_a_trap_without_a_mailbox_is_reported_on_the_uart(way: str, exception_class: int, far: int | None) -> None:
    found = qemu_until(
        "crash", r"trap: vector 4 esr ([0-9a-f]+) far ([0-9a-f]+) elr ([0-9a-f]+) .* vcpu 0", f"way={way}"
    )
    assert int(found[1], 16) >> 26 == exception_class
    if far is not None:
        assert int(found[2], 16) == far
    if way == "jump":
        assert int(found[3], 16) == far


@pytest.mark.parametrize(
    ("payload", "says"),
    [("puppet", "puppet: this machine has no mailbox\n"), ("echo", "echo: this machine has no echo device\n")],
)
def test_a_payload_without_its_device_says_so_and_powers_off(payload: str, says: str) -> None:
    assert qemu(payload) == says


def test_boot_arguments_match_only_whole_keys() -> None:
    assert qemu("crash", "noway=reset way=nonsense away=loop") == (
        "crash: noway=reset way=nonsense away=loop\ncrash: no such way\n"
    )
