# SPDX-License-Identifier: Apache-2.0
"""``pyvmm run --confine``, on a fake KVM and the real walls of this kernel: a start, and an end by an error."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from pyvmm.confine import filter as seccomp
from pyvmm.confine import landlock
from pyvmm.uapi.unistd import MACHINES

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]

pytestmark = pytest.mark.skipif(
    os.uname().machine not in MACHINES or not seccomp.available(), reason="this kernel filters no system calls"
)


def started(*words: str, hook: str = "", pass_fds: tuple[int, ...] = ()) -> subprocess.CompletedProcess[str]:
    """Run a command line on a fake host, after the Python statements ``hook``."""
    code = f"import sys\nsys.path.insert(0, {str(HERE)!r})\nimport fake_host\n{hook}\n"
    code += "sys.exit(fake_host.run(sys.argv[1:]))"
    return subprocess.run(
        [sys.executable, "-c", code, *words],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdin=subprocess.DEVNULL,
        pass_fds=pass_fds,
    )


def landlock_is_there() -> bool:
    try:
        return landlock.version() > 0
    except OSError:
        return False


FAILING = """
from pyvmm.vcpu.cold import ColdExits
original = ColdExits.handle
def handle(cold, stop):
    {act}
    return original(cold, stop)
setattr(ColdExits, "handle", handle)
"""
OPEN = FAILING.format(act="open('/etc/passwd').close()")


@pytest.fixture
def devices(tmp_path: Path) -> list[str]:
    disk = tmp_path / "disk"
    disk.write_bytes(bytes(4096))
    return ["-d", str(disk), "--rng", "--balloon", "0", "--vsock", f"uds={tmp_path}/vsock,cid=3", "-c", "2"]


def test_a_confined_run_reaches_its_guest_and_ends_as_any_other(devices: list[str], tmp_path: Path) -> None:
    socket = tmp_path / "control"
    done = started("run", "--confine", "on", *devices, "--socket", str(socket), "payload:hello")
    assert done.returncode == 1
    assert re.search(r"KVM_RUN\(vcpu=[01]\): ENOTTY", done.stderr)
    assert "bug" not in done.stderr
    # Only the run's own sockets may be removed, and they are.
    assert sorted(path.name for path in tmp_path.iterdir()) == ["disk"]


def test_an_act_that_a_run_never_does_ends_it_with_the_reason() -> None:
    done = started("run", "--confine", "on", "payload:hello", hook=OPEN)
    assert done.returncode == 1, done
    assert "Operation not permitted: '/etc/passwd'" in done.stderr


def test_log_reports_the_call_and_lets_it_happen() -> None:
    done = started("run", "--confine", "log", "payload:hello", hook=OPEN)
    assert "Operation not permitted" not in done.stderr
    [line] = [line for line in done.stderr.splitlines() if "would_refuse" in line]
    assert "call=openat" in line
    assert "arguments='0xffffff9c" in line or "arguments='0xffffffffffffff9c" in line
    assert "path=/etc/passwd" in line


def test_log_counts_what_it_does_not_print() -> None:
    often = FAILING.format(act="[open('/etc/passwd').close() for _ in range(25)]")
    done = started("run", "--confine", "log", "payload:hello", hook=often)
    assert done.stderr.count("would_refuse ") == 10
    assert "times=25" in done.stderr


def test_log_reports_nothing_of_a_run_that_does_nothing_more(devices: list[str]) -> None:
    done = started("run", "--confine", "log", *devices, "payload:hello")
    assert "ENOTTY" in done.stderr
    assert "would_refuse" not in done.stderr


def test_a_run_that_is_not_confined_keeps_its_rights() -> None:
    done = started("run", "payload:hello", hook=OPEN)
    assert "Operation not permitted" not in done.stderr
    assert "NoNewPrivs:\t0" in started("run", "payload:hello", hook=KEEP + FAILING.format(act=STATUS)).stdout


STATUS = "import os; os.write(1, os.pread(KEPT, 1 << 16, 0))"
KEEP = "import os\nKEPT = os.open('/proc/self/status', os.O_RDONLY)\n"


def test_descriptors_that_were_inherited_are_closed() -> None:
    reading, writing = os.pipe()
    code = FAILING.format(act=f"import os; print('there' if alive({writing}) else 'closed')")
    alive = "import os\ndef alive(fd):\n    try: return os.fstat(fd)\n    except OSError: return None\n"
    try:
        for how, found in (("off", "there"), ("on", "closed")):
            done = started("run", "--confine", how, "payload:hello", hook=alive + code, pass_fds=(writing,))
            assert done.stdout == f"{found}\n", done
    finally:
        os.close(reading)
        os.close(writing)


def test_an_inherited_descriptor_can_still_be_named(tmp_path: Path) -> None:
    with open(tmp_path / "serial", "w") as file:
        words = ("--serial", f"file=/dev/fd/{file.fileno()}")
        done = started("run", "--confine", "on", *words, "payload:hello", pass_fds=(file.fileno(),))
    assert "ENOTTY" in done.stderr
    assert done.returncode == 1


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (("--reboot",), "--confine on with --reboot: a guest that starts again has its files opened again"),
        (("--map", "x.svg"), "--confine on with --map"),
        (("--trace", "x"), "--confine on with --trace"),
    ],
)
def test_what_a_confined_run_cannot_do_is_refused(words: tuple[str, ...], why: str) -> None:
    done = started("run", "--confine", "on", *words, "payload:hello")
    assert done.returncode == 2
    assert why in done.stderr
    assert "hint: --confine off" in done.stderr


def test_a_kernel_without_landlock_is_told_of() -> None:
    hook = (
        "import pyvmm.session.confinement as c\n"
        "def restrict(*_, **__): raise OSError(95, 'Operation not supported')\n"
        "c.landlock.restrict = restrict\n"
    )
    done = started("run", "--confine", "on", "payload:hello", hook=hook)
    assert "confined_without_landlock" in done.stderr
    assert "ENOTTY" in done.stderr
    assert "confined_without_landlock" not in started("run", "--confine", "on", "payload:hello").stderr or (
        not landlock_is_there()
    )


def test_a_kernel_without_filters_ends_the_run_before_its_guest() -> None:
    hook = (
        "import pyvmm.confine.kernel as k\ncall = k.call\n"
        "def no(name, *rest):\n"
        "    if name == 'seccomp': raise OSError(22, 'Invalid argument')\n"
        "    return call(name, *rest)\n"
        "k.call = no\n"
    )
    done = started("run", "--confine", "on", "payload:hello", hook=hook)
    assert done.returncode == 5, done
    assert "system calls cannot be filtered: Invalid argument" in done.stderr
    assert "CONFIG_SECCOMP_FILTER" in done.stderr
