# SPDX-License-Identifier: Apache-2.0
"""The kernel holds to what pyvmm.confine asks of it: from inside a confined process, each forbidden act is refused."""

from __future__ import annotations

import errno
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest

from pyvmm.confine import filter as seccomp
from pyvmm.confine import landlock
from pyvmm.confine.rules import RULES
from pyvmm.uapi.unistd import MACHINES
from tests.unit import confined

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]

if os.uname().machine not in MACHINES:
    pytest.skip("there are no rules for this machine", allow_module_level=True)

USERS = ["root", "nobody"] if os.geteuid() == 0 else ["self"]


def version() -> int:
    try:
        return landlock.version()
    except OSError:
        return 0


needs_seccomp = pytest.mark.skipif(not seccomp.available(), reason="this kernel filters no system calls")
needs_landlock = pytest.mark.skipif(not version(), reason="this kernel has no Landlock, or lsm= turns it off")


@pytest.fixture(params=USERS)
def user(request: pytest.FixtureRequest) -> str:
    return str(request.param)


class Place:
    """A directory that everybody may use, with what the acts need."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        directory.chmod(0o777)
        (directory / "ours").mkdir()
        (directory / "ours").chmod(0o777)
        for name in ("secret", "open", "ours/socket"):
            (directory / name).write_text("text")
            (directory / name).chmod(0o666)
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(str(directory / "listening"))
        (directory / "listening").chmod(0o777)
        self.listener.listen()

    def tried(self, walls: str, user: str, *parts: str) -> dict[str, Any]:
        done = subprocess.run(
            [sys.executable, str(HERE / "confined.py"), walls, user, str(self.directory), *parts],
            capture_output=True,
            check=False,
            timeout=120,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
        )
        assert done.returncode == 0, done.stderr.decode()
        report: dict[str, Any] = json.loads(done.stdout)
        report["fields"] = dict(line.split(":\t", 1) for line in report["status"].splitlines() if ":\t" in line)
        return report


@pytest.fixture
def place() -> Iterator[Place]:
    # Not tmp_path, which others cannot enter.
    with TemporaryDirectory(prefix="pyvmm-confined-") as directory:
        made = Place(Path(directory))
        yield made
        made.listener.close()


@needs_seccomp
def test_every_forbidden_act_is_refused(place: Place, user: str) -> None:
    report = place.tried("caps,seccomp", user)
    assert {name: code for name, code in report["forbidden"].items() if code != errno.EPERM} == {}
    assert len(report["forbidden"]) > 50
    assert {name: code for name, code in report["allowed"].items() if code} == {}
    assert len(report["allowed"]) == 10


@needs_seccomp
def test_a_thread_that_is_older_is_filtered_too(place: Place, user: str) -> None:
    assert place.tried("seccomp", user)["elder"] == errno.EPERM


def test_the_acts_mean_something(place: Place, user: str) -> None:
    # Without walls, what an ordinary process may do works.
    report = place.tried("none", user)
    works = ["open to read", "open to write", "open a directory", "make a file", "connect", "bind", "fork"]
    works += ["an internet socket", "a unix socket", "mmap with PROT_EXEC", "mprotect with PROT_EXEC"]
    works += ["prctl that makes memory readable"]
    assert {name: report["forbidden"][name] for name in works} == dict.fromkeys(works, 0)
    assert report["elder"] == 0
    assert report["remove another"] == 0


@needs_seccomp
def test_a_vsock_may_connect_to_unix_sockets_only(place: Place, user: str) -> None:
    report = place.tried("seccomp", user, "vsock")["forbidden"]
    assert (report["a unix socket"], report["connect"]) == (0, 0)
    assert report["an internet socket"] == errno.EPERM
    assert report["bind"] == errno.EPERM


@needs_seccomp
def test_the_kernel_tells_of_the_filter(place: Place, user: str) -> None:
    fields = place.tried("caps,seccomp", user)["fields"]
    assert fields["Seccomp"] == "2"
    assert fields["NoNewPrivs"] == "1"
    assert [int(fields[name], 16) for name in ("CapEff", "CapPrm", "CapInh", "CapAmb")] == [0, 0, 0, 0]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root has capabilities to keep")
def test_only_the_right_to_lock_memory_can_be_kept(place: Place) -> None:
    fields = place.tried("caps,lock", "root")["fields"]
    assert int(fields["CapEff"], 16) == int(fields["CapPrm"], 16) == 1 << 14
    assert int(place.tried("caps,lock", "nobody")["fields"]["CapEff"], 16) == 0


@needs_landlock
def test_landlock_alone_refuses_files(place: Place, user: str) -> None:
    report = place.tried("landlock", user)
    files = ["open to read", "open to write", "open a directory", "make a file", "execve", "bind"]
    assert {name: report["forbidden"][name] for name in files} == dict.fromkeys(files, errno.EACCES)
    if report["abi"] >= 6:
        assert report["forbidden"]["kill another process"] == errno.EPERM
    if report["abi"] >= landlock.FIRST_WITH_UNIX:
        assert report["forbidden"]["connect"] == errno.EACCES
    # What is open stays open, and what was named may still be removed.
    assert {name: code for name, code in report["allowed"].items() if code} == {}
    assert report["remove ours"] == 0
    assert report["remove another"] == errno.EACCES


@needs_landlock
@needs_seccomp
def test_both_walls_let_a_run_remove_its_sockets_only(place: Place, user: str) -> None:
    report = place.tried("caps,landlock,seccomp", user)
    assert report["remove ours"] == 0
    assert report["remove another"] == errno.EACCES
    assert set(report["forbidden"].values()) == {errno.EPERM}


def test_each_act_without_a_rule_is_named_once() -> None:
    assert not set(confined.OTHERS) & {rule.call for rule in RULES}
