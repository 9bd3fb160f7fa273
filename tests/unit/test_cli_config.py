# SPDX-License-Identifier: Apache-2.0
"""Options from a file: what it may contain, how the command line overrides it, and which errors name which line."""

from __future__ import annotations

import argparse
import ast
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import pyvmm
from pyvmm import cli
from pyvmm.cli import make_parser
from pyvmm.cli.run import TABLE
from pyvmm.errors import UsageError
from pyvmm.memory.choices import BACKINGS
from pyvmm.options.file import OptionsFile, read
from pyvmm.options.table import Table
from pyvmm.options.written import as_toml
from pyvmm.protection import PROTECTIONS
from pyvmm.syntax.option import SEVERAL, Option
from pyvmm.syntax.paths import find_outputs

EXAMPLE = """\
# what a guest is to be
kernel = "payload:echo"
mem = 256
params = [
  "a=1",   # protection = "pkvm"
  '''
conversion = "x"''',
]
protection = "emulated"
prefault = true
"""


def parse(*words: str) -> argparse.Namespace:
    return make_parser(words).parse_args(words)


def applied(text: str, folder: Path, *words: str) -> argparse.Namespace:
    """Return the options of a file and a command line."""
    path = folder / "vm.toml"
    path.write_text(text)
    line = ["run", "--config", str(path), *words]
    return cli.with_file(line, parse(*line))[1]


def plain(args: argparse.Namespace) -> dict[str, Any]:
    return {key: value for key, value in vars(args).items() if key not in ("verb_argv", "config", "print_config")}


def test_a_file_sets_the_same_options_as_the_command_line(tmp_path: Path) -> None:
    words = ("-m", "256", "-p", "a=1", "-p", 'conversion = "x"', "--protection", "emulated", "--prefault")
    assert plain(applied(EXAMPLE, tmp_path)) == plain(parse("run", *words, "-k", "payload:echo"))


def test_the_command_line_overrides_the_file_also_for_lists_and_other_spellings(tmp_path: Path) -> None:
    args = applied(EXAMPLE, tmp_path, "--pkvm", "-p", "z", "-c", "2", "payload:hello")
    assert (args.protection, args.params, args.cpus, args.mem) == ("pkvm", ["z"], 2, (256 << 20, None))
    assert (args.kernel, args.kernel_option) == ("payload:hello", None)


def test_the_lab_uses_a_files_options_which_are_sent_as_words(tmp_path: Path) -> None:
    path = tmp_path / "vm.toml"
    path.write_text('map = "a.svg"\nkernel = "payload:hello"\n')
    line = ["--lab", "-v", "run", f"--config={path}", "-c", "2"]
    _, args = cli.with_file(line, parse(*line))
    assert args.verb_argv == ["run", "--map=a.svg", "--kernel=payload:hello", "-c", "2"]
    assert find_outputs(args) == ["a.svg"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("cpus = 2\n\ncpu = 3\n", "line 3: cpu is not an option of pyvmm run"),
        ("config = 'x'", "line 1: config is not an option"),
        ("params = [\n'''a\ncpus = 4\n''']\n[cpus]\nx = 1\n", r"line 5: cpus: 'x=1' is not a count"),
        ("cpus = 0", "line 1: cpus: '0' is not a count"),
        ("cpus = true", "line 1: cpus: this option needs a value, not true"),
        ("cpus = [1, 2]", "line 1: cpus: this option may be given only once"),
        ("backing = 'memfd'\nprefault = 'yes'", "line 2: prefault: this option has no value"),
        ("\nbacking = 'paper'", "line 2: backing: 'paper' is not one of memfd,"),
        ("deadline = 1979-05-27", "line 1: deadline: no option takes a date"),
        ("protection = 'none'\n\npkvm = true\n", "line 3: pkvm contradicts protection of line 1"),
        ("params = 'a'\nappend = 'b'\n", "line 2: append contradicts params of line 1"),
        ("mem = 64\nmem = 65\n", r"not TOML.*line 2"),
        ("mem = [", "not TOML"),
        ("protection = 'none'\n\nconversion = 'zero'\n", r"conversion \(line 3\): .*policy zero with protection none"),
        ("cpus = 1000\n", r"cpus \(line 1\): 1000 vCPUs"),
        ("reboot = true\n\ngdb = 'x'\n", r"reboot \(line 1\) and gdb \(line 3\): --reboot with --gdb"),
        ("[net]\ntap = 't0'\nhost = '10.0.0.1'\n", r"net\.host \(line 3\): '10.0.0.1' is not an IPv4 address"),
        ("[net]\ntap = 't0'\nmtu = 9000\n", r"line 3: net: 'mtu' in 'tap=t0,mtu=9000' is not known"),
        ("net = [\n  {tap = 't0'},  # a = 1\n\n  {tap = 't1', mtu = 9},\n]", "line 4: net: 'mtu' in .* is not known"),
        ("rng = true\nnet.passt = true\nnet.mtu = 1\n", "line 3: net: 'mtu' in"),
        ("[[disk]]\npath = 'a'\n\n[[disk]]\nreadonly = true\n", "line 5: disk: 'readonly' in 'readonly' is not known"),
        ("[[disk]]\nreadonly = true\npath = 'a'\n", "line 2: disk: 'readonly' in 'readonly' is not known"),
        ("disk = [\n'a,ro',\n'b,readonly']\n", "line 3: disk: 'readonly' in"),
        ("[[disk]]\npath = 'a'\n[disk.x]\ny = 1\n", "line 3: disk: x: {'y': 1} contains a comma"),
        ("[[disk]]\npath = 'a'\n[[disk]]\npath = 'b'\nqueues = 17\n", r"disk\.queues \(line 5\): .*17 queues"),
        ("[[disk]]\npath = 'a'\n[[disk]]\npath = 'a'\n", r"disk \(line 1\) and disk \(line 3\): .*given 2 times"),
        ("trace-el2 = true\n", r"trace-el2 \(line 1\): .* --trace is missing"),
    ],
)
def test_invalid_content_is_refused_with_its_key_and_line(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        applied(text, tmp_path, "payload:hello")


def test_the_error_for_a_misspelt_key_names_the_nearest_option(tmp_path: Path) -> None:
    with pytest.raises(UsageError) as refused:
        applied("protecton = 'pkvm'", tmp_path)
    assert refused.value.hint == "did you mean protection?"


def test_a_contradiction_of_file_and_command_line_names_the_key_in_the_file(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"vm.toml: conversion \(line 2\): .* with protection pkvm"):
        applied("# one\nconversion = 'zero'\n", tmp_path, "--pkvm", "payload:hello")


def test_an_error_names_every_key_that_contributes_to_it(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"pkvm \(line 1\) and conversion \(line 2\): .* with protection pkvm"):
        applied("pkvm = true\nconversion = 'zero'\n", tmp_path, "payload:hello")


def test_an_error_does_not_name_a_key_without_effect(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"vm\.toml: conversion \(line 2\): .* with protection none"):
        applied("pkvm = false\nconversion = 'zero'\n", tmp_path, "payload:hello")


def test_errors_of_the_command_line_alone_are_left_to_the_run(tmp_path: Path) -> None:
    assert applied("prefault = true\n", tmp_path, "-c", "1000", "payload:hello").cpus == 1000


@pytest.mark.parametrize("lines", [1, 8])
def test_a_wrong_file_is_not_parsed_once_for_each_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lines: int
) -> None:
    parsed: list[object] = []
    parse_known_args = argparse.ArgumentParser.parse_known_args

    def count(parser: argparse.ArgumentParser, *args: Any, **keywords: Any) -> Any:
        parsed.append(parser.prog)
        return parse_known_args(parser, *args, **keywords)

    monkeypatch.setattr(argparse.ArgumentParser, "parse_known_args", count)
    disks = "".join(f"[[disk]]\npath = '{number}'\nqueues = 17\n" for number in range(lines))
    with pytest.raises(UsageError, match=r"disk\.queues \(line 3\)"):
        applied(disks, tmp_path, "payload:hello")
    # Parsed are: the command line without and with the file's words, the verb's part each time, and the text once.
    assert len(parsed) == 5


@pytest.mark.parametrize("what", ["missing", "directory", "binary"])
def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path, what: str) -> None:
    path = tmp_path if what == "directory" else tmp_path / what
    if what == "binary":
        path.write_bytes(b"\xff\xfe")
    with pytest.raises(UsageError, match="--config"):
        read(str(path))


def test_a_file_can_switch_options_on_and_off(tmp_path: Path) -> None:
    said = [
        applied(text, tmp_path, *words, "payload:hello").rng
        for text, words in (
            ("rng = true", ()),
            ("rng = false", ()),
            ("rng = true", ("--no-rng",)),
            ("rng = false", ("--rng",)),
            ("no-rng = true", ()),
            ("no-rng = false", ("--rng",)),
            ("no-rng = true", ("--rng",)),
            ("no-rng = false\nrng = true", ()),
        )
    ]
    assert said == [True, False, False, True, False, True, True, True]


def test_a_switch_and_its_opposite_contradict_each_other(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="line 2: no-rng contradicts rng of line 1"):
        applied("rng = true\nno-rng = true\n", tmp_path, "payload:hello")


@pytest.mark.parametrize("package", ["options", "syntax"])
def test_the_code_uses_nothing_private_of_argparse(package: str) -> None:
    private = {name for each in (argparse, argparse.ArgumentParser) for name in dir(each) if name.startswith("_")}
    private |= {"_defaults", "_actions", "_group_actions", "_mutually_exclusive_groups"}
    for path in (Path(pyvmm.__file__).parent / package).glob("*.py"):
        used = {node.attr for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute)}
        assert not {name for name in used & private if not name.endswith("__")}, path.name


# -- options with parts


def disk(text: str) -> str:
    if "path=" not in text:
        raise argparse.ArgumentTypeError("a disk needs a path")
    return text


def expanded(text: str, folder: Path) -> list[str]:
    """Return the words for a verb with one repeatable option of key=value parts."""
    path = folder / "vm.toml"
    path.write_text(text)
    table = Table([Option("--disk", type=disk, takes=SEVERAL, help="")], lambda _parser: None)
    return OptionsFile(str(path), read(str(path)), table, "run").put_before([])


def test_tables_in_a_file_are_the_parts_of_an_option(tmp_path: Path) -> None:
    text = "[[disk]]\npath = 'a b'\nro = true\nqueues = 2\nsync = false\n[[disk]]\npath = 'c'\n"
    assert expanded(text, tmp_path) == ["--disk=path=a b,ro,queues=2", "--disk=path=c"]
    assert expanded("disk = [{path = 'a'}, 'path=b,ro']", tmp_path) == ["--disk=path=a", "--disk=path=b,ro"]
    assert expanded("disk.path = 'a'\n", tmp_path) == ["--disk=path=a"]


def test_a_wrong_table_is_refused_with_the_line_of_its_header_or_of_the_wrong_key(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"line 4: disk: a disk needs a path"):
        expanded("[[disk]]\npath = 'a'\n\n[[disk]]\nro = true\n", tmp_path)
    with pytest.raises(UsageError, match=r"line 2: disk: path: 'a,b' contains a comma"):
        expanded("[[disk]]\npath = 'a,b'\n", tmp_path)


# -- from options to a file


OPTIONS = st.fixed_dictionaries(
    {},
    optional={
        "-m": st.integers(4, 1 << 20).map(str) | st.just("1G@0x80000000"),
        "-c": st.integers(1, 16).map(str),
        "--backing": st.sampled_from(BACKINGS),
        "--protection": st.sampled_from(PROTECTIONS),
        "--deadline": st.floats(0.1, 1e6).map(str) | st.just("10"),
        "--initrd": st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1),
        "--map": st.just("a.svg"),
        "--disk": st.just("root.img,ro,queues=2"),
        "--vsock": st.just("uds=a.sock,cid=3"),
    },
)


@settings(max_examples=40, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])
@given(OPTIONS, st.lists(st.text(st.characters(exclude_categories=["Cs"])), max_size=3), st.booleans())
def test_the_printed_configuration_reads_back_as_the_same_options(
    options: dict[str, str], params: list[str], prefault: bool
) -> None:
    words = [f"{option}={text}" if option.startswith("--") else f"{option}{text}" for option, text in options.items()]
    words += [f"--params={text}" for text in params] + ["--prefault"] * prefault
    before = parse("run", *words, "payload:hello")
    printed = as_toml(before, TABLE)
    fd = os.memfd_create("config")
    with open(fd, "w") as file:
        file.write(printed)
        file.flush()
        line = ["run", "--config", f"/proc/self/fd/{fd}"]
        # Options need not make sense together here.
        words = OptionsFile.of(parse(*line), TABLE).put_before(line[1:])
        after = parse("run", *words)
    assert plain(after) == {**plain(before), "kernel": None, "kernel_option": "payload:hello"}
    assert as_toml(after, TABLE) == printed


def test_the_configuration_in_effect_is_printed_and_nothing_runs(tmp_path: Path) -> None:
    path = tmp_path / "vm.toml"
    path.write_text(EXAMPLE)
    command = [sys.executable, "-m", "pyvmm", "run", "--config", str(path), "-c", "3", "--print-config"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    said = [
        'kernel = "payload:echo"',
        'params = ["a=1", "conversion = \\"x\\""]',
        "mem = 256",
        "cpus = 3",
        "prefault = true",
        'protection = "emulated"',
    ]
    assert [line for line in done.stdout.splitlines() if line in said] == said, done.stdout
