# SPDX-License-Identifier: Apache-2.0
"""The boot protocol: kinds of kernel files, their load addresses, and how bad files are refused."""

from __future__ import annotations

import bz2
import gzip
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyvmm.errors import PyvmmError, UsageError
from pyvmm.machine import boot, layout
from pyvmm.machine.boot import FDT_ROOM, Board, BootImage, place, plan, read
from pyvmm.machine.content import Bytes, Segment
from pyvmm.machine.fdt import Node, Tree
from pyvmm.memory.address import MIB
from tests.kernel_files import CODE, Recorder, elf, identify, linux_image, loaded

# ---- kinds and load addresses


def test_a_flat_binary_is_loaded_512_kib_into_memory_and_starts_at_its_first_byte() -> None:
    image = identify(CODE, "x.bin")
    assert (image.kind, image.pc) == ("flat", 0x8008_0000)
    assert [(part.gpa, part.data) for part in image.segments] == [(0x8008_0000, Bytes(CODE))]


def test_an_image_is_loaded_at_its_text_offset() -> None:
    image = identify(linux_image(text_offset=0x8_0000), "Image")
    assert (image.kind, image.pc) == ("Image", 0x8008_0000)
    assert identify(linux_image(), "Image").pc == 0x8000_0000


def test_an_images_bss_counts_as_memory_but_is_not_written() -> None:
    (part,) = identify(linux_image(4096, image_size=MIB), "Image").segments
    assert (part.size, part.data.size) == (MIB, 4096)


def test_an_image_from_before_3_17_gets_the_text_offset_of_those_kernels() -> None:
    assert identify(linux_image(image_size=0, text_offset=123), "Image").pc == 0x8008_0000


def test_an_elf_is_loaded_at_its_physical_addresses() -> None:
    data = elf(entry=0xFFFF_0010, vaddr=0xFFFF_0000)
    image = identify(data, "vmlinux")
    assert (image.kind, image.pc) == ("ELF", 0x8010_0010)
    assert [(part.gpa, part.size, part.data) for part in image.segments] == [(0x8010_0000, 4096, Bytes(CODE))]


def test_an_elfs_entry_may_be_a_physical_address() -> None:
    high = 0xFFFF_0000_0010_0000
    assert identify(elf(entry=0x8010_0010, vaddr=high), "vmlinux").pc == 0x8010_0010
    assert identify(elf(entry=0x8010_0FFF, vaddr=high), "vmlinux").pc == 0x8010_0FFF  # beyond the contents of the file
    with pytest.raises(UsageError, match=r"entry 0x80101000 .* segments"):
        identify(elf(entry=0x8010_1000, vaddr=high), "vmlinux")


def test_an_elfs_entry_counts_as_virtual_if_it_can_be_both() -> None:
    parts = ((1, 0x8010_0000, CODE, 4096), (1, 0x8020_0000, CODE, 4096))
    assert identify(elf(entry=0x8020_0010, vaddr=0x8020_0000, segments=parts[:1]), "x").pc == 0x8010_0010
    assert identify(elf(entry=0x8020_0010, vaddr=0x9000_0000, segments=parts), "x").pc == 0x8020_0010


def test_an_elfs_notes_and_empty_segments_are_not_loaded() -> None:
    parts = ((1, 0x8010_0000, CODE, 4096), (4, 0, b"note", 4), (1, 0, b"", 0))
    assert len(identify(elf(segments=parts), "x").segments) == 1


# ---- what is refused, and how


REFUSED = {
    "an empty file": (b"", "is empty"),
    "a short Image": (linux_image()[:60], "truncated: it ends within its Image header"),
    "a big-endian Image": (linux_image(flags=1), "big-endian"),
    "an EFI program of another machine": (b"MZ" + bytes(200), "not an arm64 Linux Image"),
    "an x86 ELF": (elf(machine=62), "ELF file for x64, not for arm64"),
    "a 32-bit ELF": (b"\x7fELF\x01" + elf()[5:], "damaged|32-bit"),
    "a big-endian ELF": (elf(order=2), "big-endian"),
    "an object file": (elf(kind=1), "ET_REL, not an executable"),
    "a dynamically linked ELF": (
        elf(segments=((1, 0x8010_0000, CODE, 4096), (3, 0, b"/ld\0", 4))),
        "dynamically linked",
    ),
    "a truncated segment": (elf()[:-1], "truncated: segment 0 of k ends at byte 376 of 375"),
    "an ELF header cut off": (elf()[:40], "damaged or truncated"),
    "program headers cut off": (elf()[:100], "damaged or truncated"),
    "a file larger than memory": (
        elf(segments=((1, 0x8010_0000, CODE, 4),)),
        "256 bytes in the file, 4 in all",
    ),
    "an ELF with nothing to load": (elf(segments=()), "nothing to load"),
    "an entry outside": (elf(entry=0x1234), "entry 0x1234 is outside of its segments"),
}


@pytest.mark.parametrize(("data", "why"), REFUSED.values(), ids=REFUSED.keys())
def test_a_bad_kernel_is_refused_with_the_reason(data: bytes, why: str) -> None:
    with pytest.raises(UsageError, match=why) as caught:
        identify(data, "k")
    assert "k" in caught.value.message
    assert caught.value.hint
    assert caught.value.exit_status == 2


@settings(max_examples=300)
@given(st.data())
def test_a_damaged_elf_is_loaded_or_refused_with_a_clear_error(data: st.DataObject) -> None:
    bad = bytearray(elf())
    for _ in range(data.draw(st.integers(1, 4))):
        bad[data.draw(st.integers(4, 119))] = data.draw(st.integers(0, 255))
    del bad[data.draw(st.integers(4, len(bad))) :]
    try:
        image = identify(bytes(bad), "k")
        plan(image, ram_size=64 * MIB)
    except UsageError:
        return
    assert all((part.data.size or 0) <= part.size for part in image.segments)


@settings(max_examples=200)
@given(
    st.binary(max_size=200), st.sampled_from([b"", b"MZ\0\0zimg", b"\x1f\x8b\x08", b"\x7fELF", bytes(56) + b"ARM\x64"])
)
def test_any_file_is_loaded_or_refused_with_a_clear_error(data: bytes, start: bytes) -> None:
    try:
        identify(start + data, "k")
    except UsageError:
        return


# ---- files


def test_a_file_is_read(tmp_path: Path) -> None:
    (tmp_path / "Image").write_bytes(linux_image())
    (tmp_path / "initrd").write_bytes(b"cpio")
    image = read(str(tmp_path / "Image"), str(tmp_path / "initrd"))
    assert image.initrd is not None
    assert (image.kind, image.segments[0].data[:], image.initrd[:]) == ("Image", linux_image(), b"cpio")
    image.close()


@pytest.mark.parametrize("kernel", [linux_image(3 * 4096 + 5), elf(), CODE, gzip.compress(linux_image(9000))])
def test_a_file_is_read_straight_to_its_load_address(tmp_path: Path, kernel: bytes) -> None:
    (tmp_path / "kernel").write_bytes(kernel)
    image = read(str(tmp_path / "kernel"))
    assert loaded(image) == loaded(identify(kernel, "x"))
    image.close()


def test_a_file_that_becomes_shorter_before_it_is_loaded_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "initrd"
    path.write_bytes(bytes(9000))
    image = read("payload:hello", str(path))
    os.truncate(path, 5000)
    with pytest.raises(UsageError, match=r"initrd .*initrd was truncated .* ends at byte 5000, but had 9000 before"):
        place(image, Recorder(), Board(cpus=1), ram_size=64 * MIB)
    image.close()


def test_a_refused_kernel_leaves_no_file_open(tmp_path: Path) -> None:
    (tmp_path / "k").write_bytes(CODE)
    before = os.listdir("/proc/self/fd")
    with pytest.raises(UsageError):
        read(str(tmp_path / "k"), str(tmp_path / "none"))
    assert os.listdir("/proc/self/fd") == before


@pytest.mark.parametrize("which", ["kernel", "initrd"])
@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda _: None, "no such file"),
        (lambda path: path.mkdir(), "is a directory"),
        (lambda path: path.touch(), "is empty"),
        (lambda path: os.mkfifo(path), "not a regular file"),
        (lambda path: path.symlink_to(path), "cannot be opened: Too many levels"),
    ],
    ids=["missing", "directory", "empty", "fifo", "link to itself"],
)
def test_a_path_that_is_not_a_file_is_refused_with_the_reason(
    tmp_path: Path, which: str, make: Callable[..., Any], why: str
) -> None:
    good, bad = tmp_path / "good", tmp_path / "bad"
    good.write_bytes(CODE)
    make(bad)
    kernel, initrd = (bad, good) if which == "kernel" else (good, bad)
    with pytest.raises(UsageError, match=why) as caught:
        read(str(kernel), str(initrd))
    assert which in caught.value.message
    assert str(bad) in caught.value.message


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every file")
def test_an_unreadable_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "k").write_bytes(CODE)
    (tmp_path / "k").chmod(0)
    with pytest.raises(UsageError, match="Permission denied"):
        read(str(tmp_path / "k"))


@pytest.mark.parametrize("path", ["a\0b", "", "x" * 5000, "/dev/null/x"])
def test_a_path_that_the_system_refuses_is_refused_with_a_clear_error(path: str) -> None:
    with pytest.raises(UsageError, match=r"cannot be opened|no such file"):
        read(path)


def test_the_hint_recognises_a_payloads_name_without_its_prefix() -> None:
    with pytest.raises(UsageError) as caught:
        read("hello")
    assert caught.value.hint == "did you mean the built-in payload:hello?"
    with pytest.raises(UsageError) as caught:
        read("vmlinuz")
    assert caught.value.hint is None


def test_a_file_larger_than_memory_is_refused_before_it_is_read(tmp_path: Path) -> None:
    with open(tmp_path / "huge", "wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(UsageError, match="1099511627776 bytes, but the guest has only 67108864"):
        read(str(tmp_path / "huge"), room=64 * MIB)


# ---- placing


def flat(size: int = 256, initrd: bytes | None = None) -> BootImage:
    ramdisk = None if initrd is None else Bytes(initrd)
    return BootImage("flat", "k", 0x8008_0000, (Segment("k", 0x8008_0000, size, Bytes(CODE)),), ramdisk)


def ranges(parts: tuple[Segment, ...]) -> dict[str, tuple[int, int]]:
    return {part.what: (part.gpa, part.end) for part in parts}


def test_the_device_tree_is_last_and_the_initrd_right_below_it() -> None:
    parts = plan(flat(initrd=b"x" * 5000), ram_size=64 * MIB)
    assert ranges(parts) == {
        "k": (0x8008_0000, 0x8008_0000 + len(CODE)),
        "the initrd": (0x83E0_0000 - 8192, 0x83E0_0000 - 8192 + 5000),
        "the device tree": (0x83E0_0000, 0x8400_0000),
    }


@given(st.integers(layout.RAM_MINIMUM // 4096, 1 << 20), st.integers(1, 3 * MIB), st.integers(0, 3 * MIB))
def test_planned_parts_are_inside_memory_aligned_and_disjoint(ram_pages: int, kernel: int, initrd: int) -> None:
    ram_size = ram_pages * 4096
    image = flat(kernel, bytes(initrd) if initrd else None)
    try:
        parts = plan(image, ram_size=ram_size)
    except UsageError:
        assert kernel + initrd + layout.FLAT_OFFSET + 2 * FDT_ROOM + 4096 > ram_size
        return
    at = layout.RAM_BASE
    for part in parts:
        assert at <= part.gpa <= part.end
        at = part.end
    assert at <= layout.RAM_BASE + ram_size
    where = ranges(parts)
    assert where["the device tree"][0] % FDT_ROOM == 0
    assert where.get("the initrd", (0, 0))[0] % 4096 == 0


@pytest.mark.parametrize("gib", [31, 33, 500])
def test_an_initrd_is_within_the_range_that_linux_maps_around_its_kernel(gib: int) -> None:
    image = identify(linux_image(), "Image")._replace(initrd=Bytes(bytes(5000)))
    where = ranges(plan(image, ram_size=gib << 30))
    top = layout.RAM_BASE + (min(gib, 32) << 30)
    assert where["the device tree"] == (top - FDT_ROOM, top)
    assert where["the initrd"] == (top - FDT_ROOM - 8192, top - FDT_ROOM - 8192 + 5000)
    # Documentation/arch/arm64/booting.rst: a window of 32 GiB at most, from a multiple of 1 GiB, with the kernel in it.
    window = min(start for start, _ in where.values()) >> 30 << 30
    assert max(end for _, end in where.values()) <= window + (32 << 30)
    with pytest.raises(UsageError, match="overlaps the device tree") as caught:
        plan(flat(32 << 30), ram_size=64 << 30)
    assert caught.value.hint == "a kernel, its initrd and its device tree must be within 32 GiB"


def test_a_payload_fits_the_smallest_memory_allowed() -> None:
    plan(flat(MIB), ram_size=layout.RAM_MINIMUM)
    plan(flat(MIB), ram_size=64 * MIB, loadable=layout.PRIVATE_BOOT)


@pytest.mark.parametrize(
    ("image", "why"),
    [
        (flat(63 * MIB), r"k at \[0x8008_0000, 0x83f8_0000\) overlaps the device tree at \[0x83e0_0000"),
        (flat(65 * MIB), r"k at \[0x8008_0000, 0x8418_0000\) does not fit .* \[0x8000_0000, 0x8400_0000\)"),
        (flat(60 * MIB, bytes(2 * MIB)), r"k at .* overlaps the initrd"),
        (flat(initrd=bytes(63 * MIB)), "the initrd at .* does not fit"),
        (identify(linux_image(image_size=65 * MIB), "k"), r"Image k at \[0x8000_0000, .* does not fit"),
        (identify(linux_image(image_size=63 * MIB), "k"), "Image k at .* overlaps the device tree"),
        (identify(linux_image(text_offset=1 << 60), "k"), "Image k at .* does not fit"),
        (identify(elf(entry=0x4000_0000, segments=((1, 0x4000_0000, CODE, 4096),)), "k"), "does not fit"),
        (
            identify(elf(segments=((1, 0x8010_0000, CODE, 4096), (1, 0x8010_0800, CODE, 4096))), "k"),
            "segment 0 of k .* overlaps segment 1 of k",
        ),
    ],
    ids=[
        "tree",
        "memory",
        "initrd",
        "initrd below memory",
        "large Image",
        "Image over tree",
        "Image far away",
        "elf elsewhere",
        "elf in itself",
    ],
)
def test_parts_that_overlap_or_do_not_fit_are_refused_with_both_ranges(image: BootImage, why: str) -> None:
    with pytest.raises(UsageError, match=why) as caught:
        plan(image, ram_size=64 * MIB)
    assert caught.value.hint


def test_a_payload_is_refused_more_memory_than_it_can_reach() -> None:
    image = read("payload:hello")
    plan(image, ram_size=layout.PAYLOAD_LIMIT - layout.RAM_BASE)
    with pytest.raises(UsageError, match=r"522241 MiB .* cannot use addresses from 0x80_0000_0000 on") as caught:
        plan(image, ram_size=layout.PAYLOAD_LIMIT - layout.RAM_BASE + MIB)
    assert caught.value.hint == "use at most -m 522240M"


def test_the_hint_suggests_enough_memory() -> None:
    image = flat(65 * MIB, bytes(3 * MIB))
    with pytest.raises(UsageError) as caught:
        plan(image, ram_size=64 * MIB)
    assert caught.value.hint is not None
    size = int(caught.value.hint.split("-m ")[1].removesuffix("M"))
    plan(image, ram_size=size * MIB)


class Uart:
    name: ClassVar[str] = "pl011"
    node: ClassVar[str | None] = "serial"
    compatible: ClassVar[str | tuple[str, ...]] = "arm,pl011"
    clocks: ClassVar[tuple[str, ...]] = ()
    size = 0x1000

    def properties(self) -> dict[str, Any]:
        return {}


def test_each_part_is_written_once_and_the_device_tree_last() -> None:
    memory = Recorder()
    board = Board(cpus=2, command_line="a=1", devices=[(Uart(), 0x0900_0000, None)], entropy=bytes)
    entry = place(flat(initrd=b"cpio"), memory, board, ram_size=64 * MIB)
    assert memory.writes == [(0x8008_0000, CODE), (0x83DF_F000, b"cpio"), (0x83E0_0000, entry.device_tree)]
    assert (entry.pc, entry.fdt) == (0x8008_0000, 0x83E0_0000)
    for text in (b"a=1\0", b"/serial@9000000\0", b"cpu@1\0", struct.pack(">QQ", 0x8000_0000, 64 * MIB)):
        assert text in entry.device_tree
    assert b"seed" not in entry.device_tree


def test_only_linux_gets_entropy_and_other_runs_repeat() -> None:
    image = identify(linux_image(), "Image")
    entries = [
        place(image, Recorder(), Board(cpus=1, entropy=entropy), ram_size=64 * MIB)
        for entropy in (None, lambda size: bytes(range(size)), None)
    ]
    trees = [entry.device_tree for entry in entries]
    assert trees[0] == trees[2]
    assert entries[1].described() == trees[0], "what is written down has no seeds that a guest would use again"
    for name, value in ((b"kaslr-seed\0", bytes(range(8))), (b"rng-seed\0", bytes(range(8, 72)))):
        assert name not in trees[0]
        assert name in trees[1]
        assert value in trees[1]


def test_a_device_tree_from_a_file_is_loaded_unchanged(tmp_path: Path) -> None:
    data = Tree(Node("", {"a": 1})).to_bytes()
    (tmp_path / "dtb").write_bytes(data + b"padding")
    tree = boot.read_tree(str(tmp_path / "dtb"))
    memory = Recorder()
    assert place(flat(), memory, tree, ram_size=64 * MIB).device_tree == data
    assert memory.writes[-1] == (0x83E0_0000, data)


TREE = Tree(Node("", {"a": 1})).to_bytes()


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"/dts-v1/;\n/ {};\n" + bytes(40), "not a flattened device tree: it does not start with 0xd00dfeed"),
        (TREE[:20], "not a flattened device tree"),
        (TREE[:-1], f"truncated: its header says {len(TREE)} bytes, but it has {len(TREE) - 1}"),
        (TREE[:20] + struct.pack(">2I", 18, 18) + TREE[28:], "has version 18, compatible with 18"),
        (TREE[:20] + struct.pack(">2I", 3, 1) + TREE[28:], "has version 3"),
        (TREE[:8] + struct.pack(">I", 1 << 31) + TREE[12:], "is damaged: its parts end at byte"),
        (TREE.ljust(FDT_ROOM + 1, b"\0"), "2097153 bytes, more than the maximum of 2097152"),
    ],
    ids=["source", "short", "truncated", "newer", "older", "damaged", "large"],
)
def test_a_file_that_is_not_a_device_tree_is_refused_with_the_reason(tmp_path: Path, data: bytes, why: str) -> None:
    (tmp_path / "dtb").write_bytes(data)
    with pytest.raises(UsageError, match=why) as caught:
        boot.read_tree(str(tmp_path / "dtb"))
    assert str(tmp_path / "dtb") in caught.value.message


def test_a_command_line_too_long_for_the_device_tree_is_refused() -> None:
    with pytest.raises(UsageError, match="the maximum of 2097152"):
        place(flat(), Recorder(), Board(cpus=1, command_line="x" * FDT_ROOM), ram_size=64 * MIB)


def test_the_error_names_a_missing_elf_reader(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "elftools.elf.elffile", None)
    with pytest.raises(PyvmmError, match="not installed") as caught:
        identify(elf(), "k")
    assert "pyelftools" in (caught.value.hint or "")


def test_reading_a_flat_binary_does_not_load_the_elf_reader() -> None:
    import subprocess
    import sys

    code = (
        "import sys; from pyvmm.machine import boot, content; boot.identify(content.Bytes(b'\\x01\\x02'), 'k'); "
        "sys.exit('elftools' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_payload_takes_the_memory_it_needs_beyond_its_file() -> None:
    from pyvmm import payloads

    image = read("payload:hello")
    (part,) = image.segments
    assert (image.kind, part.gpa, part.data) == ("flat", 0x8008_0000, Bytes(payloads.payload("hello")))
    assert part.size == payloads.memory_of(payloads.payload("hello")) >= (part.data.size or 0)


def test_an_unknown_payload_is_refused_with_the_known_names() -> None:
    with pytest.raises(UsageError, match="no payload 'helo'") as caught:
        read("payload:helo")
    assert "payload:hello" in str(caught.value)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"#!/bin/sh\necho hello\n", "text file"),
        (bytes(100), "100 bytes of zeros"),
        (bz2.compress(CODE), "compressed with bzip2"),
        (b"\x04\x22\x4d\x18" + bytes(60), "compressed with lz4"),
        (b"ANDROID!" + bytes(60), "an Android boot image"),
    ],
    ids=["text", "zeros", "bzip2", "lz4", "Android"],
)
def test_a_file_without_an_instruction_is_not_a_flat_binary(data: bytes, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        identify(data, "FILE")
