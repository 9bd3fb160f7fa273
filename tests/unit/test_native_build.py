# SPDX-License-Identifier: Apache-2.0
"""The extension, its types and its sources match, and a failed build says what to install."""

from __future__ import annotations

import ast
import graphlib
import platform
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from native import build, stubs
from pyvmm import _native_source
from pyvmm._native import ffi, lib
from pyvmm.errors import PyvmmError

ROOT = Path(__file__).resolve().parents[2]


def test_every_name_of_the_loop_is_typed_and_every_typed_name_exists() -> None:
    stub = ast.parse((ROOT / "pyvmm" / "_native.pyi").read_text())
    (typed,) = (node for node in stub.body if isinstance(node, ast.ClassDef) and node.name == "_Lib")
    names = {node.name for node in typed.body if isinstance(node, ast.FunctionDef)}
    names |= {n.target.id for n in typed.body if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)}
    assert names == {name for name in dir(lib) if name.lower().startswith("pv_")}


def test_typed_functions_take_as_many_arguments_as_those_of_the_loop() -> None:
    stub = ast.parse((ROOT / "pyvmm" / "_native.pyi").read_text())
    (typed,) = (node for node in stub.body if isinstance(node, ast.ClassDef) and node.name == "_Lib")
    for node in typed.body:
        if isinstance(node, ast.FunctionDef):
            taken = len(node.args.posonlyargs or node.args.args) - 1
            assert taken == len(ffi.typeof(getattr(lib, node.name)).args), node.name


def test_structures_are_typed_with_their_fields() -> None:
    stub = ast.parse((ROOT / "pyvmm" / "_native.pyi").read_text())
    classes = {node.name: node for node in stub.body if isinstance(node, ast.ClassDef) and node.name.startswith("pv_")}
    assert sorted(classes) == sorted(ffi.list_types()[1])
    for name, node in classes.items():
        fields = [ast.unparse(entry.target) for entry in node.body if isinstance(entry, ast.AnnAssign)]
        assert fields == [field for field, _ in ffi.typeof(f"struct {name}").fields], name


def test_the_types_agree_with_the_declarations() -> None:
    assert (ROOT / "pyvmm" / "_native.pyi").read_text() == stubs.stub(build.declarations()), "python native/build.py"


def test_the_types_include_a_new_field_parameter_and_constant() -> None:
    more = """
enum pv_new { PV_NEW_ONE, PV_NEW_TWO = 7 };
struct pv_new { uint32_t ours, other; uint64_t many[PV_NEW_TWO]; struct pv_vm *vm; const uint8_t *text; };
int pv_new_call(struct pv_new *new, const void *from, uint32_t n);
"""
    text = stubs.stub(build.declarations() + more)
    assert "    PV_NEW_ONE: Final[int]\n    PV_NEW_TWO: Final[int]\n" in text
    fields = ["ours: int", "other: int", "many: _Items[int]", "vm: _To[pv_vm]", "text: Pointer[int]"]
    assert "class pv_new(Struct):\n    " + "\n    ".join(fields) + "\n\n" in text
    assert "def pv_new_call(self, new: _Ref[pv_new], source: bytes | CData, n: int, /) -> int: ..." in text
    assert 'def new(self, cdecl: Literal["struct pv_new[]"], init: object = ...) -> Array[pv_new]: ...' in text


def test_structures_have_no_hidden_padding() -> None:
    for name in ffi.list_types()[1]:
        fields = ffi.typeof(f"struct {name}").fields or []
        end = 0
        for field, described in fields:
            assert described.offset == end, f"{name}.{field}"
            end += ffi.sizeof(described.type)
        assert end == ffi.sizeof(f"struct {name}"), name


def test_no_two_sources_have_the_same_file_name() -> None:
    names = [path.name for path in build.c_files()]
    assert len(names) > 10
    assert len(set(names)) == len(names)


@pytest.fixture(scope="module")
def calls(tmp_path_factory: pytest.TempPathFactory) -> dict[str, set[str]]:
    """Return the files that each file of C calls. An inline function of a header belongs to the including file."""
    folder = tmp_path_factory.mktemp("objects")
    cc = build.compiler(platform.machine())
    nm = shutil.which("nm")
    if cc is None or nm is None:
        pytest.skip("no C compiler, or no nm (binutils)")
    flags = ["-O0", "-w", "-std=gnu11", f"-I{build.NATIVE}", '-DPV_SOURCE_HASH=""']
    subprocess.run([*cc, *flags, "-c", *build.c_files()], cwd=folder, check=True)
    defined: dict[str, str] = {}
    used: dict[str, set[str]] = {}
    for path in build.c_files():
        command = [nm, "--format=posix", str(folder / f"{path.stem}.o")]
        for line in subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines():
            symbol, kind = line.split()[:2]
            if kind == "T":
                defined[symbol] = path.name
            elif kind == "U":
                used.setdefault(path.name, set()).add(symbol)
    return {name: {defined[symbol] for symbol in symbols if symbol in defined} for name, symbols in used.items()}


def test_no_two_files_call_each_other_even_indirectly(calls: dict[str, set[str]]) -> None:
    assert "hypercall.c" in calls["run.c"]
    assert list(graphlib.TopologicalSorter(calls).static_order())[-1] in {"run.c", "blk.c", "net.c", "userfault.c"}


def test_the_loop_does_not_call_the_virtio_devices(calls: dict[str, set[str]]) -> None:
    folders = {path.name: path.parent.name for path in build.c_files()}
    up = {(one, other) for one in calls for other in calls[one] if (folders[one], folders[other]) == ("loop", "virtio")}
    assert up == set()


def test_a_fresh_build_is_accepted() -> None:
    _native_source.require_fresh_native()


def test_the_error_for_a_stale_build_has_the_command_that_rebuilds_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(ROOT / "native", tmp_path / "native")
    with (tmp_path / "native" / "loop" / "run.c").open("a") as file:
        file.write("/* newer */\n")
    monkeypatch.setattr(_native_source, "NATIVE", tmp_path / "native")
    with pytest.raises(PyvmmError, match=r"the native loop is stale: built from sources.*\n.*python native/build\.py"):
        _native_source.require_fresh_native()


def test_an_installed_package_without_sources_is_never_stale(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_native_source, "NATIVE", tmp_path)
    _native_source.require_fresh_native()


def test_the_error_for_a_missing_extension_has_the_command_that_builds_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyvmm._native", None)
    with pytest.raises(PyvmmError, match=r"cannot be imported(.|\n)*python native/build\.py"):
        _native_source.require_fresh_native()


@pytest.mark.parametrize(
    ("machine", "package"),
    [(platform.machine(), "gcc"), ("x86_64" if platform.machine() == "aarch64" else "aarch64", "gcc-")],
)
def test_the_error_for_a_missing_compiler_names_its_package(
    machine: str, package: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(build.BuildError, match=rf"no C compiler for {machine}: install {package}"):
        build.build(machine, tmp_path / "out.so")


def test_the_error_for_a_missing_python_header_names_its_package(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(sysconfig, "get_path", lambda _: str(tmp_path))
    with pytest.raises(build.BuildError, match=r"Python\.h is missing \(Debian: apt install python3-dev\)"):
        build.build(platform.machine(), tmp_path / "out.so")


def test_an_error_in_the_sources_shows_the_compilers_output(tmp_path: Path) -> None:
    (tmp_path / "wrong.c").write_text("int wrong(void) { return nothing; }\n")
    with pytest.raises(build.BuildError, match="nothing"):
        build.build(platform.machine(), tmp_path / "out.so", more=[tmp_path / "wrong.c"])
    assert not (tmp_path / "out.so").exists()


def test_the_loop_exports_only_its_module() -> None:
    nm = shutil.which("nm")
    if nm is None:
        pytest.skip("no nm (binutils)")
    extension = ROOT / "pyvmm" / build.EXTENSION
    out = subprocess.run([nm, "-D", "--defined-only", extension], capture_output=True, text=True, check=True).stdout
    assert [line.split()[-1] for line in out.splitlines()] == ["PyInit__native"]
