# SPDX-License-Identifier: Apache-2.0
"""Starting is cheap: no third-party module but structlog and cffi's backend is loaded to parse a command line.

How many milliseconds that takes is for tests/bench/startup.py: a test of time would fail on a busy machine.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pyvmm.payloads import payload

ALLOWED = {"structlog", "_cffi_backend"}


def loaded(code: str) -> tuple[set[str], set[str]]:
    """Names of the top-level modules a fresh interpreter has loaded after ``code``, without its own and pyvmm's."""
    report = f"import sys\n{code}\nimport json; print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", report], capture_output=True, text=True, timeout=60, check=True)
    bare = subprocess.run([sys.executable, "-c", report.replace(code, "")], capture_output=True, text=True, check=True)
    new = set(json.loads(done.stdout.splitlines()[-1])) - set(json.loads(bare.stdout))
    names = {name.partition(".")[0] for name in new}
    return names, {name for name in names if name not in sys.stdlib_module_names} - {"pyvmm", "__mp_main__"}


def test_this_test_would_notice() -> None:
    assert loaded("import hypothesis")[1] >= {"hypothesis"}


def test_importing_pyvmm_loads_nothing_of_others() -> None:
    assert loaded("import pyvmm")[1] == set()


COMMANDS = [
    ["run", "--protection", "pkvm", "-m", "1G", "-c", "2", "-p", "a=1", "payload:hello"],
    ["demo"],
    ["doctor", "--json"],
    ["lab", "status"],
    ["atlas", "share", "--json", "a.json"],
    ["bench", "fault", "--quick", "--json", "a.jsonl"],
    ["bench", "sweep", "a.toml", "--labs", "2"],
    ["map", "payload:echo"],
    ["top", "--json", "123"],
    ["trace", "-o", "echo.pftrace", "payload:echo"],
    ["repl", "--protection", "pkvm"],
    ["--lab", "run", "payload:hello"],
]


@pytest.mark.parametrize("words", COMMANDS, ids=[" ".join(words[:2]) for words in COMMANDS])
def test_parsing_a_command_line_loads_nothing_of_others(words: list[str]) -> None:
    names, others = loaded(f"from pyvmm.cli import make_parser; make_parser({words}).parse_args({words})")
    assert others <= ALLOWED
    assert "argparse" in names
    assert not names & {"asyncio", "logging", "subprocess", "ctypes"}


def test_parsing_a_run_loads_no_typing() -> None:
    # It costs a fifth of all that a command line takes beyond bare Python.
    words = COMMANDS[0]
    assert "typing" not in loaded(f"from pyvmm.cli import make_parser; make_parser({words}).parse_args({words})")[0]


@pytest.mark.parametrize("verb", ["run", "doctor", "demo", "lab", "atlas", "map", "repl"])
def test_help_loads_the_verb_asked_for_and_no_other(verb: str) -> None:
    wanted = [verb]
    code = f"""
import sys
from pyvmm.cli import VERBS, make_parser
make_parser(['{verb}'])
assert [v for v in VERBS if f'pyvmm.cli.{{v}}' in sys.modules] == {wanted}
"""
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0


def test_building_a_machine_from_a_flat_binary_loads_only_what_is_allowed() -> None:
    code = "from pyvmm.machine.machine import Machine\nfrom pyvmm.machine import boot\nboot.read('payload:hello')"
    assert loaded(code)[1] <= ALLOWED


NEEDLESS = {"dataclasses", "difflib", "inspect", "json", "logging", "pathlib", "shutil", "socket", "subprocess"}
TO_THE_GUEST = f"""
import sys
compiled = []
def hear(event, values):
    if event == "compile" and values[1] == "<string>" and b"_tuple_new" not in values[0]:  # a namedtuple's __new__
        compiled.append(values[0])
sys.addaudithook(hear)
before = set(sys.modules)
from pyvmm.cli import make_parser
words = ["run", "-m", "64M", "-p", "quiet", sys.argv[1]]
make_parser(words).parse_args(words)
import pyvmm.session.run
from pyvmm.machine.machine import Machine
from pyvmm.machine import boot
boot.read(sys.argv[1]).close()
print(sorted((set(sys.modules) - before) & {NEEDLESS}), compiled)
"""


def test_way_to_a_guest_loads_and_compiles_nothing_that_it_does_not_need(tmp_path: Path) -> None:
    # Compiling a first string costs as much as a dozen imports; an annotation of a NamedTuple that is one is compiled.
    kernel = tmp_path / "kernel"
    kernel.write_bytes(payload("hello"))
    command = [sys.executable, "-S", "-c", TO_THE_GUEST, str(kernel)]
    path = os.pathsep.join(path for path in sys.path if path)
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ | {"PYTHONPATH": path})
    assert done.stdout == "[] []\n"
