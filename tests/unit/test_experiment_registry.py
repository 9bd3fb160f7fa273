# SPDX-License-Identifier: Apache-2.0
"""Claims and cases are found by name, built in or from an installed package. A faulty plug-in is one line."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from pyvmm import cli, plugins
from pyvmm.atlas import claim as claims
from pyvmm.bench import case as cases
from pyvmm.bench.sweep import plan as plans
from pyvmm.errors import UsageError
from pyvmm.experiment.registry import Registry, choose, nearest
from tests.unit.installed import install

MINE = '''
from pyvmm.atlas.claim import group

claim = group("mine", heading="What my driver does")

@claim(none="memfd", origin="thread: me")
def pages_are_kept(x):
    """The driver keeps its pages."""
    x.check("kept", True)

@claim(none="memfd", pkvm="memfd", origin="thread: me")
def pages_are_zero(x):
    """The driver zeroes its pages."""
'''
SPIN = """
from pyvmm.bench.case import case

@case(says="a spin", axes={"protection": ("none",), "turns": (1, 8)}, quick=())
def spin(bench):
    bench.keep("spin", [[1.0]])
"""


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Yield a directory for packages; their modules are forgotten afterwards."""
    directory = tmp_path / "site"
    directory.mkdir()
    before = set(sys.modules)
    monkeypatch.syspath_prepend(directory)
    monkeypatch.setattr(plugins, "_asked", {})
    yield directory
    for name in set(sys.modules) - before:
        if (getattr(sys.modules[name], "__file__", None) or "").startswith(str(directory)):
            del sys.modules[name]


@pytest.fixture
def mine(site: Path) -> Path:
    """Install a package with a group of claims and a case."""
    points = {plugins.CLAIMS: {"mine": "pyvmm_mine:claim"}, plugins.CASES: {"spin": "pyvmm_spin:spin"}}
    install(site, "pyvmm-mine", {"pyvmm_mine.py": MINE, "pyvmm_spin.py": SPIN}, points)
    return site


def found(*names: str) -> list[str]:
    return [claim.id for claim in claims.select(names, claims.all_claims(names))]


@pytest.mark.parametrize(
    ("name", "ids"),
    [
        ("mine", ["mine/pages-are-kept", "mine/pages-are-zero"]),
        ("mine/pages-are-zero", ["mine/pages-are-zero"]),
        ("pages-are-kept", ["mine/pages-are-kept"]),
    ],
)
@pytest.mark.usefixtures("mine")
def test_claims_of_a_package_are_found_by_all_their_names(name: str, ids: list[str]) -> None:
    assert found(name) == ids
    assert [package.metadata["Name"] for package in plugins.asked()] == ["pyvmm-mine"]


@pytest.mark.usefixtures("mine")
def test_built_in_claims_come_first_and_a_run_without_names_has_only_them() -> None:
    assert found("mine", "huge")[-2:] == ["mine/pages-are-kept", "mine/pages-are-zero"]
    assert not [id for id in found() if id.startswith("mine")]
    assert not [case.name for case in cases.select([]) if case.name == "spin"]


@pytest.mark.usefixtures("mine")
def test_a_run_and_a_sweep_find_a_case_of_a_package_by_name() -> None:
    [spin] = cases.select(["spin"])
    assert spin.points() == [{"protection": "none", "turns": 1}, {"protection": "none", "turns": 8}]
    assert "spin" not in cases.all_cases()
    text = 'case = "spin"\n[axes]\nturns = [1, 8]'
    sweep = plans.parse(text, "a.toml", cases.all_cases(), cases.REGISTRY.plug_in)
    assert [task.point["turns"] for task in sweep.tasks] == [1, 8]
    with pytest.raises(UsageError, match="no case is called 'spin'"):
        plans.parse(text, "a.toml", cases.all_cases())


@pytest.mark.usefixtures("mine")
def test_nearest_names_include_those_of_packages() -> None:
    with pytest.raises(UsageError, match="no claim is called 'mine/pages-are-kpet'") as claim:
        found("mine/pages-are-kpet")
    with pytest.raises(UsageError, match="no case is called 'spni'") as case:
        cases.select(["spni"])
    assert str(claim.value.hint).startswith("the nearest: mine/pages-are-kept")
    assert str(case.value.hint).startswith("the nearest: spin")


FAULTS = [
    ("1 / 0", "ZeroDivisionError: division by zero"),
    ("from pyvmm.atlas.claim import group\nclaim = group('other', heading='x')", "its target is called 'other'"),
    ("from pyvmm.atlas.claim import group\nclaim = group('share', heading='x')", "a group called 'share' already"),
    ("claim = 3", "pyvmm_bad:claim is a int, not a Group"),
]


@pytest.mark.parametrize(("source", "why"), FAULTS)
@pytest.mark.usefixtures("mine")
def test_the_error_for_a_faulty_plug_in_is_one_line_with_its_name(
    site: Path, source: str, why: str, capsys: pytest.CaptureFixture[str]
) -> None:
    install(site, "pyvmm-bad", {"pyvmm_bad.py": source}, {plugins.CLAIMS: {"bad": "pyvmm_bad:claim"}})
    assert cli.main(["atlas", "--list"]) == 0
    out, err = capsys.readouterr()
    assert "mine: What my driver does\n  mine/pages-are-kept\n" in out
    [line] = err.splitlines()
    assert line.startswith("pyvmm: the plug-in 'bad' of the package pyvmm-bad cannot be used: ")
    assert why in line
    assert cli.main(["atlas", "bad/any"]) == 2
    assert why in capsys.readouterr().err
    assert cli.main(["atlas", "mine", "--list"]) == 0
    assert capsys.readouterr().err == ""


@pytest.mark.usefixtures("mine")
def test_the_list_of_all_cases_includes_those_of_packages(site: Path, capsys: pytest.CaptureFixture[str]) -> None:
    install(site, "pyvmm-bad", {"pyvmm_bad.py": "1 / 0"}, {plugins.CASES: {"bad": "pyvmm_bad:x"}})
    assert cli.main(["bench", "--list"]) == 0
    out, err = capsys.readouterr()
    assert "spin: 2 points, 1 of them quick\n  a spin\n" in out
    assert err == (
        "pyvmm: the plug-in 'bad' of the package pyvmm-bad cannot be used: ZeroDivisionError: division by zero\n"
    )


@pytest.mark.parametrize(
    "code",
    [
        "from pyvmm.atlas.claim import all_claims, select; select(['share', 'a-small-hole-is-zeros-and-nothing-else'], "
        "all_claims(['share', 'a-small-hole-is-zeros-and-nothing-else'])); select([], all_claims())",
        "from pyvmm.bench.case import select; select(['fault']); select([])",
    ],
)
def test_a_run_of_known_names_reads_no_entry_points(code: str) -> None:
    script = f"import sys\n{code}\nassert 'importlib.metadata' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_two_plug_ins_with_the_same_name_are_an_error(site: Path) -> None:
    body = "from pyvmm.bench.case import case\n@case(says='', axes={})\ndef spin(bench): pass\n"
    for module in ("__init__", "one", "two"):
        path = site / "pyvmm_two" / f"{module}.py"
        path.parent.mkdir(exist_ok=True)
        path.write_text("" if module == "__init__" else body)
    registry = Registry(cases.Case, "pyvmm_two", plugins.CASES)
    assert list(registry.built_in(("one",))) == ["spin"]
    with pytest.raises(ValueError, match="two cases are called spin"):
        registry.built_in()


def test_a_name_given_twice_is_chosen_once_in_the_given_order() -> None:
    known = {"a": [1], "b": [2], "all": [1, 2]}
    assert choose(["b", "all", "b", "c"], known, lambda name: [3] if name == "c" else [], UsageError) == [2, 1, 3]
    with pytest.raises(UsageError, match="d"):
        choose(["a", "d"], known, lambda _: [], UsageError)


def test_nearest_offers_each_similar_name_once() -> None:
    assert nearest("shar", ["share", "group/share"], offers={"share": "group/share"}) == "the nearest: group/share"
    assert nearest("zzz", ["a"], otherwise="nothing like it") == "nothing like it"
