# SPDX-License-Identifier: Apache-2.0
"""Read the kernel's data about pages without accessing them: page tables, flags, counts, swap, KSM."""

from __future__ import annotations

import ctypes
from pathlib import Path

from pyvmm.experiment.host.syscalls import NR_MINCORE, call, page_frame
from pyvmm.pages import HOST_PAGE

KSM = Path("/sys/kernel/mm/ksm")


def everything(address: int) -> dict[str, str]:
    """Read every such file for a page. Returns ``ok`` or the error for each."""
    frame = page_frame(address)
    said = {"/proc/self/pagemap": "ok" if frame else "no frame told"}
    for name in ("smaps", "smaps_rollup", "numa_maps", "maps"):
        said[f"/proc/self/{name}"] = _read(Path(f"/proc/self/{name}"), 0, 1 << 20)
    for name in ("kpageflags", "kpagecount"):
        said[f"/proc/{name}"] = _read(Path(f"/proc/{name}"), frame * 8, 8) if frame else "no frame told"
    said["mincore(2)"] = call(NR_MINCORE, address, HOST_PAGE, ctypes.byref(ctypes.c_uint8())).name
    return said


def _read(path: Path, offset: int, size: int) -> str:
    try:
        with path.open("rb", buffering=0) as file:
            if offset:
                file.seek(offset)
            file.read(size)
    except OSError as error:
        return str(error.strerror)
    return "ok"


def swapped(hva: int) -> int:
    """Return how much is swapped out of this process's mapping with the address ``hva``, in bytes.

    The use of swap itself would not tell: on Linux 6.12 a CPU takes 64 slots at once (mm/swap_slots.c).
    """
    is_it = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first, *rest = line.split()
        if not first.endswith(":"):
            begin, _, end = first.partition("-")
            is_it = int(begin, 16) <= hva < int(end, 16)
        elif is_it and first == "Swap:":
            return int(rest[0]) * 1024
    raise ValueError(f"nothing is mapped at {hva:#x}")


def ksm_scans() -> int:
    """Return the number of ksmd's full scans of its memory."""
    return int((KSM / "full_scans").read_text())


def ksm_merging() -> int:
    """Return how many of this process's pages KSM has merged; 0 if the kernel does not report it."""
    try:
        words = Path("/proc/self/ksm_stat").read_text().split()
    except OSError:
        return 0
    return int(dict(zip(words[::2], words[1::2], strict=False)).get("ksm_merging_pages", 0))
