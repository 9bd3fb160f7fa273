# SPDX-License-Identifier: Apache-2.0
"""JSON and TOML of strangers: refused at once where it nests too deeply, by every command that reads a file."""

from __future__ import annotations

import json
import time
import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyvmm.cli import main
from pyvmm.options.entries import parse
from pyvmm.syntax.foreign import load_json, load_toml
from pyvmm.syntax.toml import MOST_DEEP, check_depth, statements

MANY = 100_000
SOON = 5.0
"""Seconds of CPU time that a refusal may take: it took 20, or the stack."""

DEEP_JSON = {"lists": "[" * MANY, "objects": '{"a":' * MANY, "closed": "[" * MANY + "]" * MANY}
DEEP_TOML = {
    "lists": "a = " + "[" * MANY,
    "closed": "a = " + "[" * MANY + "]" * MANY,
    "tables": "a = " + "{b = " * MANY,
    "key": ".".join("a" * 20_000) + " = 1",
    "quoted key": " . ".join(['"a"'] * 20_000) + " = 1",
    "header": f"[{'.'.join('a' * 20_000)}]",
    "headers": f"[[{'.'.join('a' * 20_000)}]]",
    "inside": "[case]\na = {" + ".".join("a" * 20_000) + " = 1}",
}
REFUSED = "it nests too deeply"


@pytest.mark.parametrize("text", DEEP_JSON.values(), ids=DEEP_JSON)
def test_json_that_nests_deeply_is_a_value_error(text: str) -> None:
    with pytest.raises(ValueError, match=REFUSED):
        load_json(text)


@pytest.mark.parametrize("text", DEEP_TOML.values(), ids=DEEP_TOML)
def test_toml_that_nests_deeply_is_a_value_error_and_soon(text: str) -> None:
    began = time.process_time()
    with pytest.raises(ValueError, match=REFUSED):
        load_toml(text)
    assert time.process_time() - began < SOON


def refused(capsys: pytest.CaptureFixture[str], *words: str | Path) -> str:
    """Run a command that must refuse its file, and return what it says."""
    began = time.process_time()
    assert main([str(word) for word in words]) == 2
    assert time.process_time() - began < SOON
    said = capsys.readouterr().err
    assert REFUSED in said
    assert "bug" not in said
    return said


@pytest.mark.parametrize("text", DEEP_JSON.values(), ids=DEEP_JSON)
@pytest.mark.parametrize("words", [("atlas", "diff"), ("bench", "compare"), ("bench", "report")], ids=" ".join)
def test_a_report_that_nests_deeply_is_refused_with_status_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: tuple[str, ...], text: str
) -> None:
    file = tmp_path / "results.json"
    file.write_text(f"{text}\n\n")
    refused(capsys, *words, file, *([file] if words[1] != "report" else []))


def test_a_bench_report_in_html_that_nests_deeply_is_refused_with_status_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "results.html"
    file.write_text(f'<script type="application/json" id="_data">{"[" * MANY}</script>')
    refused(capsys, "bench", "compare", file, file)


@pytest.mark.parametrize("text", DEEP_TOML.values(), ids=DEEP_TOML)
def test_an_options_file_and_a_sweep_that_nest_deeply_are_refused_with_status_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str
) -> None:
    file = tmp_path / "file.toml"
    file.write_text(text)
    refused(capsys, "run", "--config", file, "payload:hello")
    refused(capsys, "bench", "sweep", file)


def test_options_of_many_lines_are_read_in_a_time_that_grows_with_them() -> None:
    began = time.process_time()
    [entry] = parse("params = [\n" + "'a b',\n" * 5000 + "]\n")
    assert entry.lines == tuple(range(2, 5002))
    [entry] = parse('a = """\n' + "x.y = [\n" * 20_000 + '"""\n')
    assert entry.lines == (1,)
    assert time.process_time() - began < SOON


@pytest.mark.parametrize(
    "text",
    [
        "a = " + "[" * MOST_DEEP + "]" * MOST_DEEP,
        ".".join("a" * MOST_DEEP) + " = 1",
        "a = [" + "1.5, " * 1000 + "]",
        "a = '" + "." * 1000 + "[" * 1000 + "'",
        "# " + "a." * 1000 + "[" * 1000,
        'a = "' + '\\"[' * 1000 + '"',
        "a = '''\n" + "''[\n" * 1000 + "'''''\n",
        "a.b = 1.5\n" * 1 + "\n".join(f"c{n}.d = 1.5" for n in range(1000)),
    ],
)
def test_what_only_looks_deep_is_taken(text: str) -> None:
    assert load_toml(text) == tomllib.loads(text)


SPACE = st.sampled_from(["", " ", "\t", "  # a = [ ' \" ,\n", "\n", "\r\n", " \n\n"])
BLANK = st.sampled_from(["", " ", "\t"])
SCALAR = st.sampled_from(
    ["1", "-1.5e3", "true", "1979-05-27T07:32:00Z", '"x"', "'#['", '"\\"\\\\"', '"""a\n"" [\\\n"""""', "'''\n''\\'''''"]
)


@st.composite
def array(draw: st.DrawFn, values: st.SearchStrategy[str]) -> str:
    each = draw(st.lists(values, max_size=4))
    return "[" + ",".join(draw(SPACE) + value + draw(SPACE) for value in each) + draw(SPACE) + "]"


@st.composite
def table(draw: st.DrawFn, values: st.SearchStrategy[str]) -> str:
    each = draw(st.lists(values, max_size=3))
    return "{" + ", ".join(f"k{n}{draw(BLANK)}={draw(BLANK)}{value}" for n, value in enumerate(each)) + "}"


VALUE = st.recursive(SCALAR, lambda values: array(values) | table(values), max_leaves=8)
KEY = st.sampled_from(["a", '"b.c"', "'d = ['", "e.f", 'g."h i"', "e . k"])


@given(st.lists(st.tuples(st.sampled_from(["", "[t]\n", "[[t]]\n", "# c\n"]), KEY, VALUE), max_size=5))
def test_statements_are_those_of_tomllib(pieces: list[tuple[str, str, str]]) -> None:
    text = "".join(f"{head}k{n}.{key} = {value}\n" for n, (head, key, value) in enumerate(pieces))
    try:
        whole = tomllib.loads(text)
    except tomllib.TOMLDecodeError:  # [t] twice
        return
    found = list(statements(text))
    for statement in found:
        assert tomllib.loads(statement.text)
        assert text.split("\n")[statement.line - 1] in statement.text.split("\n")
    headers = [head.strip() for head, _, _ in pieces if head.startswith("[")]
    assert [statement.text for statement in found if statement.is_header] == headers
    assert [entry.key for entry in parse(text)] == list(whole)


@given(st.lists(st.text(st.sampled_from("\"'[]{}=,.#\n a\\"), max_size=30)))
def test_any_text_is_read_or_refused(lines: list[str]) -> None:
    text = "\n".join(lines)
    check_depth(text)
    try:
        whole: dict[str, Any] | None = tomllib.loads(text)
    except tomllib.TOMLDecodeError:
        whole = None
    if whole is None:
        with pytest.raises(ValueError, match=r"line|end of document"):
            parse(text)
    else:
        assert {entry.key: entry.value for entry in parse(text)} == whole


def test_json_that_is_not_deep_is_read() -> None:
    value = {"a": [[1.5, None, "x"]] * 10}
    assert load_json(json.dumps(value)) == value
    assert load_json(json.dumps(value).encode()) == value
