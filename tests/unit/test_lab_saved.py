# SPDX-License-Identifier: Apache-2.0
"""Saved boots without QEMU: their names, their limits, errors, and the dialogue with QEMU's monitor."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import stat
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pyvmm.lab import LabError, LabOptions, frames, kernels, saved
from pyvmm.lab.cache import FileRecord, Image, Manifest
from pyvmm.lab.monitor import Monitor, MonitorError
from pyvmm.lab.qemu import Ram

MEMORY = 512
OPTIONS = LabOptions(memory=MEMORY)


@pytest.fixture
def image(tmp_path: Path) -> Image:
    files = {name: FileRecord(1, name) for name in ("Image", "root.cpio")}
    return Image(tmp_path, Manifest("9.9", "2026-01-02T03:04:05+00:00", "http://m", "r", [], files))


@pytest.fixture
def program(tmp_path: Path) -> str:
    path = tmp_path / "qemu"
    path.write_text("#!/bin/sh\necho QEMU emulator version 9.0.0\n")
    path.chmod(0o755)
    return str(path)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "pyvmm" / "lab" / "boots"


class FakeQemu:
    """A machine that boots, and whose monitor saves it."""

    made = 0
    state = b"the state"
    answer = (frames.READY, b"")

    def __init__(self, *_: object, ram: Ram) -> None:
        FakeQemu.made += 1
        os.pwrite(ram.file, b"the ram", 0)
        self.channel, self._agent = socket.socketpair()
        self._agent.sendall(frames.pack(*self.answer) + frames.pack(frames.DONE))
        self.monitor = self

    def save(self) -> bytes:
        return self.state

    def failed(self, what: str, *, ended: bool, hint: str | None = None) -> LabError:
        return LabError(what + str(ended), [], "", hint=hint)

    def stop(self) -> None:
        self.channel.close()
        self._agent.close()


@pytest.fixture
def boots(monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """Return a list that counts the boots of labs."""
    monkeypatch.setattr(saved, "Qemu", FakeQemu)
    FakeQemu.made = 0
    return lambda: FakeQemu.made


def take(program: str, image: Image, options: LabOptions = OPTIONS) -> Path | None:
    boot = saved.find_or_save(program, image, options)
    if boot is None:
        return None
    boot.close()
    return boot.directory


def test_the_first_lab_is_saved_and_later_ones_find_it(
    program: str, image: Image, home: Path, boots: Callable[[], int]
) -> None:
    first = saved.find_or_save(program, image, OPTIONS)
    assert first is not None
    assert (first.state, first.version) == (b"the state", "9.0.0")
    assert os.pread(first.ram.file, 7, 0) == b"the ram"
    assert os.fstat(first.ram.file).st_size == MEMORY << 20
    first.close()
    assert take(program, image) == first.directory
    assert boots() == 1
    assert first.directory.parent == home


def test_only_its_user_can_read_a_saved_boot(program: str, image: Image, home: Path, boots: Callable[[], int]) -> None:
    directory = take(program, image)
    assert directory is not None
    assert {stat.S_IMODE(path.stat().st_mode) for path in directory.iterdir()} == {0o600}
    assert {stat.S_IMODE(path.stat().st_mode) for path in (directory, home)} == {0o700}
    assert boots() == 1


def test_each_property_of_the_machine_selects_a_separate_saved_boot(
    program: str, image: Image, home: Path, boots: Callable[[], int], tmp_path: Path
) -> None:
    kernel = tmp_path / "kernel"
    kernel.write_bytes(b"one")
    file = replace(image, file=kernels.KernelFile(kernel, "9.9"))
    records = {**image.manifest.files, "root.cpio": FileRecord(1, "other")}
    kinds = [
        take(program, image),
        take(program, image, LabOptions(memory=MEMORY, cpus=1)),
        take(program, image, LabOptions(memory=2 * MEMORY)),
        take(program, image, LabOptions(memory=MEMORY, mode="nvhe")),
        take(program, replace(image, manifest=replace(image.manifest, files=records))),
        take(program, file),
    ]
    kernel.write_bytes(b"two")
    kinds.append(take(program, file))
    Path(program).touch()
    kinds.append(take(program, image))
    assert len(set(kinds)) == len(kinds) == boots()
    assert None not in kinds
    # The timeout and the way to start do not select another one.
    assert take(program, image, LabOptions(memory=MEMORY, boot_timeout=7.0)) == kinds[-1]
    assert home.is_dir()


@pytest.mark.parametrize(
    "options", [LabOptions(boot="fresh"), LabOptions(icount=True, cpus=1), LabOptions(verbose=True)], ids=str
)
def test_some_labs_always_boot_despite_a_saved_boot(options: LabOptions) -> None:
    assert saved.may_be_saved(LabOptions())
    assert not saved.may_be_saved(options)


def test_a_lab_that_fails_to_boot_says_so_and_leaves_nothing(
    program: str, image: Image, home: Path, boots: Callable[[], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FakeQemu, "answer", (frames.READY, b"of another version"))
    with pytest.raises(LabError, match="another version's"):
        take(program, image)
    assert boots() == 1
    assert list(home.glob("*/ram")) == []


@pytest.mark.parametrize("cause", ["busy", "full", "refused"])
def test_a_boot_that_cannot_be_saved_leaves_no_saved_boot(
    cause: str, program: str, image: Image, home: Path, boots: Callable[[], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: FakeQemu) -> bytes:
        raise MonitorError("State blocked by a device")

    home.mkdir(parents=True)
    with (home / "lock").open("w") as other:
        match cause:
            case "busy":
                fcntl.flock(other, fcntl.LOCK_EX)
            case "full":
                monkeypatch.setattr(saved, "ROOM", 1 << 60)
            case "refused":
                monkeypatch.setattr(FakeQemu, "save", refuse)
        assert take(program, image) is None
    assert boots() == (1 if cause == "refused" else 0)
    assert list(home.glob("*/ram")) == []


def test_the_most_recently_used_boots_are_kept_within_the_limit(
    program: str, image: Image, home: Path, boots: Callable[[], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    labs = [LabOptions(memory=MEMORY + number) for number in range(3)]
    first, second = (take(program, image, options) for options in labs[:2])
    assert first is not None
    assert second is not None
    count, size = saved.disk_use()
    assert count == 2
    monkeypatch.setattr(saved, "LIMIT", size)
    os.utime(first, (2, 2))
    os.utime(second, (1, 1))
    assert take(program, image, labs[0]) == first  # this counts as a use
    third = take(program, image, labs[2])
    assert set(home.glob("*/ram")) == {path / "ram" for path in (first, third) if path is not None}
    assert boots() == 3


@pytest.mark.parametrize("name", ["ram", "state", "about.json"])
def test_a_saved_boot_that_lacks_a_file_is_made_again(
    name: str, program: str, image: Image, home: Path, boots: Callable[[], int]
) -> None:
    directory = take(program, image)
    assert directory is not None
    (directory / name).unlink()
    assert take(program, image) == directory
    assert boots() == 2
    assert (directory / name).is_file()
    assert directory.parent == home


def test_a_renewal_carries_the_time_and_bytes_that_differ() -> None:
    first, second = saved.renewal(), saved.renewal()
    assert first[:5] == second[:5]
    assert first[13:] != second[13:]
    times = [int.from_bytes(frame[5:13], "little") for frame in (first, second)]
    assert 1_700_000_000_000_000_000 < times[0] <= times[1]


# ---- QEMU's monitor


@contextmanager
def monitor(answers: dict[str, Any], asked: list[str]) -> Iterator[Monitor]:
    """Return a monitor whose other end gives ``answers`` to the commands, with events in between."""
    ours, theirs = socket.socketpair()

    def serve() -> None:
        state: socket.socket | None = None
        theirs.sendall(b'{"QMP": {}}\n')
        while True:
            data, fds, _, _ = socket.recv_fds(theirs, 65536, 1)
            if not data:
                return
            if fds:
                state = socket.socket(fileno=fds[0])
            command = json.loads(data)["execute"]
            asked.append(command)
            answer = answers.get(command, {"return": {}})
            theirs.sendall(b'{"event": "STOP"}\n' + json.dumps(answer).encode() + b"\n")
            if command == "migrate" and state is not None:
                with state, contextlib.suppress(BrokenPipeError):  # a refused migration's reader goes away
                    state.sendall(b"x" * 200_000)
            if command == "migrate-incoming" and state is not None:
                with state:
                    asked.append(state.recv(100).decode())

    thread = threading.Thread(target=serve)
    thread.start()
    made = Monitor(ours)
    try:
        yield made
    finally:
        made.close()
        thread.join()
        theirs.close()


def test_a_state_is_read_whole_and_without_ram() -> None:
    asked: list[str] = []
    with monitor({"query-migrate": {"return": {"status": "completed"}}}, asked) as it:
        assert it.save() == b"x" * 200_000
    assert asked == ["qmp_capabilities", "migrate-set-capabilities", "getfd", "migrate", "query-migrate"]


def test_a_state_is_passed_to_qemu() -> None:
    asked: list[str] = []
    with monitor({}, asked) as it:
        it.restore(b"the state")
    assert asked == ["qmp_capabilities", "migrate-set-capabilities", "getfd", "migrate-incoming", "the state"]


@pytest.mark.parametrize(
    ("answers", "words"),
    [
        ({"migrate": {"error": {"desc": "blocked by 9p"}}}, "refused migrate: blocked by 9p"),
        ({"query-migrate": {"return": {"status": "failed", "error-desc": "no space"}}}, "no space"),
        ({"qmp_capabilities": 7}, "no object"),
    ],
)
def test_a_refusal_of_qemu_is_reported(answers: dict[str, Any], words: str) -> None:
    with monitor(answers, []) as it, pytest.raises(MonitorError, match=words):
        it.save()


def test_a_qemu_that_has_ended_is_reported() -> None:
    ours, theirs = socket.socketpair()
    theirs.close()
    it = Monitor(ours)
    with pytest.raises(MonitorError, match="no answer"):
        it.save()
    it.close()
