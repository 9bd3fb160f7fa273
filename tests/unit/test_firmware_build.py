# SPDX-License-Identifier: Apache-2.0
"""The shipped payloads are built from the sources."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import sys
from pathlib import Path
from types import ModuleType

import pytest

from pyvmm import payloads

ROOT = Path(__file__).parents[2]
FIRMWARE = ROOT / "firmware"


def _load_build() -> ModuleType:
    spec = importlib.util.spec_from_file_location("firmware_build", FIRMWARE / "build.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


build = _load_build()
MANIFEST = json.loads(Path(payloads.MANIFEST).read_text())


@pytest.fixture(scope="module")
def compiler() -> str:
    try:
        return str(build.find_compiler())
    except build.BuildError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def rebuilt(compiler: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, object]]:
    out = tmp_path_factory.mktemp("payloads")
    return out, build.build_all(out, compiler)


def test_the_shipped_payloads_were_built_from_these_sources() -> None:
    assert MANIFEST["sources"] == build.sources_hash(), "run python firmware/build.py and commit what it makes"


def test_the_manifest_describes_the_shipped_bytes() -> None:
    shipped = {name: build.entry(payloads.payload(name)) for name in payloads.names()}
    assert shipped == MANIFEST["payloads"]


def test_rebuilding_gives_the_shipped_bytes(compiler: str, rebuilt: tuple[Path, dict[str, object]]) -> None:
    """Checks equality with the same compiler. Another one may lay out code differently, but may not grow it much."""
    out, _ = rebuilt
    same_compiler = build.compiler_version(compiler) == MANIFEST["compiler"]
    for name in build.names():
        new, old = (out / f"{name}.bin").read_bytes(), payloads.payload(name)
        if same_compiler:
            assert new == old, name
        else:
            assert build.HEADER.unpack_from(new)[1] == build.MAGIC
            assert abs(len(new) - len(old)) < len(old) / 2, (name, len(new), len(old))


def test_a_source_that_depends_on_its_address_is_refused(
    compiler: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree = tmp_path / "firmware"
    shutil.copytree(FIRMWARE, tree)
    (tree / "payloads" / "bad.c").write_text(
        '#include "../lib/lib.h"\nconst char *table[2] = {"a", "b"};\n'
        'int main(void)\n{\n    print("%s", table[board.cpu_count & 1]);\n    return 0;\n}\n'
    )
    monkeypatch.setattr(build, "HERE", tree)
    with pytest.raises(build.BuildError, match=r"bad: not position independent: the byte at 0x[0-9a-f]+"):
        build.build("bad", compiler)


def test_no_payload_uses_floating_point_or_outline_atomics() -> None:
    assert {"-mgeneral-regs-only", "-mno-outline-atomics"} <= set(build.COMPILE)


def test_sizes_stay_small() -> None:
    for name in payloads.names():
        assert len(payloads.payload(name)) <= 16 << 10, name
        assert payloads.memory_of(payloads.payload(name)) <= 256 << 10, name


def test_the_library_stays_small() -> None:
    lines = sum(len(path.read_text().splitlines()) for path in (FIRMWARE / "lib").glob("*.c"))
    assert lines <= 500


@pytest.mark.parametrize("path", sorted((FIRMWARE / "payloads").glob("*.c")), ids=lambda p: p.stem)
def test_a_payload_with_parameters_documents_each(path: Path) -> None:
    source = path.read_text()
    read = set(re.findall(r'argument(?:_is|_number)?\("(\w+)"', source))
    assert read == set(payloads.USAGE[path.stem].params)


def test_every_way_to_crash_is_listed() -> None:
    source = (FIRMWARE / "payloads" / "crash.c").read_text()
    ways = re.findall(r'argument_is\("way", "([\w-]+)"\)', source)
    listed = payloads.USAGE["crash"].params["way"].removesuffix(" (undefined)").split(", ")
    assert listed == ways
