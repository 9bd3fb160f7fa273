# SPDX-License-Identifier: Apache-2.0
"""Parse an ELF executable for the boot protocol, the only caller. Only ELF kernels import pyelftools.

The file is untrusted: every number in it is checked before use. Every parser error becomes a UsageError that names the
file.
"""

from __future__ import annotations

from pyvmm.errors import PyvmmError, UsageError, pip_install
from pyvmm.machine.content import Segment, big_endian, damaged

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pyvmm.machine.content import Known


def segments(data: Known, source: str) -> tuple[int, tuple[Segment, ...]]:
    """Return the gpa of the first instruction and the loadable segments by physical address.

    The entry may be a virtual or a physical address. If it can be both, it is the virtual one.

    Raises UsageError for anything but a complete, little-endian, 64-bit, static arm64 executable.
    """
    try:
        from elftools.common.utils import struct_parse
        from elftools.elf.elffile import ELFFile
    except ImportError:
        raise PyvmmError(
            f"kernel {source} is an ELF file, but pyelftools, which reads it, is not installed",
            hint=f"{pip_install('pyelftools')}; or objcopy -O binary the kernel",
        ) from None

    try:
        stream = data.stream()
        file = ELFFile(stream)
        machine, kind, entry = file.get_machine_arch(), str(file["e_type"]), int(file["e_entry"])
        # Not iter_segments(): it reads sections, which a kernel may lack and a damaged file may have too many of.
        places = [file["e_phoff"] + index * file["e_phentsize"] for index in range(file["e_phnum"])]
        headers = [struct_parse(file.structs.Elf_Phdr, stream, stream_pos=place) for place in places]
    except Exception as error:
        # pyelftools raises whatever its parser meets: ELFError, struct.error, UnicodeDecodeError, KeyError, ...
        raise damaged(f"kernel {source} is a damaged or truncated ELF file ({type(error).__name__}: {error})") from None

    if machine != "AArch64":
        raise UsageError(f"kernel {source} is an ELF file for {machine}, not for arm64", hint="build it for arm64")
    if file.elfclass != 64:
        raise UsageError(
            f"kernel {source} is a {file.elfclass}-bit ELF file; 64-bit guests only", hint="build it for arm64"
        )
    if not file.little_endian:
        raise big_endian(source)
    if kind not in ("ET_EXEC", "ET_DYN"):
        raise UsageError(f"kernel {source} is an ELF file of type {kind}, not an executable", hint="link it first")
    if any(header["p_type"] == "PT_INTERP" for header in headers):
        raise UsageError(f"kernel {source} is a dynamically linked program, not a kernel", hint="link it statically")

    found: list[Segment] = []
    pc: int | None = None
    for header in headers:
        if header["p_type"] != "PT_LOAD" or header["p_memsz"] == 0:
            continue
        offset, in_file, in_memory = header["p_offset"], header["p_filesz"], header["p_memsz"]
        virtual, physical = header["p_vaddr"], header["p_paddr"]
        name = f"segment {len(found)} of {source}"
        if offset + in_file > data.size:
            raise damaged(f"kernel {source} is truncated: {name} ends at byte {offset + in_file} of {data.size}")
        if in_file > in_memory:
            raise damaged(f"kernel {source} is damaged: {name} has {in_file} bytes in the file, {in_memory} in all")
        found.append(Segment(name, physical, in_memory, data.part(offset, in_file)))
        if virtual <= entry < virtual + in_memory:
            pc = entry - virtual + physical
    if not found:
        raise UsageError(f"kernel {source} is an ELF file with nothing to load", hint="link it with program headers")
    if pc is None and any(part.gpa <= entry < part.end for part in found):
        pc = entry  # a physical address, from linker scripts of kernels that start with the MMU off
    if pc is None:
        raise damaged(f"kernel {source} is damaged: its entry {entry:#x} is outside of its segments")
    return pc, tuple(found)
