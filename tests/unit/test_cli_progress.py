# SPDX-License-Identifier: Apache-2.0
"""The line of progress of verbs that take long."""

from __future__ import annotations

import io

import pytest

from pyvmm.cli.progress import terminal_line


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminals_line_is_replaced_and_gone_in_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    with terminal_line() as show:
        assert show is not None
        show("1 of 2")
        show("2 of 2")
    assert terminal.getvalue() == "\r\x1b[K1 of 2\r\x1b[K2 of 2\r\x1b[K"


def test_elsewhere_there_is_no_line(monkeypatch: pytest.MonkeyPatch) -> None:
    file = io.StringIO()
    monkeypatch.setattr("sys.stderr", file)
    with terminal_line() as show:
        assert show is None
    assert file.getvalue() == ""
