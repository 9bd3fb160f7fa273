# SPDX-License-Identifier: Apache-2.0
"""Taps: network interfaces of the host's kernel, with the other end in this process. A missing tap is made."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import struct
from ctypes import Array, byref, c_char, c_int, c_uint, create_string_buffer

from pyvmm._native import lib
from pyvmm.devices.roles import Reach
from pyvmm.devices.virtio.netbackend import HEADER, NetBackend, NetFeature
from pyvmm.errors import HostError, UsageError
from pyvmm.kvm import libc
from pyvmm.log import get_logger
from pyvmm.uapi import if_tun

TYPE_CHECKING = False
if TYPE_CHECKING:
    import socket
    from ipaddress import IPv4Interface
    from typing import Final

log = get_logger("net")

CLONE: Final = "/dev/net/tun"
SYSFS: Final = "/sys/class/net"

# linux/if.h: a name of 16 bytes, then a union.
_IFNAMSIZ: Final = 16
_IFREQ: Final = 40
_IFF_UP: Final = 1 << 0
_ARPHRD_ETHER: Final = 1

_BEGINNING: Final = 64
"""Bytes to read of a dropped frame. The kernel discards the rest."""

_TO_GUEST: Final = {
    NetFeature.GUEST_CSUM: if_tun.TUN_F_CSUM,
    NetFeature.GUEST_TSO4: if_tun.TUN_F_TSO4,
    NetFeature.GUEST_TSO6: if_tun.TUN_F_TSO6,
    NetFeature.GUEST_ECN: if_tun.TUN_F_TSO_ECN,
}
_FROM_GUEST: Final = NetFeature.CSUM | NetFeature.HOST_TSO4 | NetFeature.HOST_TSO6 | NetFeature.HOST_ECN
"""Offloads that a tap always accepts: the frame's header describes them."""


def check_name(name: str) -> None:
    """Raise UsageError for an invalid name of a tap."""
    # In bytes, including the final zero, as in the kernel.
    if not re.fullmatch(r"[^\s/:%\0]+", name) or name in (".", "..") or len(os.fsencode(name)) >= _IFNAMSIZ:
        raise UsageError(f"{name!r} cannot be the name of a tap: 1 to 15 bytes, no space, slash, colon or percent")


class Tap(NetBackend):
    """The tap ``name``. ``address`` is set on the host's end here, because another program could be too late."""

    kind = lib.PV_NET_TAP

    def __init__(self, name: str, address: IPv4Interface | None = None) -> None:
        """Open or make it. Raises UsageError for an invalid name, HostError if the host refuses."""
        check_name(name)
        there = _flags_of(name)
        super().__init__(name, _open())
        self._claim: socket.socket | None = None
        self._left = 0
        """TUN_F_ flags of the offloads that waiting frames may use."""
        try:
            self._attach(there)
            self._call("TUNSETVNETHDRSZ", if_tun.TUNSETVNETHDRSZ.number, byref(c_int(HEADER)))
            self.use(NetFeature(0))
            if there is None:
                self._be_known()
            if address is not None:
                self._give(address)
            if there is None or address is not None:
                self._bring_up()
            elif not self.is_up:
                log.warning("tap_down", tap=name, hint=f"ip link set {name} up")
            self.mtu = int(_told(name, "mtu"))
        except BaseException:
            self.close()
            raise
        self.offloads = _FROM_GUEST | NetFeature(sum(_TO_GUEST))

    def reach(self) -> Reach:
        """Return that it agrees with drivers on what the tap computes."""
        return Reach(parts=("tap",))

    def use(self, features: NetFeature) -> None:
        """Set the kernel's offloads to the guest's ``features``, and drop waiting frames."""
        flags = sum(flag for feature, flag in _TO_GUEST.items() if features & feature)
        self._call("TUNSETOFFLOAD", if_tun.TUNSETOFFLOAD.number, flags)
        if self._left & ~flags:
            self._drop()
        self._left = flags

    def _drop(self) -> None:
        # At most the waiting frames: later ones match the new driver.
        with contextlib.suppress(OSError):  # no more frames (EAGAIN), or the tap was deleted
            for _ in range(int(_told(self.name, "tx_queue_len"))):
                os.read(self.fd, _BEGINNING)

    def claim(self, mac: bytes) -> None:
        """Claim ``mac`` on the tap's bridge. Raises HostError if a guest of another pyvmm has it there.

        The claim is an abstract Unix socket: bridges and such sockets both belong to a network namespace.
        """
        import socket

        self._drop_claim()
        bridge = _bridge_of(self.name)
        if bridge is None:
            return
        claim = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
        try:
            claim.bind(f"\0pyvmm/{bridge}/{mac.hex(':')}")
        except OSError as error:
            claim.close()
            if error.errno != errno.EADDRINUSE:
                raise HostError(f"{mac.hex(':')} cannot be claimed on {bridge}: {error.strerror}") from None
            raise HostError(
                f"the address {mac.hex(':')} is another guest's on the bridge {bridge}, where the tap {self.name!r} is",
                hint="--net tap=NAME,mac=MAC gives a new guest another; a restored one keeps its address, so give it "
                "a tap on another bridge",
            ) from None
        self._claim = claim

    def _drop_claim(self) -> None:
        if self._claim is not None:
            self._claim.close()
            self._claim = None

    def close(self) -> None:
        """Close the descriptor, which deletes a tap that does not persist."""
        self._drop_claim()
        super().close()

    def persist(self, stay: bool) -> None:
        """Set whether the tap persists after its last user closes it."""
        self._call("TUNSETPERSIST", if_tun.TUNSETPERSIST.number, int(stay))

    def last_words(self) -> str:
        """Return whether it was deleted, as text."""
        return "" if os.path.exists(f"{SYSFS}/{self.name}") else "the tap was deleted"

    @property
    def is_up(self) -> bool:
        """Whether the host's end is up."""
        return bool(int(_told(self.name, "flags"), 16) & _IFF_UP)

    def _attach(self, there: int | None) -> None:
        flags = if_tun.IFF_TAP | if_tun.IFF_NO_PI | if_tun.IFF_VNET_HDR
        # A multi-queue tap can only be opened in multi-queue mode, even for one queue.
        flags |= (there or 0) & if_tun.IFF_MULTI_QUEUE
        request = _ifreq(self.name, struct.pack("H", flags))
        result, code = libc.ioctl(self.fd, if_tun.TUNSETIFF.number, byref(request))
        if result >= 0:
            return
        user = _user()
        make = f"ip tuntap add {self.name} mode tap user {user} && ip link set {self.name} up"
        match code:
            case errno.EPERM if there is None:
                raise HostError(f"there is no tap {self.name!r}, and {user} may not make one", hint=f"as root: {make}")
            case errno.EPERM:
                raise HostError(
                    f"the tap {self.name!r} is not {user}'s", hint=f"as root: ip link delete {self.name} && {make}"
                )
            case errno.EBUSY:
                raise HostError(
                    f"the tap {self.name!r} is in use: a tap serves one VM at a time",
                    hint=f"--net tap=NAME gives this VM another, also one that is restored; fuser -v {CLONE} shows who "
                    "uses it",
                )
            case _:
                raise HostError(
                    f"TUNSETIFF({self.name!r}, flags {flags:#x}): {os.strerror(code)}",
                    hint="is it a tap, not a tun?" if there is not None else None,
                )

    def _be_known(self) -> None:
        import hashlib

        # A restored or migrated guest knows the host's end by this address. It starts with FE, because a bridge takes
        # the lowest address of its ports, which must not be this one.
        mac = b"\xfe" + hashlib.sha256(os.fsencode(self.name)).digest()[:5]
        sockaddr = struct.pack("H6s8x", _ARPHRD_ETHER, mac)
        self._interface_call("SIOCSIFHWADDR", if_tun.SIOCSIFHWADDR, sockaddr, f"given the address {mac.hex(':')}")

    def _give(self, address: IPv4Interface) -> None:
        from socket import AF_INET

        for call, number, value in (
            ("SIOCSIFADDR", if_tun.SIOCSIFADDR, address.ip),
            ("SIOCSIFNETMASK", if_tun.SIOCSIFNETMASK, address.netmask),
        ):
            sockaddr = struct.pack("HH4s8x", AF_INET, 0, value.packed)
            self._interface_call(call, number, sockaddr, f"given the address {address}")

    def _bring_up(self) -> None:
        flags = int(_told(self.name, "flags"), 16) | _IFF_UP
        self._interface_call("SIOCSIFFLAGS", if_tun.SIOCSIFFLAGS, struct.pack("H", flags & 0xFFFF), "brought up")

    def _interface_call(self, call: str, number: int, value: bytes, what: str) -> None:
        import socket

        request = _ifreq(self.name, value)
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as any_socket:
            result, code = libc.ioctl(any_socket.fileno(), number, byref(request))
        if result < 0:
            raise HostError(
                f"the tap {self.name!r} cannot be {what} ({call}: {os.strerror(code)})",
                hint="this needs root, or CAP_NET_ADMIN; otherwise drop host=, and have root set the tap up",
            )

    def _call(self, name: str, number: int, argument: object) -> None:
        result, code = libc.ioctl(self.fd, number, argument)
        if result < 0:
            raise HostError(f"{name} of the tap {self.name!r}: {os.strerror(code)}")


def _told(name: str, what: str) -> str:
    """Return the kernel's data of an interface. Raises OSError."""
    with open(f"{SYSFS}/{name}/{what}") as file:
        return file.read()


def _bridge_of(name: str) -> str | None:
    """Return the bridge that an interface is a port of, or None."""
    try:
        master = os.path.basename(os.readlink(f"{SYSFS}/{name}/master"))
    except OSError:
        return None
    return master if os.path.exists(f"{SYSFS}/{master}/bridge") else None


def _flags_of(name: str) -> int | None:
    """Return an interface's IFF_ flags as a tap, or None if it does not exist."""
    if not os.path.exists(f"{SYSFS}/{name}"):
        return None
    try:
        flags = int(_told(name, "tun_flags"), 16)
    except FileNotFoundError:
        flags = 0
    if not flags & if_tun.IFF_TAP:
        raise UsageError(f"the interface {name!r} is not a tap", hint="use another name: a missing tap is made")
    return flags


def _open() -> int:
    try:
        fd = os.open(CLONE, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        hint = {
            errno.ENOENT: "as root: modprobe tun",
            errno.ENODEV: "as root: modprobe tun",
            errno.ENXIO: "as root: modprobe tun",
            errno.EACCES: f"as root: chmod 666 {CLONE}; who may have a tap, the kernel asks apart",
            errno.EPERM: "this container may not use taps; --net passt needs none",
        }.get(error.errno or 0)
        raise HostError(f"{CLONE} cannot be opened: {error.strerror}", hint=hint) from error
    features = c_uint()
    _, code = libc.ioctl(fd, if_tun.TUNGETFEATURES.number, byref(features))
    if code or not features.value & if_tun.IFF_VNET_HDR:
        os.close(fd)
        raise HostError(f"{CLONE} knows no header for offloads (IFF_VNET_HDR)")
    return fd


def _ifreq(name: str, value: bytes) -> Array[c_char]:
    return create_string_buffer(struct.pack(f"{_IFNAMSIZ}s", name.encode()) + value, _IFREQ)


def _user() -> str:
    import getpass

    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return str(os.getuid())
