# SPDX-License-Identifier: Apache-2.0
"""``pyvmm lab`` and ``pyvmm --lab``: what reaches the lab, and the errors before one boots."""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pyvmm import cli, lab, plugins
from pyvmm.errors import HostError
from pyvmm.lab import image, needs, rootfs
from pyvmm.lab.cache import Cache, FileRecord, Image, Manifest, file_sha256
from pyvmm.lab.qemu import LabOptions
from pyvmm.labenv import IN_LAB
from pyvmm.syntax.paths import OutputPath, find_outputs, output_behind
from tests.unit.installed import X86, forgetting, install


class FakeLab:
    """Records its arguments instead of booting."""

    booted: dict[str, Any]
    kernel: str

    def __init__(self, options: LabOptions, **how: Any) -> None:
        type(self).booted = {"options": options, **how}

    def __enter__(self) -> FakeLab:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def run(self, command: list[str], **how: Any) -> int:
        self.booted |= {"command": command, **how}
        return 42


@pytest.fixture
def booted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[], dict[str, Any]]:
    """Return the arguments of a fake lab, once it was made."""
    made = Image(tmp_path, Manifest("9.9", "2026-01-02T03:04:05+00:00", "http://m", "r", [], {}))
    monkeypatch.setattr(lab, "Lab", FakeLab)
    monkeypatch.setattr(needs, "require", lambda **_: None)
    monkeypatch.delenv(IN_LAB, raising=False)

    def usable(kernel: str, **_: bool) -> Image:
        FakeLab.kernel = kernel
        return made

    monkeypatch.setattr(image, "usable_image", usable)
    FakeLab.booted = {}
    return lambda: FakeLab.booted


def test_exec_passes_the_command_unchanged_and_returns_its_status(booted: Callable[[], dict[str, Any]]) -> None:
    assert cli.main(["lab", "exec", "--", "sh", "-c", "exit 42", "--mode", "x"]) == 42
    assert booted()["command"] == ["sh", "-c", "exit 42", "--mode", "x"]
    assert booted()["is_tty"] is False


def test_a_verb_runs_as_python_in_the_lab_which_sees_its_files(booted: Callable[[], dict[str, Any]]) -> None:
    assert cli.main(["--lab", "run", "--protection", "pkvm", "some/Image", "-p", "a b"]) == 42
    verb = ["run", "--protection", "pkvm", "some/Image", "-p", "a b"]
    assert booted()["command"] == ["pyvmm", *verb]
    assert booted()["is_module"] is True
    assert "some/Image" in booted()["arguments"]


def test_lab_run_is_the_same_as_lab_before_the_verb(booted: Callable[[], dict[str, Any]]) -> None:
    cli.main(["--lab", "run", "payload:hello"])
    before = booted()["command"]
    cli.main(["lab", "run", "run", "payload:hello"])
    assert booted()["command"] == before


@pytest.mark.parametrize("before", [["--lab"], ["lab", "run"]])
def test_the_lab_knows_the_files_that_a_verb_writes(
    booted: Callable[[], dict[str, Any]], tmp_path: Path, before: list[str]
) -> None:
    dtb, log = str(tmp_path / "a b,c=d"), str(tmp_path / "serial")
    assert cli.main([*before, "run", "--dump-dtb", dtb, "--serial", f"file={log}", "payload:hello"]) == 42
    assert sorted(booted()["outputs"]) == [dtb, log]


def test_a_disk_that_is_not_read_only_is_writable_in_the_lab(booted: Callable[[], dict[str, Any]]) -> None:
    assert cli.main(["--lab", "run", "-d", "a.img", "--disk", "b.img,ro", "-d", "path=c.img", "payload:hello"]) == 42
    assert booted()["outputs"] == ["a.img", "c.img"]


@pytest.mark.parametrize("before", [["--lab"], ["lab", "run"]])
def test_a_file_that_cannot_be_written_is_refused_before_a_lab_boots(
    booted: Callable[[], dict[str, Any]], before: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([*before, "run", "--dump-dtb", "/no/such/place/dtb", "payload:hello"]) == 2
    assert booted() == {}
    assert "/no/such/place does not exist" in capsys.readouterr().err


def test_outputs_are_found_anywhere_in_a_command_line() -> None:
    given = Namespace(
        a=OutputPath("x"), b=["y", OutputPath("z")], c=(output_behind("file")("file=u=v"),), d="w", e=None
    )
    assert find_outputs(given) == ["x", "z", "u=v"]
    assert [type(output_behind("file")(text)) for text in ("stdio", "file=", "filed=x")] == [str] * 3


@pytest.mark.parametrize("words", [["run", "--nonsense"], ["--lab", "run", "x"], ["lab", "status"], ["--help"]])
def test_lab_run_refuses_impossible_commands_here(booted: Callable[[], dict[str, Any]], words: list[str]) -> None:
    assert cli.main(["lab", "run", *words]) == (0 if words == ["--help"] else 2)
    assert booted() == {}


@pytest.mark.parametrize(
    "words",
    [
        ["--lab", "--lab-mode", "nvhe", "--lab-icount", "--lab-mem", "1G", "run", "payload:hello"],
        ["lab", "exec", "--mode", "nvhe", "--icount", "--mem", "1G", "true"],
    ],
)
def test_options_set_the_machine_of_the_lab(booted: Callable[[], dict[str, Any]], words: list[str]) -> None:
    cli.main(words)
    options = booted()["options"]
    assert (options.mode, options.icount, options.cpus, options.memory) == ("nvhe", True, 1, 1024)


@pytest.mark.parametrize(
    ("words", "kernel"),
    [
        (["--lab", "--host-kernel", "stable", "run", "x"], "stable"),
        (["--lab", "--lab-host-kernel", "stable", "run", "x"], "stable"),
        (["--host-kernel=./Image", "--lab", "run", "x"], "./Image"),
        (["--lab", "run", "x"], "backports"),
        (["lab", "exec", "--host-kernel", "unstable", "--", "true"], "unstable"),
        (["lab", "run", "--host-kernel", "unstable", "run", "x"], "unstable"),
        (["lab", "shell"], "backports"),
    ],
)
def test_the_hosts_kernel_is_chosen_before_the_verb(
    booted: Callable[[], dict[str, Any]], words: list[str], kernel: str
) -> None:
    assert cli.main(words) == 42
    assert FakeLab.kernel == kernel
    assert not {"--host-kernel", kernel} & set(booted()["command"])


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (["--host-kernel", "stable", "run", "x"], "pyvmm --lab --host-kernel ... run ..."),
        (["--lab-mode=vhe", "demo"], "pyvmm --lab --lab-mode=vhe ... demo ..."),
        (["--host-kernel", "stable", "lab", "exec", "true"], "pyvmm lab exec --host-kernel ..."),
        (["lab", "run", "--mode", "vhe", "--", "--lab-cpus", "1", "run", "x"], "pyvmm --lab --lab-cpus ... run ..."),
    ],
)
def test_lab_options_without_a_lab_are_refused(
    booted: Callable[[], dict[str, Any]], capsys: pytest.CaptureFixture[str], words: list[str], hint: str
) -> None:
    assert cli.main(words) == 2
    assert booted() == {}
    assert f"hint: {hint}\n" in capsys.readouterr().err


@pytest.mark.usefixtures("booted")
def test_the_build_names_its_kernel(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["lab", "build", "--host-kernel", "stable"]) == 0
    assert capsys.readouterr().out.startswith("9.9, built 2026")
    assert FakeLab.kernel == "stable"


def test_an_unknown_kernel_is_a_usage_error_before_anything_is_built(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(needs, "require", lambda **_: None)
    monkeypatch.delenv(IN_LAB, raising=False)
    assert cli.main(["--lab", "--host-kernel", "stabel", "run", "x"]) == 2
    assert "hint: stable" in capsys.readouterr().err


def test_a_verb_in_a_lab_without_pkvm_says_why_it_cannot_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(IN_LAB, "1")
    assert cli.main(["lab", "exec", "true"]) == 5
    assert "does not run protected guests" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "status"),
    [
        (["lab", "exec"], 2),
        (["lab", "run", "--"], 2),
        (["lab", "exec", "--mode", "fast", "true"], 2),
        (["lab", "exec", "--icount", "--cpus", "2", "true"], 2),
        (["lab", "exec", "-t", "true"], 2),
    ],
)
def test_invalid_options_are_usage_errors(
    booted: Callable[[], dict[str, Any]], words: list[str], status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.isatty", lambda _fd: False)
    assert cli.main(words) == status
    assert booted() == {}


def test_the_error_names_everything_that_is_missing_at_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    (tmp_path / "apt-get").touch(mode=0o755)
    with pytest.raises(HostError) as caught:
        needs.require(building=True)
    for word in ("qemu-system-aarch64", "setpriv", "dpkg-deb"):
        assert word in caught.value.message
    assert "qemu-system-arm util-linux dpkg" in (caught.value.hint or "")


def test_the_error_on_a_machine_without_apt_suggests_no_package(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(HostError, match="no apt"):
        needs.require(building=True)


def test_status_without_an_image_says_so(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    cli.main(["lab", "status"])
    assert "none yet" in capsys.readouterr().out


def adopt(cache: Cache, kernel: str, recipe: str | None = None, release: str = "9.9") -> None:
    with cache.lock(lambda: None), cache.scratch() as scratch:
        (scratch / "Image").write_bytes(kernel[:3].encode())
        files = {"Image": FileRecord(3, file_sha256(scratch / "Image"))}
        recipe = recipe or rootfs.recipe_hash()
        cache.adopt(scratch, Manifest(release, "2026-01-02T03:04:05+00:00", "http://m", recipe, [], files), kernel)


def test_status_as_json_describes_the_image(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(needs, "needs", list)
    adopt(Cache(), "backports")
    adopt(Cache(), "stable")
    assert cli.main(["lab", "status", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["missing"] == []
    assert {name: (told["images"][name]["release"], told["images"][name]["size"]) for name in told["images"]} == {
        "backports": ("9.9", 3),
        "stable": ("9.9", 3),
    }


def test_status_shows_every_image(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    adopt(Cache(), "stable")
    adopt(Cache(), "unstable", recipe="of another version")
    cli.main(["lab", "status"])
    lines = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert lines["backports"] == "none yet"
    assert lines["stable"].startswith("9.9, 0 MB")
    assert lines["unstable"].startswith("to be built again")
    assert "experimental" not in lines


@pytest.mark.usefixtures("booted")
@pytest.mark.parametrize("words", [["--lab", "--host-kernel", "unstable", "doctor"], ["lab", "build", "--host-kernel"]])
def test_the_user_hears_that_an_unstable_kernel_is_older_than_the_default(
    words: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    adopt(Cache(), "backports", release="10.0")
    cli.main(words if "doctor" in words else [*words, "unstable"])
    said = capsys.readouterr().err
    assert said == "pyvmm: the lab's kernel unstable is 9.9, older than backports, which is 10.0\n"
    cli.main(["--lab", "doctor"])
    assert capsys.readouterr().err == ""


def test_status_says_which_kernel_is_older_than_the_default(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for kernel, release in {"backports": "10.0", "unstable": "9.9", "stable": "9.8"}.items():
        adopt(Cache(), kernel, release=release)
    cli.main(["lab", "status"])
    lines = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert lines["unstable"].endswith("; unstable is 9.9, older than backports, which is 10.0")
    assert "older" not in lines["stable"] + lines["backports"]


def test_packages_with_requested_plugins_are_copied_for_the_lab(
    booted: Callable[[], dict[str, Any]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    install(tmp_path, "pyvmm-dice", {"dice/__init__.py": "x = 1"}, {plugins.DEVICES: {"dice": "dice:x"}})
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(plugins, "_asked", {})
    seen: list[list[str] | None] = []

    def enter(fake: FakeLab) -> FakeLab:
        seen.append(files(fake.booted["packages"]))
        return fake

    monkeypatch.setattr(FakeLab, "__enter__", enter)
    cli.main(["--lab", "run", "payload:hello"])
    assert seen == [None]
    with forgetting(tmp_path):
        assert plugins.find(plugins.DEVICES, "dice", int) == 1
    cli.main(["--lab", "run", "payload:hello"])
    info = "pyvmm_dice-1.0.dist-info"
    assert seen[1] == ["dice/__init__.py", f"{info}/METADATA", f"{info}/entry_points.txt"]
    assert not booted()["packages"].exists()


def files(directory: Path | None) -> list[str] | None:
    """Return the files in a directory by relative path."""
    if directory is None:
        return None
    return sorted(str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file())


def test_a_package_that_the_lab_cannot_run_is_refused_before_a_lab_boots(
    booted: Callable[[], dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    install(tmp_path, "pyvmm-fast", {"fast.py": "x = 1"}, {plugins.DEVICES: {"fast": "fast:x"}}, {"_fast.so": X86})
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(plugins, "_asked", {})
    assert plugins.find(plugins.DEVICES, "fast", int) == 1
    assert cli.main(["--lab", "run", "payload:hello"]) == 2
    assert booted() == {}
    why = f"{tmp_path}/_fast.so is compiled for another machine"
    assert capsys.readouterr().err.splitlines() == [
        f"pyvmm: the package pyvmm-fast cannot be shown to the lab: {why}",
        "  hint: run this on an arm64 host that has the package installed",
    ]
