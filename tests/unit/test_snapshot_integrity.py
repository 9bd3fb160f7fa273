# SPDX-License-Identifier: Apache-2.0
"""Snapshots that are damaged, made by hand, or written in a hostile place: refused with a sentence, or safe. No KVM."""

from __future__ import annotations

import copy
import errno
import json
import os
import stat
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyvmm.devices.kind import DeviceSpec
from pyvmm.devices.kinds.balloon import Balloon
from pyvmm.devices.kinds.disk import Disk
from pyvmm.devices.kinds.rng import Rng
from pyvmm.devices.kinds.vsock import Vsock
from pyvmm.errors import HostError, PyvmmError, UsageError
from pyvmm.machine import saving
from pyvmm.machine.config import MachineConfig
from pyvmm.machine.machine import Machine
from pyvmm.machine.plan import Plan
from pyvmm.machine.snapshot import DESCRIPTION, Snapshot, checksums, header
from pyvmm.memory.userfault import Userfault

RAM, MIB, PAGE = 0x8000_0000, 1 << 20, 4096
SIZE = 8 * MIB
WRITTEN = 3 * MIB
"""Where the saved guest has data, from the start of its memory."""


def plan(**more: Any) -> Plan:
    return Plan(MachineConfig("payload:hello", memory=SIZE, **more))


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[Machine]:
    """Make a machine with real memory and a simulated kernel."""
    monkeypatch.setattr(saving, "lib", SimpleNamespace(pv_settle=lambda _native: 0))
    monkeypatch.setattr(Userfault, "open", no_userfault)
    with plan() as made:
        made.machine.memory.write(RAM + WRITTEN, b"here" * PAGE)
        yield made.machine


def no_userfault() -> Userfault:
    raise HostError("no userfaultfd here")


class Edited:
    """A snapshot file whose parts can be changed."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with Snapshot(str(path)) as snapshot:
            self.description = snapshot.description
        self.region = self.description["memory"][0]

    def save(self, text: bytes | None = None) -> None:
        """Write the description back, or ``text`` in its place, with the checksum that belongs to it."""
        text = json.dumps(self.description).encode() if text is None else text
        with self.path.open("r+b") as file:
            file.write(header(text, self.path.stat().st_size))
            file.seek(DESCRIPTION)
            file.write(text)

    def flip(self, offset: int) -> None:
        """Flip a bit of the byte at ``offset``."""
        with self.path.open("r+b") as file:
            byte = os.pread(file.fileno(), 1, offset)
            os.pwrite(file.fileno(), bytes([byte[0] ^ 4]), offset)


@pytest.fixture
def edited(machine: Machine, tmp_path: Path) -> Edited:
    saving.save(machine, str(tmp_path / "guest"))
    return Edited(tmp_path / "guest")


def restore(path: Path, **more: Any) -> bytes:
    """Restore the snapshot into a planned machine, and return that one's memory."""
    with Snapshot(str(path)) as snapshot, plan(**more) as other:
        snapshot.enter(other.machine)
        return other.machine.memory.read(RAM, SIZE)


# -- checksums of memory


@given(st.lists(st.sampled_from([bytes(PAGE), b"\xff" * PAGE, os.urandom(PAGE), b"\0" * 4095 + b"\1"]), max_size=5))
def test_checksums_are_those_of_zlib_from_zero_and_not_inverted(pages: list[bytes]) -> None:
    sums = checksums(b"".join(pages))
    expected = [zlib.crc32(page, 0xFFFF_FFFF) ^ 0xFFFF_FFFF for page in pages]
    assert [int.from_bytes(sums[at : at + 4], "little") for at in range(0, len(sums), 4)] == expected
    assert checksums(bytes(PAGE)) == bytes(4)


def test_an_undamaged_file_passes_and_is_restored(machine: Machine, edited: Edited) -> None:
    with Snapshot(str(edited.path)) as snapshot:
        snapshot.verify()
    assert restore(edited.path) == machine.memory.read(RAM, SIZE)


@pytest.mark.parametrize(
    ("damage", "gpa"),
    [
        (lambda file: file.flip(file.region["offset"] + WRITTEN), "0x8030_0000"),
        (lambda file: file.flip(file.region["offset"] + WRITTEN + 4 * PAGE - 1), "0x8030_3000"),
        (lambda file: file.flip(file.region["offset"] + 2 * MIB + 5), "0x8020_0000"),
        (lambda file: file.flip(file.region["offset"] + SIZE - 1), "0x807f_f000"),
        (lambda file: file.flip(file.region["checksums"] + WRITTEN // PAGE * 4 + 4), "0x8030_1000"),
        (lambda file: file.flip(file.region["checksums"] + SIZE // PAGE * 4 - 1), "0x807f_f000"),
        (lambda file: wipe(file.path, file.region["offset"] + WRITTEN, 4 * PAGE), "0x8030_0000"),
        (lambda file: wipe(file.path, file.region["checksums"], SIZE // PAGE * 4), "0x8008_0000"),  # its kernel
    ],
    ids=["first bit", "last byte", "a hole", "the end", "a checksum", "last checksum", "data lost", "checksums lost"],
)
def test_damaged_memory_is_found_and_the_page_is_named(
    edited: Edited, damage: Callable[[Edited], None], gpa: str
) -> None:
    damage(edited)
    words = rf"guest is damaged: memory at gpa {gpa} does not match its checksum"
    with Snapshot(str(edited.path)) as snapshot, pytest.raises(UsageError, match=words):
        snapshot.verify()
    with pytest.raises(UsageError, match=words):
        restore(edited.path)


def wipe(path: Path, offset: int, size: int) -> None:
    with path.open("r+b") as file:
        os.pwrite(file.fileno(), bytes(size), offset)


def test_a_copy_without_holes_is_the_same_snapshot(machine: Machine, edited: Edited, tmp_path: Path) -> None:
    (tmp_path / "copy").write_bytes(edited.path.read_bytes())
    assert restore(tmp_path / "copy") == machine.memory.read(RAM, SIZE)


# -- the description


def put(name: str, value: object) -> Callable[[Edited], None]:
    """Set a member of the description, ``memory[0].offset``."""

    def change(file: Edited) -> None:
        at: Any = file.description
        *path, last = name.replace("[", ".").replace("]", "").split(".")
        for part in path:
            at = at[int(part) if part.isdecimal() else part]
        at[int(last) if last.isdecimal() else last] = value
        file.save()

    return change


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (put("machine.memory", True), "description.machine.memory is True, not a number from 0"),
        (put("machine.cpus", "1"), "description.machine.cpus is '1', not a number from 0"),
        (put("machine.slots", [[RAM, -1]]), r"description.machine.slots\[0\]\[1\] is -1, not a number"),
        (put("machine.slots", [[RAM]]), r"description.machine.slots\[0\] has 1 elements, not 2"),
        (put("memory[0].offset", 2**64), r"offset is 18446744073709551616, not a number from 0"),
        (put("memory[0].offset", 2**63 - 1), "is not a multiple of 4096"),
        (put("memory[0].offset", 2**63 - PAGE), "is not in the file"),
        (put("memory[0].offset", 1), "offset 1 of memory is not a multiple of 4096"),
        (put("memory[0].offset", 0), "memory at bytes 0 to 8388608 overlaps other parts"),
        (put("memory[0].offset", DESCRIPTION), "overlaps other parts"),
        (put("memory[0].checksums", 1 << 40), "is not in the file"),
        (put("memory[0].size", SIZE // 2), "its regions of memory are not those of its machine"),
        (put("memory[0].size", 1.0), "size is 1.0, not a number"),
        (put("memory", []), "its regions of memory are not those of its machine"),
        (put("memory", None), "description.memory is None, not a list"),
        (put("options", 5), "description.options is 5, not text"),
        (put("more", 5), "description has the members .*, not"),
        (put("vcpus[0].registers", {"0x1": "1"}), "description.vcpus.0..registers.0x1 is '1', not a number in hexa"),
        (put("vcpus[0].registers", {"x": "0x1"}), "a key of description.vcpus.0..registers is 'x', not a number in h"),
        (put("gic", {"registers": [[0, "0x1", 5]], "its": None}), "description.gic.registers.0..2. is 5, not a number"),
        (put("gic", []), "description.gic is .., not an object"),
        (put("devices[0]", []), r"description.devices\[0\] is \[\], not an object"),
        (put("devices", "x" * 1000), "description.devices is 'xxxx.*xxx..., not a list"),
        (lambda file: file.save(b"[" * 60_000), "its description is not JSON"),
        (lambda file: file.save(b'{"a":' * 60_000), "its description is not JSON"),
        (lambda file: file.save(b"\xff"), "its description is not JSON"),
        (lambda file: file.save(b"9" * 60_000), "its description is not JSON"),
        (lambda file: file.save(b"[]"), r"description is \[\], not an object"),
    ],
)
def test_a_description_that_does_not_fit_is_refused_at_once(
    edited: Edited, damage: Callable[[Edited], None], words: str
) -> None:
    damage(edited)
    before = os.listdir("/proc/self/fd")
    with pytest.raises(UsageError, match=f"guest is damaged: .*{words}"):
        Snapshot(str(edited.path))
    assert os.listdir("/proc/self/fd") == before


@pytest.mark.parametrize("name", ["vcpus", "devices"])
def test_a_description_with_the_state_of_another_machine_is_refused(edited: Edited, name: str) -> None:
    edited.description[name] *= 2
    edited.save()
    with pytest.raises(UsageError, match=r"damaged: it has the state of \d vCPUs and \d+ devices"):
        restore(edited.path)


ODD: tuple[Any, ...] = (
    None,
    True,
    -1,
    2**31,
    2**63 - 1,
    2**64,
    1.5,
    "",
    "zz",
    "0x1",
    "f" * 4096,
    [],
    [[]],
    {},
    {"a": 1},
)


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the path of each value in ``value``, containers too. Of registers and queues, which are many, of some."""
    if path:
        yield path
    if isinstance(value, dict | list):
        items = list(value.items() if isinstance(value, dict) else enumerate(value))
        few = path[-1:] in (("registers",), ("queues",))
        for key, each in items[:: max(1, len(items) // 2)] if few else items:
            yield from places(each, (*path, key))


def replaced(whole: Any, path: tuple[Any, ...], value: Any) -> Any:
    """Return ``whole`` with another value at ``path``."""
    changed = copy.deepcopy(whole)
    at = changed
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = value
    return changed


def found(whole: Any, path: tuple[Any, ...]) -> Any:
    """Return the value at ``path``."""
    for key in path:
        whole = whole[key]
    return whole


def entered(path: Path, devices: tuple[DeviceSpec, ...]) -> bool:
    """Restore it. Returns False if that is refused; any other error is a bug."""
    try:
        with Snapshot(str(path)) as snapshot, plan(devices=devices) as target:
            snapshot.enter(target.machine)
    except (UsageError, HostError):
        return False
    return True


@pytest.mark.usefixtures("machine")
def test_whatever_is_odd_in_a_description_is_refused_with_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "disk").write_bytes(bytes(MIB))
    devices = (Rng(), Balloon(0), Disk(str(tmp_path / "disk")), Vsock(str(tmp_path / "vsock"), 3))
    with plan(devices=devices) as made:
        saving.save(made.machine, str(tmp_path / "guest"))
    file = Edited(tmp_path / "guest")
    whole = file.description
    # The same for all of them, and slow.
    monkeypatch.setattr(Snapshot, "_restore_memory", lambda *_: None)
    before = os.listdir("/proc/self/fd")
    refused = taken = 0
    for place in places(whole):
        for odd in ODD:
            file.description = replaced(whole, place, odd)
            file.save()
            if entered(file.path, devices):
                usual = found(whole, place)
                assert type(odd) is type(usual) or (usual is None and place[-1] == "break"), (place, odd)
                taken += 1
            else:
                refused += 1
    assert refused > 10 * taken > 0
    assert os.listdir("/proc/self/fd") == before


# -- the file


def test_what_lies_at_the_old_temporary_name_is_not_touched(machine: Machine, tmp_path: Path) -> None:
    """A symbolic link to a file that others read, and a file that others have open."""
    for name, made in (("link", "linked"), ("file", "file.new")):
        (tmp_path / made).write_text("foreign")
        (tmp_path / made).chmod(0o666)
        if name == "link":
            (tmp_path / "link.new").symlink_to(tmp_path / made)
        saving.save(machine, str(tmp_path / name))
        assert (tmp_path / made).read_text() == "foreign"
        assert stat.S_IMODE((tmp_path / name).lstat().st_mode) == 0o600
        assert stat.S_ISREG((tmp_path / name).lstat().st_mode)


@pytest.mark.parametrize("there", ["symlink", "file", "hard link"])
def test_a_temporary_name_that_exists_is_refused(
    machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, there: str
) -> None:
    foreign = tmp_path / "foreign"
    foreign.write_text("foreign")
    monkeypatch.setattr(os, "urandom", bytes)
    young = tmp_path / f".pyvmm-snapshot-{bytes(8).hex()}"
    if there == "symlink":
        young.symlink_to(tmp_path / "nowhere")
    elif there == "file":
        young.write_text("foreign")
    else:
        os.link(foreign, young)
    with pytest.raises(PyvmmError, match="cannot be written: File exists"):
        saving.save(machine, str(tmp_path / "guest"))
    assert sorted(each.name for each in tmp_path.iterdir()) == [young.name, "foreign"]
    assert foreign.read_text() == "foreign"
    assert not machine.paused


@pytest.fixture
def without_nameless_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """Be on a file system that has no O_TMPFILE."""
    real = os.open

    def refusing(path: str, flags: int, mode: int = 0o777, **more: Any) -> int:
        if flags & os.O_TMPFILE == os.O_TMPFILE:
            raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
        return real(path, flags, mode, **more)

    monkeypatch.setattr(os, "open", refusing)


def test_a_vmm_killed_during_a_snapshot_leaves_no_file(
    machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file that is there stays until the new one is on the disk, and nothing beside it can be left."""
    there: list[list[str]] = []
    pwrite, fsync = os.pwrite, os.fsync

    def looking(fd: int, data: bytes, offset: int) -> int:
        there.append(os.listdir(tmp_path))
        return pwrite(fd, data, offset)

    def syncing(fd: int) -> None:
        if stat.S_ISREG(os.fstat(fd).st_mode):
            there.append(os.listdir(tmp_path))
        fsync(fd)

    try:
        os.close(os.open(tmp_path, os.O_RDWR | os.O_TMPFILE))
    except OSError as error:
        pytest.skip(f"the directory of tests has no O_TMPFILE: {error.strerror}")
    (tmp_path / "guest").write_text("the last one")
    monkeypatch.setattr(os, "pwrite", looking)
    monkeypatch.setattr(os, "fsync", syncing)
    saving.save(machine, str(tmp_path / "guest"))
    assert len(there) > 1
    assert all(names == ["guest"] for names in there)
    assert os.listdir(tmp_path) == ["guest"]
    assert (tmp_path / "guest").read_bytes()[:8] == b"PYVMMSNP"
    assert stat.S_IMODE((tmp_path / "guest").stat().st_mode) == 0o600


@pytest.mark.usefixtures("without_nameless_files")
def test_a_file_system_without_nameless_files_has_a_temporary_name(
    machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saving.save(machine, str(tmp_path / "guest"))
    assert os.listdir(tmp_path) == ["guest"]
    assert stat.S_IMODE((tmp_path / "guest").stat().st_mode) == 0o600

    def full(*_: Any) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    before = (tmp_path / "guest").read_bytes()
    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(PyvmmError, match="cannot be written: No space left on device"):
        saving.save(machine, str(tmp_path / "guest"))
    assert os.listdir(tmp_path) == ["guest"]
    assert (tmp_path / "guest").read_bytes() == before


def test_no_umask_lets_others_read_the_file_even_while_it_is_written(
    machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    modes = []
    pwrite = os.pwrite

    def looking(fd: int, data: bytes, offset: int) -> int:
        modes.append(stat.S_IMODE(os.fstat(fd).st_mode))
        return pwrite(fd, data, offset)

    monkeypatch.setattr(os, "pwrite", looking)
    before = os.umask(0)
    try:
        saving.save(machine, str(tmp_path / "guest"))
    finally:
        os.umask(before)
    assert set(modes) == {0o600}


def test_file_and_directory_are_on_the_disk_before_success_and_the_guest_does_not_wait_for_it(
    machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []

    def noted(name: str) -> None:
        function = getattr(os, name)

        def call(*arguments: Any, **more: Any) -> Any:
            what = name
            if name == "fsync":
                what = "sync directory" if stat.S_ISDIR(os.fstat(arguments[0]).st_mode) else "sync file"
                what += " paused" if machine.paused else ""
            order.append(what)
            return function(*arguments, **more)

        monkeypatch.setattr(os, name, call)

    for name in ("pwrite", "ftruncate", "fsync", "rename"):
        noted(name)
    saving.save(machine, str(tmp_path / "guest"))
    assert list(dict.fromkeys(order)) == ["pwrite", "ftruncate", "sync file", "rename", "sync directory"]
    assert order.index("sync file") > max(at for at, what in enumerate(order) if what == "pwrite")


def test_a_directory_that_cannot_be_synced_is_no_success(
    machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fsync = os.fsync
    code = errno.EIO

    def failing(fd: int) -> None:
        if stat.S_ISDIR(os.fstat(fd).st_mode):
            raise OSError(code, os.strerror(code))
        fsync(fd)

    monkeypatch.setattr(os, "fsync", failing)
    with pytest.raises(PyvmmError, match="cannot be written: Input/output error"):
        saving.save(machine, str(tmp_path / "guest"))
    code = errno.EINVAL  # of a file system that has no such call for directories
    saving.save(machine, str(tmp_path / "guest"))


@pytest.mark.parametrize("kind", ["directory", "fifo", "device", "link to a device"])
def test_what_is_no_regular_file_is_not_replaced(machine: Machine, tmp_path: Path, kind: str) -> None:
    path = tmp_path / "there"
    if kind == "directory":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "link to a device":
        path.symlink_to("/dev/null")
    with pytest.raises(UsageError, match="is not a regular file"):
        saving.save(machine, "/dev/null" if kind == "device" else str(path))
    assert Path("/dev/null").is_char_device()
    assert len(list(tmp_path.iterdir())) == (kind != "device")
