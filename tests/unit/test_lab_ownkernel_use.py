# SPDX-License-Identifier: Apache-2.0
"""The project's own kernel as the lab's host, and ``pyvmm lab kernel``."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from pyvmm import cli, lab
from pyvmm.cli import lab as cli_lab
from pyvmm.lab import image, kernels, needs, ownkernel, rootfs
from pyvmm.lab.cache import FileRecord, Image, file_sha256
from pyvmm.lab.cache import Manifest as ImageManifest
from pyvmm.lab.ownkernel import Variant
from pyvmm.lab.qemu import LabOptions
from pyvmm.labenv import IN_LAB
from tests.unit.kernel_world import World


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    return World(tmp_path, monkeypatch)


# ---- as the lab's host


@pytest.fixture
def debians(world: World, monkeypatch: pytest.MonkeyPatch) -> Image:
    """Put an image with Debian's kernel into the cache."""
    monkeypatch.setattr(rootfs, "recipe_hash", lambda: "r")
    with world.cache.lock(lambda: None), world.cache.scratch() as scratch:
        files = {}
        for name in ("Image", "root.cpio"):
            (scratch / name).write_bytes(b"debian")
            files[name] = FileRecord(6, file_sha256(scratch / name))
        manifest = ImageManifest("9.9-arm64", "2026-01-02T03:04:05+00:00", "http://m", "r", [], files)
        return world.cache.adopt(scratch, manifest)


def test_own_builds_the_kernel_and_boots_it_with_the_root_of_debians_image(world: World, debians: Image) -> None:
    assert kernels.find("own") == kernels.OWN
    assert image.usable_image(world.cache, kernel="own") is None
    made = image.build_image("own", cache=world.cache)
    assert (made.root, made.release) == (debians.root, "9.9.1-pyvmm")
    assert made.kernel.read_bytes() == b"7.3"
    assert not made.has_modules
    assert image.usable_image(world.cache, kernel="own", thorough=True) == made


# ---- the command


@pytest.fixture
def no_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    for check in ("require", "require_for_kernel"):
        monkeypatch.setattr(needs, check, lambda **_: None)


@pytest.mark.usefixtures("no_needs")
def test_lab_kernel_prints_the_expected_cost_and_then_the_kernel_and_its_path(
    world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["lab", "kernel"]) == 0
    said = capsys.readouterr()
    kernel = ownkernel.current_kernel(world.cache)
    assert kernel is not None
    of = "9.9.1-pyvmm, of linux-source-7.3 1"
    assert said.out == f"host: {of}: {kernel.path}\nguest: {of}: {world.guest().path}\n"
    assert "kernel for host and guest from Debian's source" in said.err
    assert cli_lab.COST in said.err
    assert "pyvmm: lab: unpacking the source\n" in said.err
    assert cli.main(["lab", "kernel"]) == 0
    assert capsys.readouterr() == (said.out, "")


@pytest.mark.usefixtures("no_needs", "debians")
def test_the_lab_builds_own_at_the_first_request_and_boots_it(
    world: World, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    booted = []

    class FakeLab:
        def __init__(self, _options: LabOptions, *, image: Image, **_: Any) -> None:
            booted.append(image)

        def __enter__(self) -> Any:
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def run(self, *_: list[str], **__: Any) -> int:
            return 42

    monkeypatch.setattr(lab, "Lab", FakeLab)
    monkeypatch.delenv(IN_LAB, raising=False)
    assert cli.main(["lab", "exec", "--host-kernel", "own", "true"]) == 42
    kernel = ownkernel.current_kernel(world.cache)
    assert kernel is not None
    assert booted[0].kernel == kernel.path
    assert "building the project's own kernel for host from" in capsys.readouterr().err
    assert ownkernel.current_kernel(world.cache, Variant.GUEST) is None


@pytest.mark.usefixtures("no_needs")
def test_status_shows_the_kernel(
    world: World, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(needs, "needs", list)
    cli.main(["lab", "status"])
    said = capsys.readouterr().out
    for name in ("own", "own:"):
        assert re.search(rf"^{name} +none yet \(pyvmm lab kernel\)$", said, re.MULTILINE)
    host = world.build()
    kernels = {"own": ("kernel", host), "own:": ("guest_kernel", world.guest())}
    cli.main(["lab", "status"])
    said = capsys.readouterr().out
    for name, (_, kernel) in kernels.items():
        assert re.search(rf"^{name} +9.9.1-pyvmm, .*{kernel.path}$", said, re.MULTILINE)
    cli.main(["lab", "status", "--json"])
    told = json.loads(capsys.readouterr().out)
    for key, kernel in kernels.values():
        assert told[key]["path"] == str(kernel.path)
    world.compiler("14.1.0")
    cli.main(["lab", "status"])
    said = capsys.readouterr().out
    for name in kernels:
        assert re.search(rf"^{name} +to be built again: .*another compiler", said, re.MULTILINE)
