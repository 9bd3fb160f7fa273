"""Asks the kernel at which guest address a vCPU faults: tracefs' kvm_guest_fault, in an instance of our own.

Used once, after a run has failed; needs root. The instance is removed again whatever happens.
"""

from __future__ import annotations

import contextlib
import os
import re
import threading
from collections.abc import Callable
from pathlib import Path

TRACEFS = (Path("/sys/kernel/tracing"), Path("/sys/kernel/debug/tracing"))
EVENT = "events/kvm/kvm_guest_fault"
_IPA = re.compile(r"kvm_guest_fault: ipa 0x([0-9a-f]+)")


def guest_fault(fault_again: Callable[[], object]) -> tuple[int | None, str]:
    """Let this thread's vCPU fault once more and return (gpa, "") as the kernel traced it, or (None, why not)."""
    root = next((path for path in TRACEFS if (path / "instances").is_dir()), None)
    if root is None:
        return None, "which, the kernel tells root only, through tracefs: mount -t tracefs nodev /sys/kernel/tracing"
    instance = root / "instances" / f"pyvmm-{os.getpid()}-{threading.get_native_id()}"
    try:
        instance.mkdir()
    except OSError as error:
        return None, f"which is not known: tracefs: {error.strerror}"
    try:
        (instance / "set_event_pid").write_text(str(threading.get_native_id()))
        (instance / EVENT / "enable").write_text("1")
        fault_again()
        (instance / EVENT / "enable").write_text("0")
        found = _IPA.findall((instance / "trace").read_text())
    except OSError as error:
        return None, f"which is not known: tracefs: {error.strerror}"
    finally:
        with contextlib.suppress(OSError):
            instance.rmdir()
    if not found:
        return None, "which is not known: the kernel traced no fault"
    # The tracepoint prints the IPA's page from HPFAR_EL2; the offset in the page is not told.
    return int(found[-1], 16), ""
