# SPDX-License-Identifier: Apache-2.0
"""The live map: output scrolls above it, complete and in order. Files are written at the end or not at all."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyvmm.errors import UsageError
from pyvmm.observe.pagemap import PageMap
from pyvmm.session.outputfile import OutputFile
from pyvmm.session.screen import Screen

MAP = ["map 1", "map 2"]


class Terminal:
    """A fake terminal with the functions that the screen uses, of unlimited length."""

    def __init__(self) -> None:
        self.lines = [""]
        self.row = self.column = 0

    def feed(self, text: str) -> None:
        for token in re.findall(r"\x1b\[\d*[A-Z]|[\r\n]|[^\x1b\r\n]+", text):
            match token:
                case "\r":
                    self.column = 0
                case "\n":
                    self.row, self.column = self.row + 1, 0
                    self.lines += [""] * (self.row + 1 - len(self.lines))
                case "\x1b[K":
                    self.lines[self.row] = self.lines[self.row][: self.column]
                case "\x1b[J":
                    self.lines[self.row] = self.lines[self.row][: self.column]
                    del self.lines[self.row + 1 :]
                case _ if token.startswith("\x1b["):
                    self.row -= int(token[2:-1])
                    assert self.row >= 0
                case _:
                    line = self.lines[self.row].ljust(self.column)
                    self.lines[self.row] = line[: self.column] + token + line[self.column + len(token) :]
                    self.column += len(token)


def screen(tmp: int = 0) -> Screen:
    return Screen(tmp, colour=False, shared=False)


def test_lines_go_above_the_map_and_an_unfinished_line_is_just_above_it() -> None:
    shown, terminal = screen(), Terminal()
    steps = [
        (b"", []),
        (b"one\ntw", ["one", "tw"]),
        (b"o\nthree", ["one", "two", "three"]),
        (b"\n", ["one", "two", "three"]),
        (b"50%\r60%", ["one", "two", "three", "60%"]),
        (b"\r\n\x1b[31m$ ", ["one", "two", "three", "60%", "[31m$ "]),
    ]
    for data, expected in steps:
        shown._pending += data
        terminal.feed(shown.frame(MAP, 40))
        assert terminal.lines == [*expected, *MAP, ""]


def test_unchanged_maps_write_nothing_and_a_shorter_map_erases_the_rest() -> None:
    shown, terminal = screen(), Terminal()
    terminal.feed(shown.frame(["long line", "b", "c"], 40))
    assert shown.frame(["long line", "b", "c"], 40) == ""
    terminal.feed(shown.frame(["short"], 40))
    assert terminal.lines == ["short", ""]


def test_a_prompt_wider_than_the_terminal_is_cut_until_it_ends() -> None:
    shown, terminal = screen(), Terminal()
    shown._pending = b"x" * 100
    terminal.feed(shown.frame(MAP, 10))
    assert terminal.lines == ["x" * 10, *MAP, ""]
    shown._pending = b"y\n"
    terminal.feed(shown.frame(MAP, 10))
    assert terminal.lines == ["x" * 100 + "y", *MAP, ""]


@given(st.lists(st.binary(max_size=12).map(lambda b: b.translate(None, b"\r\x1b")), max_size=12), st.data())
def test_all_output_is_written_in_order_whatever_it_is(pieces: list[bytes], data: st.DataObject) -> None:
    shown, terminal = screen(), Terminal()
    for piece in pieces:
        shown._pending += piece
        terminal.feed(shown.frame(MAP[: data.draw(st.integers(0, 2))], 1 << 20))
    terminal.feed(shown.frame([], 1 << 20))
    *whole, rest = b"".join(pieces).decode(errors="surrogateescape").split("\n")
    printable = "".join(filter(str.isprintable, rest))
    assert terminal.lines == [*whole, *([printable] if printable else []), ""]


def test_output_after_the_last_map_is_not_lost() -> None:
    read, write = os.pipe()
    with open(read, "rb") as out, open(write, "wb") as terminal:
        with Screen(terminal.fileno(), colour=False, shared=True) as shown:
            assert shown.console is not None
            os.write(shown.console, b"too late for the map\n")
        terminal.close()
        assert out.read() == b"too late for the map\n"


def test_a_flood_is_shown_before_more_is_read() -> None:
    with Screen(0, colour=False, shared=True) as shown:
        assert shown.console is not None
        taken = 0
        while taken < 1 << 20:
            taken += os.write(shown.console, b"x" * 4096)
            if not shown.take():
                break
        assert taken == 1 << 18
        shown._pending = b""


def test_a_map_of_no_memory_needs_no_terminal() -> None:
    primary, secondary = os.openpty()
    try:
        with Screen(secondary, colour=False, shared=False) as shown:
            shown.finish(PageMap())
        assert os.read(primary, 1000) == b"\rno guest memory\x1b[K\r\n\x1b[J"
    finally:
        os.close(primary)
        os.close(secondary)


# -- the picture's file


def test_a_picture_replaces_the_old_file_only_when_it_is_written(tmp_path: Path) -> None:
    file = tmp_path / "map.svg"
    file.write_text("an older and longer one")
    with OutputFile(str(file)) as picture:
        assert file.read_text() == "an older and longer one"
        picture.write("new")
    assert file.read_text() == "new"
    with OutputFile(str(file)):
        pass
    assert file.read_text() == "new"


def test_the_file_for_a_run_that_never_started_is_removed(tmp_path: Path) -> None:
    with OutputFile(str(tmp_path / "map.svg")):
        assert (tmp_path / "map.svg").exists()
    assert not (tmp_path / "map.svg").exists()


@pytest.mark.parametrize("name", ["nowhere/map.svg", ".", "a\0b"])
def test_a_file_that_cannot_be_written_is_refused_at_once(tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError, match="cannot be written"), OutputFile(f"{tmp_path}/{name}"):
        pytest.fail("not to be reached")


def test_a_picture_can_be_written_to_a_pipe() -> None:
    read, write = os.pipe()
    with open(read) as out:
        with open(write, "w"), OutputFile(f"/dev/fd/{write}") as picture:
            picture.write("text")
        assert out.read() == "text"
