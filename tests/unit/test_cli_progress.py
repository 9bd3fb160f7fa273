# SPDX-License-Identifier: Apache-2.0
"""The progress line of slow verbs."""

from __future__ import annotations

import io

import pytest

from pyvmm.cli.progress import terminal_line


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_the_progress_line_on_a_terminal_is_replaced_and_finally_erased(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    with terminal_line() as show:
        assert show is not None
        show("1 of 2")
        show("2 of 2")
    assert terminal.getvalue() == "\r\x1b[K1 of 2\r\x1b[K2 of 2\r\x1b[K"


def test_only_terminals_get_a_progress_line(monkeypatch: pytest.MonkeyPatch) -> None:
    file = io.StringIO()
    monkeypatch.setattr("sys.stderr", file)
    with terminal_line() as show:
        assert show is None
    assert file.getvalue() == ""
