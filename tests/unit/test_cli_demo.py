# SPDX-License-Identifier: Apache-2.0
"""The demo: where it runs, and that it never reports a false fact as true."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest

from pyvmm import cli
from pyvmm.cli import demo
from pyvmm.experiment.story import Step, Story, text


def machine(name: str) -> Callable[..., Any]:
    return lambda: os.uname_result(("Linux", "h", "7.3", "v", name))


def test_the_demo_runs_in_the_lab_if_the_host_is_not_a_pkvm_host(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[str]] = []

    def run_verb(argv: list[str], _args: object) -> int:
        seen.append(argv)
        return 1

    monkeypatch.setattr(os, "uname", machine("x86_64"))
    monkeypatch.setattr("pyvmm.cli.lab.run_verb", run_verb)
    assert cli.main(["demo"]) == 1
    assert seen == [["demo", "--here", "--protection", "pkvm"]]


@pytest.mark.parametrize("protected", [True, False])
def test_the_demo_runs_on_an_arm64_host_itself_only_with_pkvm(monkeypatch: pytest.MonkeyPatch, protected: bool) -> None:
    class System:
        def __enter__(self) -> Any:
            return self

        def __exit__(self, *_: object) -> None:
            return None

        def supports_protected(self) -> bool:
            return protected

    monkeypatch.setattr(os, "uname", machine("aarch64"))
    monkeypatch.setattr("pyvmm.kvm.system.System.open", System)
    assert demo.runs_protected_guests() is protected


def told(monkeypatch: pytest.MonkeyPatch, *facts: tuple[bool, str]) -> int:
    def tell(self: Story) -> str:
        with self._step("Something happens"):
            for fact in facts:
                self._fact(*fact)
        return "3 exits"

    monkeypatch.setattr(Story, "tell", tell)
    monkeypatch.setattr("pyvmm._native_source.require_fresh_native", lambda: None)
    return cli.main(["demo", "--here"])


def test_a_demo_with_all_facts_right_exits_0(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert told(monkeypatch, (True, "VmLck 8 kB")) == 0
    out, err = capsys.readouterr()
    assert "1. Something happens\n   ok  VmLck 8 kB\n" in out
    assert out.endswith("Every step was as it should be.\n")
    assert err == "pyvmm: 3 exits\n"


def test_one_wrong_fact_is_marked_and_exits_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert told(monkeypatch, (True, "VmLck 8 kB"), (False, "the secret is still there")) == 1
    out = capsys.readouterr().out
    assert "   ok  VmLck 8 kB\n   NO  the secret is still there\n" in out
    assert "Not every step was as it should be" in out


def test_a_long_fact_is_wrapped_under_itself() -> None:
    lines = demo.lines(2, Step("A step", [(True, "word " * 30)]), colours=False)
    assert lines[0] == "2. A step"
    assert all(len(line) <= 100 for line in lines)
    assert lines[2].startswith("       word")


def test_only_terminals_get_colours() -> None:
    step = Step("A step", [(True, "good"), (False, "bad")])
    assert "\x1b" in "".join(demo.lines(1, step, colours=True))
    assert "\x1b" not in "".join(demo.lines(1, step, colours=False))


def test_all_guest_bytes_are_quoted() -> None:
    assert text(b"hello....") == '"hello"'
    assert text(b"\xff\x00") == '"\\xff\\x00"'
