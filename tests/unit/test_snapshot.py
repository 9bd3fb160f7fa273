# SPDX-License-Identifier: Apache-2.0
"""Snapshots as files: sparse, complete or absent, and refused if they are damaged. Needs no KVM."""

from __future__ import annotations

import errno
import json
import os
import struct
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyvmm.cli import make_parser, with_file
from pyvmm.cli.run import TABLE
from pyvmm.devices.exit_targets import ExitTargets
from pyvmm.devices.kinds.disk import Disk
from pyvmm.devices.virtio import vsock_host
from pyvmm.errors import HostError, PyvmmError, UsageError
from pyvmm.kvm.stand_in import StandIn
from pyvmm.machine import saving, state
from pyvmm.machine.config import MachineConfig
from pyvmm.machine.machine import Machine
from pyvmm.machine.plan import Plan
from pyvmm.machine.snapshot import VERSION, Snapshot, runs
from pyvmm.memory.address import Gpa
from pyvmm.memory.userfault import Userfault
from pyvmm.options import entries
from pyvmm.options.written import machine_options
from pyvmm.protection import Protection

RAM, PAGE, MIB = 0x8000_0000, 4096, 1 << 20
STATE: dict[str, Any] = {"vcpus": [], "gic": None, "devices": []}


def plan(protection: Protection = Protection.NONE, **more: Any) -> Plan:
    return Plan(MachineConfig("payload:hello", protection, memory=8 * MIB, **more))


def broken(error: PyvmmError) -> None:
    raise AssertionError(error)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[Machine]:
    """Make a machine in which only memory is real, with a few written pages."""
    monkeypatch.setattr(saving, "_state", lambda _machine: STATE)
    with plan() as made:
        made.machine.memory.write(RAM + 3 * MIB + 5, b"here")
        made.machine.memory.write(RAM + 5 * MIB, bytes(2 * PAGE))  # allocated, but zeros
        yield made.machine


def test_memory_is_sparse_in_the_file_and_is_restored_unchanged(
    machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = str(tmp_path / "guest")
    written = saving.save(machine, path, options="cpus = 1\n")
    about = os.stat(path)
    assert about.st_size == written["bytes"]
    assert about.st_mode & 0o777 == 0o600
    assert about.st_blocks * 512 <= written["pages"] * PAGE + 64 * 1024
    contents = machine.memory.read(RAM, 8 * MIB)
    assert written["pages"] == sum(any(contents[at : at + PAGE]) for at in range(0, 8 * MIB, PAGE))
    monkeypatch.setattr(Userfault, "open", lambda: (_ for _ in ()).throw(HostError("no userfaultfd here")))
    with Snapshot(path) as snapshot, plan(cpus=1) as other:
        assert snapshot.options == "cpus = 1\n"
        [slot] = other.machine.memory.slots
        other.machine.memory.fill(RAM, 8 * MIB)
        monkeypatch.setattr(other.machine, "failed", broken)
        snapshot._restore_memory(other.machine, slot, snapshot.description["memory"][0])
        assert other.machine.memory.read(RAM, 8 * MIB) == contents


def test_a_snapshot_of_memory_on_demand_reads_all_of_memory(
    machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sparse = saving.save(machine, str(tmp_path / "a"))
    looked_at: list[int] = []
    read = machine.memory.read

    def counting(gpa: int, size: int) -> bytes:
        looked_at.append(size)
        return read(Gpa(gpa), size)

    monkeypatch.setattr(Machine, "lazy", True)
    monkeypatch.setattr(machine.memory, "read", counting)
    whole = saving.save(machine, str(tmp_path / "b"))
    assert sum(looked_at) == 8 * MIB
    assert whole == sparse
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


@pytest.mark.parametrize("fails", ["pwrite", "ftruncate", "fsync", "rename"])
def test_a_snapshot_that_cannot_be_written_leaves_the_old_file_unchanged(
    machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: str
) -> None:
    path = tmp_path / "guest"
    path.write_text("the last one")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, fails, full)
    with pytest.raises(PyvmmError, match="cannot be written: No space left"):
        saving.save(machine, str(path))
    assert path.read_text() == "the last one"
    assert [each.name for each in tmp_path.iterdir()] == ["guest"]
    assert not machine.paused


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda _: b"", "is not a snapshot"),
        (lambda data: b"#!/bin/sh\n" + data, "is not a snapshot"),
        (lambda data: data[:8] + struct.pack("<I", VERSION + 1) + data[12:], "format 3, but this pyvmm reads format 2"),
        (lambda data: data[:-PAGE], "is damaged: it should have"),
        (lambda data: data + b"x", "is damaged: it should have"),
        (lambda data: data[:4200] + b"\0" + data[4201:], "description does not match its checksum"),
        (lambda data: data[:20] + b"\xff" * 3 + data[23:], "description does not match its checksum"),
    ],
    ids=["empty", "another", "version", "cut", "longer", "description", "size"],
)
def test_a_damaged_file_is_refused(machine: Machine, tmp_path: Path, damage: Any, words: str) -> None:
    path = tmp_path / "guest"
    saving.save(machine, str(path))
    path.write_bytes(damage(path.read_bytes()))
    before = set(os.listdir("/proc/self/fd"))
    with pytest.raises(UsageError, match=words):
        Snapshot(str(path))
    assert set(os.listdir("/proc/self/fd")) == before


def test_a_file_that_is_not_a_snapshot_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "missing", tmp_path):
        with pytest.raises(UsageError, match=r"snapshot .* cannot be"):
            Snapshot(str(path))


@pytest.mark.parametrize("protection", [Protection.PKVM, Protection.EMULATED])
def test_a_protected_guest_is_refused_with_the_reason(protection: Protection, tmp_path: Path) -> None:
    with plan(protection) as made, pytest.raises(UsageError, match=r"cannot be saved: .* host"):
        saving.save(made.machine, str(tmp_path / "guest"))


def test_memory_that_the_host_cannot_read_is_refused(tmp_path: Path) -> None:
    with (
        Plan(MachineConfig("payload:hello", memory=16 * MIB, backing="private")) as made,
        pytest.raises(UsageError, match="the host cannot read a private guest_memfd"),
    ):
        saving.save(made.machine, str(tmp_path / "guest"))


def test_another_machine_is_refused_with_the_difference(machine: Machine, tmp_path: Path) -> None:
    path = str(tmp_path / "guest")
    saving.save(machine, path)
    with (
        Snapshot(path) as snapshot,
        plan(cpus=2) as other,
        pytest.raises(UsageError, match="of a machine with cpus 1, but this one has 2"),
    ):
        snapshot.enter(other.machine)


def test_the_hint_for_a_missing_disk_says_to_restore_it_and_not_to_create_one(machine: Machine, tmp_path: Path) -> None:
    path = str(tmp_path / "guest")
    saving.save(machine, path)
    settings = machine.config._replace(devices=(Disk(str(tmp_path / "disk")),))
    with pytest.raises(UsageError, match=r"disk .* is missing") as refused:
        Machine(settings, kernel=StandIn(), start=Snapshot(path)).__enter__()
    assert "restore it with" in str(refused.value.hint)


def test_devices_are_saved_before_the_interrupts_that_they_may_still_raise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []

    def saves(what: str) -> Any:
        def save(*_: object) -> dict[str, Any]:
            order.append(what)
            return {}

        return save

    monkeypatch.setattr(ExitTargets, "save", saves("device"))
    monkeypatch.setattr(state, "save_gic", saves("gic"))
    monkeypatch.setattr(state, "save_vcpu", lambda _vcpu: {})
    monkeypatch.setattr(saving, "lib", SimpleNamespace(pv_settle=lambda _native: 0))
    with plan() as made:
        saving.save(made.machine, str(tmp_path / "guest"))
    assert order == ["device", "gic"]


@pytest.mark.parametrize("kind", ["rng", "balloon"])
def test_memory_is_restored_at_once_if_there_is_a_balloon(
    machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    path = str(tmp_path / "guest")
    saving.save(machine, path)
    opened: list[int] = []

    def no_userfault() -> None:
        opened.append(1)
        raise HostError("no userfaultfd here")

    monkeypatch.setattr(Userfault, "open", no_userfault)
    with Snapshot(path) as snapshot, plan() as other:
        snapshot.description["devices"] = [{"device": kind}]
        monkeypatch.setattr(other.machine, "failed", broken)
        snapshot._restore_memory(other.machine, other.machine.memory.slots[0], snapshot.description["memory"][0])
    assert bool(opened) is (kind == "rng")


def test_a_machine_that_was_never_started_closes_its_snapshot(machine: Machine, tmp_path: Path) -> None:
    class NoKvm(StandIn):
        def open(self, path: str) -> int:
            raise FileNotFoundError(errno.ENOENT, "No such file or directory", path)

    path = str(tmp_path / "guest")
    saving.save(machine, path)
    before = set(os.listdir("/proc/self/fd"))
    with pytest.raises(HostError, match="no KVM"), Machine(machine.config, kernel=NoKvm(), start=Snapshot(path)):
        pass
    assert set(os.listdir("/proc/self/fd")) == before


@given(st.lists(st.booleans(), max_size=40))
def test_runs_are_the_pages_that_are_not_zero(pages: list[bool]) -> None:
    data = b"".join((b"\0" * 4095 + b"\1") if page else bytes(PAGE) for page in pages)
    found = list(runs(data))
    assert [any(first <= PAGE * page < last for first, last in found) for page in range(len(pages))] == pages
    assert all(left[1] < right[0] for left, right in pairwise(found))


# -- the command line


def parse(*words: str) -> Any:
    return make_parser(words).parse_args(words)


def test_a_snapshot_brings_the_options_of_its_machine_and_no_others(machine: Machine, tmp_path: Path) -> None:
    path = str(tmp_path / "guest")
    saved = parse(
        "run", "-c", "2", "-p", "a b", "--serial", "none", "--socket", "x", "--deadline", "9", "payload:puppet"
    )
    saving.save(machine, path, options=machine_options(saved, TABLE, os.getcwd()))
    line = ["run", "--restore", path, "--deadline", "5"]
    expanded, args = with_file(line, parse(*line))
    assert (args.kernel_option, args.cpus, args.params) == ("payload:puppet", 2, ["a b"])
    assert args.serial == parse("run").serial != "none"
    assert (args.socket, args.deadline, args.restore) == (None, 5.0, path)
    # The lab reads the words it was sent, with the same result.
    assert vars(with_file(expanded, args)[1]) == vars(args)


def test_a_second_guest_of_a_snapshot_gets_its_own_files_on_the_command_line(machine: Machine, tmp_path: Path) -> None:
    path = str(tmp_path / "guest")
    saved = parse(
        "run", "-d", "/a", "-d", "/b,ro", "--net", "tap=t0", "--vsock", "uds=/v,cid=3", "--rng", "-k", "payload:puppet"
    )
    saving.save(machine, path, options=machine_options(saved, TABLE, os.getcwd()))
    line = ["run", "--restore", path, "-d", "/copy", "-d", "/b,ro", "--net", "tap=t1", "--vsock", "uds=/w,cid=3"]
    args = with_file(line, parse(*line))[1]
    assert [disk["path"] for disk in args.disk] == ["/copy", "/b"]
    assert [card["tap"] for card in args.net] == ["t1"]
    assert (args.vsock, args.rng) == ({"uds": "/w", "cid": 3}, True)


def test_the_files_of_a_machine_are_found_from_any_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved = parse(
        "run",
        "-d",
        "a.img,ro",
        "-d",
        "queues=2,path=b.img",
        "--disk=/c,serial=x",
        "--net",
        "socket=p,mac=2:0:0:0:0:1",
        "--net",
        "tap=t",
        "--vsock",
        "cid=3,uds=dir/v",
        "--console",
        "file=log,1",
        "-k",
        "payload:puppet",
    )
    monkeypatch.chdir(tmp_path)
    read = {entry.key: entry.value for entry in entries.parse(machine_options(saved, TABLE, os.getcwd()))}
    assert read["disk"] == [f"path={tmp_path}/a.img,ro", f"queues=2,path={tmp_path}/b.img", "path=/c,serial=x"]
    assert read["net"] == [f"socket={tmp_path}/p,mac=2:0:0:0:0:1", "tap=t"]
    assert (read["vsock"], read["console"]) == (f"cid=3,uds={tmp_path}/dir/v", f"file={tmp_path}/log,1")
    assert read["kernel"] == "payload:puppet"
    (tmp_path / "a,b").mkdir()
    monkeypatch.chdir(tmp_path / "a,b")
    with pytest.raises(UsageError, match="contains a comma"):
        machine_options(saved, TABLE, os.getcwd())
    assert "file=" in machine_options(parse("run", "--console", "file=log", "-k", "payload:puppet"), TABLE, os.getcwd())


@pytest.mark.parametrize(
    ("option", "key", "rest", "longest"),
    [("net", "socket", "", 107), ("vsock", "uds", ",cid=3", vsock_host.LONGEST_PATH)],
)
def test_a_socket_stays_relative_if_its_absolute_path_is_too_long(
    option: str, key: str, rest: str, longest: int
) -> None:
    directory = "/" + "é" * 20  # characters of two bytes each
    directory += "/" + "d" * (longest - len(os.fsencode(directory)) - len("//vv"))
    for said, saved in (("vv", f"{directory}/vv"), ("vvv", "vvv"), ("/" + "v" * 120, "/" + "v" * 120)):
        args = parse("run", f"--{option}", f"{key}={said}{rest}", "-k", "payload:puppet")
        [entry] = [each for each in entries.parse(machine_options(args, TABLE, directory)) if each.key == option]
        assert entry.elements == [f"{key}={saved}{rest}"]


def test_a_snapshot_finds_the_device_tree_from_any_directory() -> None:
    args = parse("run", "--dtb", "a,b.dtb", "-k", "payload:puppet")
    [entry] = [each for each in entries.parse(machine_options(args, TABLE, "/from,there")) if each.key == "dtb"]
    assert entry.value == "/from,there/a,b.dtb"


@pytest.mark.parametrize("words", [("payload:hello",), ("--config", "f")])
def test_options_that_a_snapshot_sets_are_refused_on_the_command_line(words: tuple[str, ...]) -> None:
    line = ["run", "--restore", "guest", *words]
    with pytest.raises(UsageError, match="a snapshot already has"):
        with_file(line, parse(*line))


def test_descriptions_are_json_with_the_place_of_every_part(machine: Machine, tmp_path: Path) -> None:
    path = tmp_path / "guest"
    saving.save(machine, str(path))
    text = path.read_bytes()[4096:].split(b"\0", 1)[0]
    assert json.loads(text)["machine"]["slots"] == [[RAM, 8 * MIB]]
