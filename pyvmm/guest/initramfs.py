# SPDX-License-Identifier: Apache-2.0
"""Build the guest initramfs ``shell:``: busybox, an init, and their few files. Modules follow as a second archive.

The same input gives the same bytes. It is not compressed: unpacking would cost a guest more than it saves.
"""

from __future__ import annotations

import hashlib
import re
from io import BytesIO
from pathlib import Path
from typing import Final

from pyvmm.cpio import CpioWriter

INIT: Final = Path(__file__).with_name("init.sh")
BUSYBOX: Final = "bin/busybox"
DIRECTORIES: Final = ("dev", "mnt", "proc", "root", "sys", "tmp", "usr/bin", "usr/sbin", "var/run")
LINKS: Final = {"bin/sh": "busybox", "sbin/modprobe": f"../{BUSYBOX}", "linuxrc": "init"}
"""Links for the kernel, scripts and init. The shell runs busybox's programs without links."""
FILES: Final = {
    "etc/passwd": b"root:x:0:0:root:/root:/bin/sh\n",
    "etc/group": b"root:x:0:\n",
    "etc/hosts": b"127.0.0.1 localhost\n",
}
UDHCPC: Final = b"""\
#!/bin/sh
case $1 in
deconfig)
    ifconfig "$interface" up
    ;;
bound | renew)
    ifconfig "$interface" "$ip" ${subnet:+netmask "$subnet"} ${mtu:+mtu "$mtu"}
    for each in $router; do route add default gw "$each" dev "$interface"; done
    for each in $dns; do echo "nameserver $each"; done >/etc/resolv.conf
    ;;
esac
"""

_STATUS: Final = re.compile(rb"^pyvmm: exit status (\d+)\r?$", re.MULTILINE)


def digest() -> str:
    """Return a hash of everything in the archive except busybox."""
    return hashlib.sha256(write(b"")).hexdigest()


def write(busybox: bytes) -> bytes:
    """Return the archive. ``busybox`` is a statically linked program."""
    out = BytesIO()
    cpio = CpioWriter(out)
    cpio.file("init", INIT.read_bytes(), mode=0o755)
    cpio.file(BUSYBOX, busybox, mode=0o755)
    for path, target in LINKS.items():
        cpio.symlink(path, target)
    for path in DIRECTORIES:
        cpio.directory(path)
    # The kernel opens it for init, before init can mount anything.
    cpio.character_device("dev/console", 5, 1)
    for path, data in FILES.items():
        cpio.file(path, data)
    cpio.file("etc/udhcpc/default.script", UDHCPC, mode=0o755)
    cpio.finish()
    return out.getvalue()


def exit_status(console: bytes) -> int | None:
    """Return the exit status that the guest's console reports for its command, or None."""
    found = _STATUS.findall(console)
    return int(found[-1]) if found else None
