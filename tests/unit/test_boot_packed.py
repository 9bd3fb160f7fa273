# SPDX-License-Identifier: Apache-2.0
"""Compressed kernels: gzip, xz, zstd and EFI zboot of these are loaded as their contents, or refused with a reason."""

from __future__ import annotations

import gzip
import lzma
import os
import struct
import sys
import zlib
from collections.abc import Callable
from itertools import pairwise

import pytest

from pyvmm.errors import PyvmmError, UsageError
from pyvmm.machine import packed as unpacking
from pyvmm.machine.content import CHUNK, Bytes
from pyvmm.machine.packed import Packed
from pyvmm.memory.address import MIB
from tests.kernel_files import CODE, Recorder, elf, identify, linux_image, loaded, zboot

zstandard = pytest.importorskip("zstandard")


def zstd(data: bytes) -> bytes:
    """Compress to a frame that does not say its size, as a pipe's output does."""
    made: bytes = zstandard.ZstdCompressor(level=19, write_content_size=False).compress(data)
    return made


METHODS: dict[str, Callable[[bytes], bytes]] = {"gzip": gzip.compress, "xz": lzma.compress, "zstd": zstd}
METHOD = pytest.mark.parametrize("method", METHODS)


@METHOD
@pytest.mark.parametrize("inner", [linux_image(), CODE, elf()])
def test_a_compressed_kernel_is_loaded_as_its_contents(method: str, inner: bytes) -> None:
    assert loaded(identify(METHODS[method](inner), "x")) == loaded(identify(inner, "x"))


@METHOD
@pytest.mark.parametrize("inner", [linux_image(10_000), CODE, elf()])
@pytest.mark.parametrize("between", [b"", b"\0", bytes(1500)])
def test_all_members_of_a_compressed_file_are_loaded(
    method: str, inner: bytes, between: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(unpacking, "CHUNK", 701)  # so that members begin and end anywhere in a chunk
    for cuts in ([1], [100, 5000], [0], [3, 4, 9_000]):
        ends = [0, *cuts, len(inner)]
        members = [METHODS[method](inner[start:end]) for start, end in pairwise(ends)]
        assert loaded(identify(between.join(members), "x")) == loaded(identify(inner, "x"))


@METHOD
@pytest.mark.parametrize(
    "behind", [bytes(600), b"~Module signature appended~\n", b"\0\x1f", b"\x1f\x8b", b"\0\0x\x1f\x8b\x08", b"\xfd7z"]
)
def test_data_after_a_compressed_file_is_ignored(method: str, behind: bytes) -> None:
    image = linux_image(9000)
    assert loaded(identify(METHODS[method](image) + behind, "x")) == loaded(identify(image, "x"))


@METHOD
@pytest.mark.parametrize("left", [7, 12, 40])
def test_a_compressed_file_whose_second_member_is_truncated_is_refused(method: str, left: int) -> None:
    pack = METHODS[method]
    packed = pack(linux_image(9000, image_size=20_000)) + pack(os.urandom(100))[:left]
    with pytest.raises(UsageError, match=f"truncated {method} file"):
        loaded(identify(packed, "x"))


@METHOD
def test_a_compressed_image_is_unpacked_chunk_by_chunk_to_its_load_address(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(unpacking, "CHUNK", 700)
    data = linux_image(5000)[:64] + os.urandom(200_000)
    head = struct.pack("<Q", len(data))
    data = data[:16] + head + data[24:]  # image_size
    memory = Recorder()
    (part,) = identify(METHODS[method](data), "x").segments
    assert memory.writes == []
    part.data.load(memory, part.gpa, part.size)
    assert len(memory.writes) > 1
    assert b"".join(piece for _, piece in memory.writes) == data
    assert all(b == a + len(piece) for (a, piece), (b, _) in pairwise(memory.writes))


@METHOD
def test_a_compressed_image_with_a_corrupt_rest_is_refused_when_it_is_loaded(method: str) -> None:
    whole = linux_image(64) + os.urandom(300_000)
    cut = METHODS[method](whole[:16] + struct.pack("<Q", len(whole)) + whole[24:])[:-9]
    more = METHODS[method](linux_image(1 << 20, image_size=4096))
    for packed, why in ((cut, f"truncated {method} file"), (more, "unpacks to more than the 4096 bytes its header")):
        (part,) = identify(packed, "x").segments
        with pytest.raises(UsageError, match=why):
            part.data.load(Recorder(), part.gpa, part.size)


@METHOD
def test_a_file_that_unpacks_to_more_than_memory_is_refused_early(method: str) -> None:
    with pytest.raises(UsageError, match="unpacked, has 1048577 bytes, but the guest has only 1048576"):
        identify(METHODS[method](bytes(64 * MIB)), "bomb", room=MIB)


@METHOD
def test_no_more_of_a_bomb_is_unpacked_at_once_than_the_bound(method: str) -> None:
    most = {"zstd": 33 * MIB}.get(method, CHUNK)
    chunks = Packed(Bytes(METHODS[method](bytes(256 * MIB))), "bomb", method).chunks()
    assert max(map(len, chunks)) <= most


@pytest.mark.parametrize(
    ("name", "method"), [("gzip", "gzip"), ("xz", "xz"), ("xzkern", "xz"), ("zstd", "zstd"), ("zstd22", "zstd")]
)
def test_an_efi_zboot_image_is_loaded_as_its_contents(name: str, method: str) -> None:
    # Linux appends the unpacked size, which the header's size leaves out.
    payload = METHODS[method](linux_image())
    image = zboot(name.encode(), payload + struct.pack("<I", 4096), len(payload))
    assert loaded(identify(image, "vmlinuz")) == loaded(identify(linux_image(), "vmlinuz"))


def test_an_xz_file_that_wants_more_memory_than_kernels_is_refused() -> None:
    packed = bytearray(lzma.compress(linux_image(), filters=[{"id": lzma.FILTER_LZMA2, "dict_size": MIB}]))
    # The block header says the size of the dictionary in one byte (xz-file-format 5.3.1), and has a checksum.
    at = 12
    size = (packed[at] + 1) * 4
    packed[at + 4] = 36  # 1 GiB
    packed[at + size - 4 : at + size] = struct.pack("<I", zlib.crc32(packed[at : at + size - 4]))
    with pytest.raises(UsageError, match="damaged xz file: Memory usage limit"):
        identify(bytes(packed), "x")


def test_a_kernel_of_zstd_names_the_package_that_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with pytest.raises(PyvmmError, match="kernel x is compressed with zstd, but the package") as refused:
        identify(zboot(b"zstd", zstd(linux_image())), "x")
    assert "pip install zstandard" in str(refused.value.hint)
    assert loaded(identify(lzma.compress(CODE), "x")) == loaded(identify(CODE, "x"))


REFUSED = {
    "a truncated gzip": (gzip.compress(os.urandom(1000))[:-200], "truncated gzip"),
    "a damaged gzip": (b"\x1f\x8b\x08" + bytes(50), "damaged gzip"),
    "gzip of nothing": (gzip.compress(b""), "gzip file without contents"),
    "a truncated xz": (lzma.compress(os.urandom(1000))[:-200], "truncated xz"),
    "a damaged xz": (b"\xfd7zXZ\0" + b"\xff" * 50, "damaged xz"),
    "xz of nothing": (lzma.compress(b""), "xz file without contents"),
    "a truncated zstd": (zstd(os.urandom(1000))[:-200], "truncated zstd"),
    "a damaged zstd": (b"\x28\xb5\x2f\xfd" + b"\xff" * 50, "damaged zstd"),
    "zstd of nothing": (zstd(b""), "zstd file without contents"),
    "an lz4 zboot": (zboot(b"lz4", b"data"), "EFI zboot image compressed with 'lz4'"),
    "a zboot of something else": (zboot(b"zstd", b"data" * 9), "damaged zstd"),
    "a truncated zboot": (
        zboot(b"gzip", b"data", 100),
        "truncated: its EFI zboot payload ends at byte 164, the file at 68",
    ),
    "a zboot header cut off": (zboot(b"zstd", b"data")[:20], "within its EFI zboot header"),
}


@pytest.mark.parametrize(("data", "why"), REFUSED.values(), ids=REFUSED.keys())
def test_a_bad_compressed_kernel_is_refused_with_the_reason(data: bytes, why: str) -> None:
    with pytest.raises(UsageError, match=why) as caught:
        identify(data, "k")
    assert "k" in caught.value.message
    assert caught.value.hint
    assert caught.value.exit_status == 2
