# SPDX-License-Identifier: Apache-2.0
"""pyvmm started in unusual places: the error is one sentence, and is not called a bug in pyvmm."""

from __future__ import annotations

import gzip
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pyvmm.errors import HostError
from pyvmm.experiment import Experiment
from pyvmm.protection import Protection
from tests.kernel_files import elf, linux_image

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent


def execute(*words: str, directory: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a command line in a directory."""
    return subprocess.run(
        [sys.executable, "-m", "pyvmm", *words],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        cwd=directory,
        stdin=subprocess.DEVNULL,
        env=os.environ | {"PYTHONPATH": str(ROOT)} | environment,
    )


# ---- a working directory that has been removed


def removed(directory: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Run a command line in a directory that was removed."""
    gone = directory / "gone"
    gone.mkdir()
    script = (
        f"import os; os.rmdir({str(gone)!r}); import sys; from pyvmm.cli import main; sys.exit(main({list(words)}))"
    )
    return subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        cwd=gone,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )


@pytest.mark.parametrize(
    "line",
    [
        "--lab run payload:hello",
        "--lab --host-kernel ./Image doctor",
        "lab exec true",
        "run --dry-run -d x.img payload:hello",
        "ctl 1 snapshot file",
    ],
)
def test_the_error_says_that_the_working_directory_was_removed(line: str, tmp_path: Path) -> None:
    done = removed(tmp_path, *line.split())
    assert (done.returncode, done.stderr.splitlines()) == (
        2,
        [
            f"pyvmm: the working directory {tmp_path}/gone has been removed",
            "  hint: cd to an existing directory, and try again",
        ],
    )


def test_commands_that_need_no_working_directory_work_without_one(tmp_path: Path) -> None:
    assert removed(tmp_path, "run", "--dry-run", "payload:hello").returncode == 0


def test_another_missing_file_is_not_taken_for_the_working_directory(tmp_path: Path) -> None:
    done = execute("run", "--dry-run", "-d", "x.img", "payload:hello", directory=tmp_path)
    assert done.returncode == 2
    assert "x.img" in done.stderr


# ---- a host of another architecture, from Python


@pytest.mark.skipif(os.uname().machine == "aarch64", reason="about hosts that are not arm64")
@pytest.mark.parametrize("protection", list(Protection))
def test_the_error_for_an_experiment_on_another_architecture_names_the_lab(protection: Protection) -> None:
    with pytest.raises(HostError, match=f"this host is {os.uname().machine}, .*arm64") as caught:
        Experiment(protection).__enter__()
    hint = caught.value.hint or ""
    assert "pyvmm lab exec -- python3 FILE" in hint
    assert "from Python, subprocess.run(" in hint


# ---- these errors are not called bugs

MAIN = "import sys; from pyvmm.cli import main; sys.exit(main(sys.argv[1:]))"
BLOCKED = f"import signal; signal.pthread_sigmask(signal.SIG_BLOCK, range(1, 65)); {MAIN}"
IGNORED = f"import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN); {MAIN}"
NO_NUMPY = f"""
import importlib.util
found = importlib.util.find_spec
importlib.util.find_spec = lambda name, *more: None if name == 'numpy' else found(name, *more)
{MAIN}"""
EXPERIMENT = """
from pyvmm.errors import HostError
from pyvmm.experiment import Experiment
from pyvmm.protection import Protection
from tests.kernel_files import elf, linux_image
try:
    Experiment(Protection.PKVM).__enter__()
except HostError as error:
    raise SystemExit(f"pyvmm: {error}") from None
"""
REMOVED = f"import os; os.rmdir(os.getcwd()); {MAIN}"
HANGING = (
    """
from pathlib import Path
from pyvmm.lab import image, needs
from pyvmm.lab.cache import Image, Manifest
needs.require = lambda **_: None
made = Image(Path("gone"), Manifest("9.9", "2026-01-02T03:04:05+00:00", "", "r", [], {}))
image.usable_image = lambda *_, **__: made
"""
    + MAIN
)
"""A lab whose QEMU is a script that never answers."""

LONG = f"console=ttyAMA0 quiet -- : {'x' * 1980}; echo would remove /mnt/data/old-backups/2019"
DISKS = [word for _ in range(64) for word in ("-d", "disk,ro,queues=16")]


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """Make a directory with all files that the command lines below name."""
    image = linux_image(10_000)
    (tmp_path / "Image").write_bytes(image)
    (tmp_path / "two.gz").write_bytes(gzip.compress(image[:5000]) + gzip.compress(image[5000:]))
    (tmp_path / "physical.elf").write_bytes(elf(entry=0x8010_0010, vaddr=0xFFFF_0000_0010_0000))
    # psci SYSTEM_RESET, and a branch to itself.
    (tmp_path / "reset.bin").write_bytes(bytes.fromhex("20018052 0080b072 020000d4 00000014"))
    (tmp_path / "disk").write_bytes(bytes(4096))
    (tmp_path / "a.jsonl").write_text("")
    qemu = tmp_path / "bin" / "qemu-system-aarch64"
    qemu.parent.mkdir()
    qemu.write_text('#!/bin/sh\n[ "$1" = --version ] && echo QEMU emulator version 9.0.0 && exit\nexec sleep 100\n')
    qemu.chmod(0o755)
    return tmp_path


@pytest.mark.parametrize(
    ("start", "words", "status", "said"),
    [
        (MAIN, ["run", "--dry-run", "-p", LONG, "Image"], 2, "2048"),
        (MAIN, ["run", "--dry-run", "-p", f"-- {'w ' * 33}", "Image"], 2, "33 words"),
        ("fake", ["run", "-p", LONG, "Image"], 2, "2048"),
        (BLOCKED, ["run", "--dry-run", "payload:hello"], 0, ""),
        ("fake", ["run", "--reboot", "--deadline", "5", "reset.bin"], 1, "ENOTTY"),
        (MAIN, ["ctl", "./none.sock", "pause"], None, "none.sock"),
        ("fake", ["run", "--vsock", "uds=v,cid=3", "payload:hello"], 1, "ENOTTY"),
        (IGNORED, ["run", "--dry-run", "payload:hello"], 0, ""),
        ("fake", ["--files", "13", "run", "payload:hello"], 5, "RLIMIT_NOFILE"),
        ("fake", ["--no-thread", "2", "run", "payload:hello"], 5, "RLIMIT_NPROC"),
        ("fake", ["--files", "1024:4096", "run", *DISKS, "payload:hello"], 1, "ENOTTY"),
        ("fake", ["--files", "1024:1024", "run", *DISKS, "payload:hello"], 5, "RLIMIT_NOFILE"),
        (REMOVED, ["--lab", "run", "payload:hello"], 2, "has been removed"),
        (REMOVED, ["run", "--dry-run", "-d", "x.img", "payload:hello"], 2, "has been removed"),
        (HANGING, ["--lab", "--lab-boot", "fresh", "--lab-boot-timeout", "0.1", "run", "payload:hello"], 1, "come up"),
        (MAIN, ["run", "--dry-run", "two.gz"], 0, ""),
        (MAIN, ["run", "--dry-run", "physical.elf"], 0, ""),
        ("fake", ["run", "debian:"], 2, "-i shell:"),
        (MAIN, ["lab", "status"], 0, ""),
        ("fake", ["run", "--pkvm", "payload:hello"], 1, "ENOTTY"),
        (MAIN, ["runn"], 2, "did you mean run"),
        (MAIN, ["--lab", "exec", "true"], 2, "pyvmm lab exec"),
        pytest.param(
            EXPERIMENT,
            [],
            1,
            "pyvmm lab exec",
            marks=pytest.mark.skipif(os.uname().machine == "aarch64", reason="about hosts that are not arm64"),
        ),
        (NO_NUMPY, ["bench", "report", "a.jsonl"], 5, "pip install numpy"),
    ],
)
def test_pyvmm_calls_no_user_error_a_bug(
    start: str, words: list[str], status: int | None, said: str, place: Path
) -> None:
    there = place
    if start is REMOVED:
        there = place / "gone"
        there.mkdir()
    command = [sys.executable, str(HERE / "fake_host.py")] if start == "fake" else [sys.executable, "-c", start]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": "rel", "HOME": ""}
    environment["PATH"] = f"{place}/bin:{environment['PATH']}"
    done = subprocess.run(
        [*command, *words],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        cwd=there,
        stdin=subprocess.DEVNULL,
        env=environment,
    )
    assert "this is a bug in pyvmm" not in done.stderr
    assert "Traceback" not in done.stderr
    assert said in done.stderr
    assert status is None or done.returncode == status, done.stderr
    assert not (place / "rel").exists()
