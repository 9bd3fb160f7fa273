# SPDX-License-Identifier: Apache-2.0
"""The options of consoles, sockets and balloons: how they combine, and which are refused before anything runs."""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pyvmm.cli import make_parser
from pyvmm.devices.kinds.balloon import Balloon
from pyvmm.devices.kinds.console import Console
from pyvmm.devices.kinds.vsock import Vsock
from pyvmm.devices.roles import Terminal
from pyvmm.errors import UsageError
from pyvmm.machine.plan import Plan
from pyvmm.options.consoles import places, terminal_size
from pyvmm.options.devices import device_specs
from pyvmm.options.machine import check_options, machine_config
from pyvmm.session import consoles


def parse(*words: str) -> argparse.Namespace:
    return make_parser(["run", *words]).parse_args(["run", *words])


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        ([], ("stdio", "none")),
        (["--console", "stdio"], ("none", "stdio")),
        (["--console", "file=/x"], ("stdio", "file=/x")),
        (["--console", "none", "--serial", "none"], ("none", "none")),
        (["--console", "stdio", "--serial", "file=/x"], ("file=/x", "stdio")),
    ],
)
def test_only_one_of_two_consoles_has_stdio(words: list[str], wanted: tuple[str, str]) -> None:
    assert places(parse(*words, "k")) == wanted


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["--console", "stdio", "--serial", "stdio"], "only one"),
        (["--console", "file=/x", "--serial", "file=/x"], "only one"),
        (["--console", "pty"], "expected stdio"),
        (["--serial", "file="], "expected stdio"),
        (["--pkvm", "--balloon", "0"], "pins"),
        (["--protection", "emulated", "--balloon", "0"], "rings in private memory"),
        (["--backing", "hugetlb", "--balloon", "0"], "only parts of huge ones"),
        (["--balloon", "65M"], "the guest has 0x4000000"),
        (["--vsock", "uds=x,cid=2"], "cid 2"),
    ],
)
def test_invalid_combinations_are_refused(words: list[str], why: str) -> None:
    with pytest.raises(UsageError, match=why):
        check_options(parse(*words, "payload:hello"))


@pytest.mark.parametrize(
    ("text", "why"), [("uds=x", "lacks cid"), ("cid=3", "lacks uds"), ("uds=x,cid=3,port=1", "known are")]
)
def test_vsock_needs_both_of_its_parts_and_accepts_no_other(
    text: str, why: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        parse("--vsock", text, "k")
    assert why in capsys.readouterr().err


def test_devices_are_as_requested() -> None:
    words = ["--console", "stdio", "--vsock", "uds=v,cid=7", "--balloon", "8M"]
    specs = device_specs(parse(*words, "k"), (1, None))
    assert [spec for spec in specs if not isinstance(spec, Console)] == [Vsock("v", 7), Balloon(8 << 20)]
    [console] = [spec for spec in specs if isinstance(spec, Console)]
    assert (console.out, console.source) == (1, None)


def test_plan_does_not_listen_at_a_path(tmp_path: Path) -> None:
    path = tmp_path / "v"
    args = parse("--vsock", f"uds={path},cid=3", "--balloon", "0", "payload:hello")
    with Plan(machine_config(args)) as plan:
        assert not path.exists()
        assert "vsock0" in "\n".join(plan.lines())


def test_files_are_opened_and_closed_and_the_error_names_one_that_cannot_be_opened(tmp_path: Path) -> None:
    with contextlib.ExitStack() as stack:
        out, source = consoles.open_place(f"file={tmp_path}/out", stack, 1)
        assert out is not None
        assert source is None
        os.write(out, b"x")
        assert terminal_size(out) is None
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(out)
    with contextlib.ExitStack() as stack:
        out, _ = consoles.open_place(f"file={tmp_path}/out", stack, 1, keep=True)
        assert out is not None
        os.write(out, b"y")
    assert (tmp_path / "out").read_bytes() == b"xy"
    with contextlib.ExitStack() as stack:
        consoles.open_place(f"file={tmp_path}/out", stack, 1)
    assert (tmp_path / "out").read_bytes() == b""
    with contextlib.ExitStack() as stack, pytest.raises(UsageError, match="cannot be written"):
        consoles.open_place(f"file={tmp_path}", stack, 1)


def test_the_guest_hears_of_new_terminal_sizes_until_the_run_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[tuple[int, int]] = []
    terminal = SimpleNamespace(resize=lambda *size: told.append(size))
    machine: Any = SimpleNamespace(role=lambda kind: (terminal,) if kind is Terminal else ())
    monkeypatch.setattr(consoles, "terminal_size", lambda _out: (120, 40))
    threads = threading.active_count()
    with consoles.following_size(machine, 1):
        os.kill(os.getpid(), signal.SIGWINCH)
        end = time.monotonic() + 20
        while not told and time.monotonic() < end:
            time.sleep(0.001)
    assert told == [(120, 40)]
    assert threading.active_count() == threads
    os.kill(os.getpid(), signal.SIGWINCH)
    assert told == [(120, 40)]
