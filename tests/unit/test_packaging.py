# SPDX-License-Identifier: Apache-2.0
"""Wheels carry the loop for the machine they name, and an installation does not need the checkout."""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pytest

from native import build
from pyvmm import __version__
from pyvmm.cli import VERBS
from pyvmm.cli.completion import SHELLS
from pyvmm.cli.help import TOPICS
from tests.wheel import Installation, copy_source, hatch, programs_without, wheel_of

HOST = platform.machine()
LOOP, LAB_LOOP = "pyvmm/_native.abi3.so", "pyvmm/lab/aarch64/_native.abi3.so"
DATA = f"pyvmm-{__version__}.data/data"
ELF_MACHINES = {0x3E: "x86_64", 0xB7: "aarch64"}

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("hatchling") is None, reason="hatchling is not installed"),
    pytest.mark.skipif(
        importlib.util.find_spec("argparse_manpage") is None, reason="argparse-manpage is not installed"
    ),
    pytest.mark.skipif(build.compiler(HOST) is None, reason="no C compiler"),
]
needs_cross = pytest.mark.skipif(build.compiler("aarch64") is None, reason="no C compiler for aarch64")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a copy of the sources without build results."""
    return copy_source(tmp_path_factory.mktemp("source"))


def findings(doctor: str) -> dict[tuple[str, str], dict[str, Any]]:
    return {(each["section"], each["name"]): each for each in json.loads(doctor)["findings"]}


def elf_machine(data: bytes) -> str:
    assert data[:4] == b"\x7fELF"
    return ELF_MACHINES[int.from_bytes(data[18:20], "little")]


@pytest.fixture(scope="module")
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return wheel_of(source, tmp_path_factory.mktemp("host"))


def test_wheel_is_for_this_machine_and_any_python_from_3_11(wheel: Path) -> None:
    assert re.search(rf"-cp311-abi3-manylinux_2_\d+_{HOST}\.whl$", wheel.name)
    with zipfile.ZipFile(wheel) as packed:
        assert elf_machine(packed.read(LOOP)) == HOST
        assert packed.namelist().count(LOOP) == 1


@pytest.mark.skipif(shutil.which("readelf") is None, reason="no readelf")
def test_wheel_names_the_newest_c_library_that_the_loop_needs(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as packed:
        loop = packed.extract(LOOP, tmp_path)
    needs = subprocess.run(["readelf", "--version-info", loop], capture_output=True, text=True, check=True).stdout
    newest = max(int(minor) for minor in re.findall(r"Name: GLIBC_2\.(\d+)", needs))
    assert f"-manylinux_2_{newest}_{HOST}.whl" in wheel.name


def test_wheel_and_source_archive_carry_the_documentation(wheel: Path, source: Path, tmp_path: Path) -> None:
    pages = {f"pyvmm/docs/{topic}.md" for topic in TOPICS}
    with zipfile.ZipFile(wheel) as packed:
        assert {name for name in packed.namelist() if name.startswith("pyvmm/docs/")} == pages
    done = hatch(source, "sdist", tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    [archive] = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as packed_source:
        assert pages <= {name.partition("/")[2] for name in packed_source.getnames()}


def test_wheel_carries_a_manual_page_for_every_verb(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as packed:
        page = packed.read(f"{DATA}/share/man/man1/pyvmm.1").decode()
    assert page.startswith('.TH PYVMM "1" "')
    assert re.findall(r"^\.SS \\fBpyvmm (\w+)\\fR$", page, re.MULTILINE) == list(VERBS)
    assert ".SH EXIT STATUS" in page
    if shutil.which("groff") is not None:
        (tmp_path / "pyvmm.1").write_text(page)
        checked = subprocess.run(
            ["groff", "-man", "-z", "-Tutf8", tmp_path / "pyvmm.1"], capture_output=True, text=True, check=True
        )
        assert "error" not in checked.stderr


@pytest.mark.parametrize(
    ("shell", "place"),
    [
        ("bash", "bash-completion/completions/pyvmm"),
        ("zsh", "zsh/site-functions/_pyvmm"),
        ("fish", "fish/vendor_completions.d/pyvmm.fish"),
    ],
)
def test_wheel_carries_the_script_that_completion_prints(shell: str, place: str, wheel: Path) -> None:
    assert shell in SHELLS
    printed = subprocess.run(
        [sys.executable, "-m", "pyvmm", "completion", shell], capture_output=True, text=True, check=True
    )
    with zipfile.ZipFile(wheel) as packed:
        assert packed.read(f"{DATA}/share/{place}").decode() == printed.stdout


@needs_cross
@pytest.mark.skipif(HOST == "aarch64", reason="an arm64 host is its own lab")
def test_wheel_of_a_workstation_carries_the_labs_loop(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as packed:
        assert elf_machine(packed.read(LAB_LOOP)) == "aarch64"


@needs_cross
@pytest.mark.skipif(HOST == "aarch64", reason="not a cross build")
def test_wheel_for_arm64_is_cross_built_beside_the_checkout(wheel: Path, source: Path, tmp_path: Path) -> None:
    before = (source / LOOP).read_bytes()
    crossed = wheel_of(source, tmp_path, PYVMM_TARGET="aarch64")
    assert re.search(r"-cp311-abi3-manylinux_2_\d+_aarch64\.whl$", crossed.name)
    with zipfile.ZipFile(crossed) as packed, zipfile.ZipFile(wheel) as host:
        assert elf_machine(packed.read(LOOP)) == "aarch64"
        assert LAB_LOOP not in packed.namelist()
        python = {name for name in packed.namelist() if name.endswith(".py")}
        assert python == {name for name in host.namelist() if name.endswith(".py")}
    assert (source / LOOP).read_bytes() == before


@pytest.mark.skipif(HOST == "aarch64", reason="an arm64 host is its own lab")
def test_a_build_without_the_labs_compiler_says_so_and_so_does_what_it_built(source: Path, tmp_path: Path) -> None:
    programs = programs_without(re.compile("aarch64-.*"), tmp_path)
    done = hatch(source, "wheel", tmp_path, PATH=str(programs))
    assert done.returncode == 0, done.stderr
    assert "the lab's extension was not built (Debian: apt install gcc-aarch64-linux-gnu)" in done.stderr
    [built] = tmp_path.glob("*.whl")
    with zipfile.ZipFile(built) as packed:
        assert LAB_LOOP not in packed.namelist()
        packed.extractall(tmp_path / "there")
    doctor = subprocess.run(
        [sys.executable, "-m", "pyvmm", "doctor", "--json"],
        cwd=tmp_path / "there",
        env={**os.environ, "PYTHONPATH": str(tmp_path / "there")},
        capture_output=True,
        text=True,
        check=False,
    )
    found = findings(doctor.stdout)["lab", "native loop"]
    assert found["status"] == "fail"
    assert found["hint"] == "install a wheel that was built where gcc-aarch64-linux-gnu is"


def test_wheel_for_an_unsupported_machine_is_refused(source: Path, tmp_path: Path) -> None:
    done = hatch(source, "wheel", tmp_path, PYVMM_TARGET="sparc")
    assert done.returncode != 0
    assert "sparc is not one of x86_64, aarch64" in done.stderr


def test_the_error_of_a_build_without_a_compiler_says_what_to_install(source: Path, tmp_path: Path) -> None:
    done = hatch(source, "wheel", tmp_path, PATH=str(tmp_path))
    assert done.returncode != 0
    assert "no C compiler" in done.stderr
    assert "apt install gcc" in done.stderr
    assert "Traceback" not in done.stderr


def test_wheel_runs_without_the_checkout(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as packed:
        packed.extractall(tmp_path)
    script = """
import pyvmm, pyvmm._native_source
from pyvmm._native import ffi, lib
pyvmm._native_source.require_fresh_native()
assert lib.pv_install_signals() == 0 == lib.pv_fill(ffi.cast("void *", 8), 0, 8)
print(pyvmm.__file__)
"""
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.strip() == str(tmp_path / "pyvmm" / "__init__.py"), done.stderr


def test_wheel_shows_its_documentation_without_the_checkout(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as packed:
        packed.extractall(tmp_path)
    done = subprocess.run(
        [sys.executable, "-m", "pyvmm", "help", "lab"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout == (tmp_path / "pyvmm/docs/lab.md").read_text(), done.stderr


def test_wheel_works_on_a_machine_without_a_compiler(wheel: Path, tmp_path: Path) -> None:
    there = Installation.of(wheel, tmp_path)
    for compiler in ("gcc", "cc", "clang", "as", "ld"):
        assert shutil.which(compiler, path=str(there.programs)) is None
    assert there.run("pyvmm", "--version").stdout == f"pyvmm {__version__}\n"
    plan = there.run("pyvmm", "run", "--dry-run", "payload:hello")
    assert (plan.returncode, plan.stderr) == (0, "")
    assert "KVM_CREATE_VM" in plan.stdout
    doctor = there.run("pyvmm", "doctor", "--json")
    found = findings(doctor.stdout)
    assert str(there.prefix) in found["python", "interpreter"]["value"]
    assert found["python", "native loop"]["status"] == "ok"
    if build.compiler("aarch64") is not None:
        assert found["lab", "native loop"]["status"] == "ok"


@pytest.mark.skipif(importlib.util.find_spec("editables") is None, reason="editables is not installed")
def test_editable_install_builds_the_loop_in_place(source: Path, tmp_path: Path) -> None:
    (source / LOOP).unlink(missing_ok=True)
    editable = wheel_of(source, tmp_path, "wheel:editable")
    assert elf_machine((source / LOOP).read_bytes()) == HOST
    with zipfile.ZipFile(editable) as packed:
        assert LOOP not in packed.namelist()
        (path,) = (name for name in packed.namelist() if name.endswith(".pth"))
        assert packed.read(path).decode().strip() == str(source)
