# SPDX-License-Identifier: Apache-2.0
"""Plug-ins of installed packages are found by name or listed. The error for a faulty one is one line."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from pyvmm import plugins
from pyvmm.errors import UsageError
from tests.unit.installed import forgetting, install

DICE = "class Dice:\n    sides = 6\ndice = 4\n"


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Yield a directory for packages; their modules are forgotten afterwards."""
    directory = tmp_path / "site"
    directory.mkdir()
    monkeypatch.syspath_prepend(directory)
    monkeypatch.setattr(plugins, "_asked", {})
    with forgetting(directory):
        yield directory


def test_find_loads_the_plugin_of_a_package_by_name(site: Path) -> None:
    install(site, "pyvmm-dice", {"dice_device.py": DICE}, {plugins.DEVICES: {"dice": "dice_device:Dice"}})
    found = plugins.find(plugins.DEVICES, "dice", type)
    assert found is not None
    assert (found.__name__, found.__module__) == ("Dice", "dice_device")


def test_find_returns_none_for_an_unknown_name_or_one_of_another_group(site: Path) -> None:
    install(site, "pyvmm-dice", {"dice_device.py": DICE}, {plugins.DEVICES: {"dice": "dice_device:Dice"}})
    assert plugins.find(plugins.DEVICES, "coin", type) is None
    assert plugins.find(plugins.CLAIMS, "dice", type) is None
    assert "dice_device" not in sys.modules
    assert plugins.asked() == []


FAULTS = {
    "import": ("import no_such_module", "m:x", "ModuleNotFoundError: No module named 'no_such_module'"),
    "exception": ("1 / 0", "m:x", "ZeroDivisionError: division by zero"),
    "lines": ("raise ValueError('one\\ntwo')", "m:x", "ValueError: one"),
    "silent": ("raise ValueError", "m:x", "ValueError"),
    "exit": ("raise SystemExit(3)", "m:x", "SystemExit: 3"),
    "syntax": ("def (", "m:x", "SyntaxError: invalid syntax (m.py, line 1)"),
    "attribute": ("y = 1", "m:x", "AttributeError: module 'm' has no attribute 'x'"),
    "kind": ("x = 'text'", "m:x", "m:x is a str, not a int"),
    "target": ("x = 1", "not a target", "'not a target' is not MODULE:NAME"),
}


@pytest.mark.parametrize(("source", "target", "reason"), FAULTS.values(), ids=FAULTS)
def test_the_error_for_a_faulty_plugin_is_one_line_with_name_package_and_reason(
    site: Path, source: str, target: str, reason: str
) -> None:
    install(site, "pyvmm-bad", {"m.py": source}, {plugins.CASES: {"bad": target}})
    with pytest.raises(plugins.PluginError) as caught:
        plugins.find(plugins.CASES, "bad", int)
    assert caught.value.message == f"the plug-in 'bad' of the package pyvmm-bad cannot be used: {reason}"
    assert caught.value.hint == "fix or remove it: pip uninstall pyvmm-bad"
    assert isinstance(caught.value, UsageError)
    assert (caught.value.name, caught.value.package) == ("bad", "pyvmm-bad")


def test_an_interrupt_at_import_is_not_reported_as_a_fault_of_the_plugin(site: Path) -> None:
    install(site, "pyvmm-slow", {"m.py": "raise KeyboardInterrupt"}, {plugins.CASES: {"slow": "m:x"}})
    with pytest.raises(KeyboardInterrupt):
        plugins.find(plugins.CASES, "slow", int)


def test_the_error_for_a_name_of_two_packages_names_both(site: Path) -> None:
    install(site, "pyvmm-a", {"a.py": "x = 1"}, {plugins.CASES: {"same": "a:x", "other": "a:x"}})
    install(site, "pyvmm-b", {"b.py": "x = 2"}, {plugins.CASES: {"same": "b:x"}})
    with pytest.raises(
        plugins.PluginError, match=r"'same' of the package pyvmm-\w and pyvmm-\w cannot .*defined more than once"
    ):
        plugins.find(plugins.CASES, "same", int)
    assert plugins.find(plugins.CASES, "other", int) == 1


def test_a_package_that_is_on_the_path_twice_counts_once(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(site / "second", "pyvmm-a", {"a.py": "x = 2"}, {plugins.CASES: {"same": "a:x"}})
    monkeypatch.syspath_prepend(site / "second")
    install(site / "first", "pyvmm-a", {"a.py": "x = 1"}, {plugins.CASES: {"same": "a:x"}})
    monkeypatch.syspath_prepend(site / "first")
    assert plugins.find(plugins.CASES, "same", int) == 1


def test_every_lists_the_good_plugins_and_an_error_for_each_faulty_one(site: Path) -> None:
    targets = {"zwei": "good:two", "eins": "good:one", "halt": "good:half", "taken": "good:one"}
    install(site, "pyvmm-good", {"good.py": "one, two, half = 1, 2, 0.5"}, {plugins.CASES: targets})
    install(site, "pyvmm-bad", {"bad.py": "1 / 0"}, {plugins.CASES: {"bad": "bad:x"}})
    good, faults = plugins.every(plugins.CASES, int, taken={"taken": 0})
    assert [(each.name, each.package, each.item) for each in good] == [
        ("eins", "pyvmm-good", 1),
        ("zwei", "pyvmm-good", 2),
    ]
    assert {each.name: each.message.partition(": ")[2] for each in faults} == {
        "bad": "ZeroDivisionError: division by zero",
        "halt": "good:half is a float, not a int",
        "taken": "pyvmm has a built-in one with this name",
    }


def test_names_loads_no_plugin(site: Path) -> None:
    install(site, "pyvmm-bad", {"bad.py": "1 / 0"}, {plugins.CASES: {"b": "bad:x", "a": "bad:y"}})
    assert plugins.names(plugins.CASES) == ({"a": "pyvmm-bad", "b": "pyvmm-bad"}, [])
    assert "bad" not in sys.modules


def test_unreadable_entry_points_are_an_error_only_if_they_mention_the_group(site: Path) -> None:
    install(site, "pyvmm-good", {"good.py": "x = 1"}, {plugins.CASES: {"good": "good:x"}})
    damaged = install(site, "damaged", {}, {})
    (damaged / "entry_points.txt").write_bytes(b"[pyvmm.cases]\n\xff = a:b\n")
    foreign = install(site, "foreign", {}, {})
    (foreign / "entry_points.txt").write_bytes(b"[other]\n\xff = a:b\n")
    good, faults = plugins.every(plugins.CASES, int)
    assert [each.name for each in good] == ["good"]
    [fault] = faults
    assert fault.package == "damaged"
    assert fault.message.partition("used: ")[2].startswith("entry_points.txt: UnicodeDecodeError: ")
    assert plugins.find(plugins.CASES, "good", int) == 1
    with pytest.raises(plugins.PluginError, match="damaged"):
        plugins.find(plugins.CASES, "gone", int)  # the name may belong to the damaged package
    assert plugins.find(plugins.DEVICES, "gone", int) is None


def test_a_package_without_metadata_is_named_after_its_directory(site: Path) -> None:
    info = install(site, "pyvmm-bare", {"bare.py": "1 / 0"}, {plugins.CASES: {"bare": "bare:x"}})
    (info / "METADATA").unlink()
    with pytest.raises(plugins.PluginError, match="of the package pyvmm_bare cannot be used: ZeroDivisionError"):
        plugins.find(plugins.CASES, "bare", int)


def test_requested_packages_are_those_of_a_name_or_of_a_list(site: Path) -> None:
    for name in ("one", "two", "three"):
        install(site, f"pyvmm-{name}", {f"{name}.py": "x = 1"}, {plugins.CASES: {name: f"{name}:x"}})
    install(site, "pyvmm-device", {"device.py": "x = 1"}, {plugins.DEVICES: {"device": "device:x"}})
    plugins.find(plugins.CASES, "two", int)
    assert [each.metadata["Name"] for each in plugins.asked()] == ["pyvmm-two"]
    plugins.every(plugins.CASES, int)
    assert [each.metadata["Name"] for each in plugins.asked()] == ["pyvmm-one", "pyvmm-three", "pyvmm-two"]


KNOWN = [
    ["run", "--net", "tap=t0", "-d", "disk.img", "--rng", "payload:hello"],
    ["atlas", "share"],
    ["bench", "fault"],
    ["--lab", "run", "payload:hello"],
]


@pytest.mark.parametrize("words", KNOWN, ids=" ".join)
def test_a_command_line_with_known_names_reads_no_entry_points(words: list[str]) -> None:
    code = f"import sys; from pyvmm.cli import make_parser; make_parser({words}).parse_args({words})"
    known = """
from pyvmm.atlas.claim import all_claims, select
select(['share'], all_claims(['share']))
from pyvmm.bench.collect import Plan
Plan(('fault',), {}, False, None, 1).steps()
from pyvmm.lab import lab, shares
"""
    code += known if words[0] in ("atlas", "bench", "--lab") else ""
    code += "\nassert 'importlib.metadata' not in sys.modules"
    done = subprocess.run([sys.executable, "-S", "-c", f"import sys; sys.path[:] = {sys.path}; {code}"], check=False)
    assert done.returncode == 0
