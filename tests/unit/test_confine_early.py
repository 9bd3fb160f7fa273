# SPDX-License-Identifier: Apache-2.0
"""What a confined run imports before its guest starts is all that it imports later."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from pyvmm.session import early

ROOT = Path(__file__).resolve().parents[2]
REACHED = ("machine", "memory", "devices", "vcpu", "session", "debug", "observe", "kvm", "confine")
SINGLE = ("errors", "log", "outlet", "interrupt", "terminal")


def sources() -> Iterator[Path]:
    """Yield the modules with code that runs while a guest does."""
    for package in REACHED:
        yield from sorted((ROOT / "pyvmm" / package).rglob("*.py"))
    yield from (ROOT / "pyvmm" / f"{name}.py" for name in SINGLE)


def is_module(name: str) -> bool:
    path = ROOT.joinpath(*name.split("."))
    return path.with_suffix(".py").exists() or (path / "__init__.py").exists()


@cache
def late() -> frozenset[str]:
    """Return the modules that are imported inside of functions."""
    found = set()
    for path in sources():
        functions = [
            node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef | ast.Lambda)
        ]
        for function in functions:
            for node in ast.walk(function):
                if isinstance(node, ast.Import):
                    found |= {alias.name for alias in node.names}
                elif isinstance(node, ast.ImportFrom):
                    inner = {f"{node.module}.{alias.name}" for alias in node.names}
                    modules = {name for name in inner if is_module(name)}
                    found |= modules or {str(node.module)}
    return frozenset(found)


@cache
def loaded() -> frozenset[str]:
    """Return the modules that a confined run has before its guest starts, whatever its devices are."""
    code = (
        "import sys, json\nimport pyvmm.session.run, pyvmm.cli.run, pyvmm.session.confinement\n"
        "from pyvmm.session.early import import_all\nimport_all()\nprint(json.dumps(sorted(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, cwd=ROOT, text=True)
    return frozenset(json.loads(done.stdout))


def test_every_late_import_is_made_early_or_not_needed() -> None:
    assert late() - loaded() - early.ONLY_BEFORE - early.NEVER == set()


def test_no_list_names_what_nobody_imports_late() -> None:
    assert (early.ONLY_BEFORE | early.NEVER) - late() == set()
    assert not early.ONLY_BEFORE & early.NEVER
    assert not (early.ONLY_BEFORE | early.NEVER) & set(early.ALWAYS)


def test_the_search_finds_late_imports() -> None:
    assert {"json", "pyvmm.vcpu.failure", "pyvmm.machine.saving", "pyvmm.uapi.kvm_run"} <= late()
    assert len(late()) > 50


def test_an_event_after_the_preparation_imports_nothing() -> None:
    code = (
        "import sys\nfrom pyvmm import log\nfrom pyvmm.session.early import import_all\nimport_all()\n"
        "before = set(sys.modules)\nlog.get_logger('x').error('event', value=1, text='a', exc_info=ValueError('b'))\n"
        "print(sorted(set(sys.modules) - before))"
    )
    for words in ("", "from pyvmm import log; log.configure(json=True)\n"):
        done = subprocess.run(
            [sys.executable, "-c", words + code], capture_output=True, check=True, cwd=ROOT, text=True
        )
        assert done.stdout == "[]\n", done
        assert "event" in done.stderr
