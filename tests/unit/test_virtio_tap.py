# SPDX-License-Identifier: Apache-2.0
"""A card on a real tap, with a packet socket at the other end: kernel and pyvmm agree on frames and headers."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import struct
import subprocess
from collections.abc import Iterator
from ipaddress import IPv4Interface
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyvmm.devices.virtio.net import VirtioNet
from pyvmm.devices.virtio.netbackend import HEADER, NetFeature
from pyvmm.devices.virtio.tap import Tap
from pyvmm.errors import HostError, PyvmmError, UsageError
from tests.unit.net_driver import DATA, Driver, eventually
from tests.unit.plain_guest import PAGE

NAME = f"pv{os.getpid() % 100000}"
MAC = bytes.fromhex("02007eadbeef")
ETH_P_ALL = 3
TYPE = b"\x88\xb5"
"""An Ethernet type for experiments (IEEE 802.3): the kernel's own traffic has others."""


def no_taps() -> str | None:
    try:
        Tap(NAME).close()
    except PyvmmError as error:
        return str(error)
    return None if shutil.which("ip") else "there is no ip: apt install iproute2"


pytestmark = pytest.mark.skipif(no_taps() is not None, reason=f"taps cannot be made here: {no_taps()}")


def ip(*words: str) -> str:
    return subprocess.run(["ip", *words], check=True, capture_output=True, text=True).stdout


@contextlib.contextmanager
def card(*, name: str = NAME, packed: bool = False) -> Iterator[tuple[Driver, socket.socket]]:
    """Make a driver of a card on a tap where the host itself sends nothing, and a packet socket at the host's end."""
    ip("tuntap", "add", name, "mode", "tap")
    try:
        Path(f"/proc/sys/net/ipv6/conf/{name}/disable_ipv6").write_text("1")
        ip("link", "set", name, "up")
        device = VirtioNet(Tap(name), MAC)
        with Driver(device, packed=packed) as driver, socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as host:
            host.bind((name, ETH_P_ALL))
            host.settimeout(20)
            # Once the tap is open it has a carrier, and soon a queue. Until then it loses frames.
            eventually(lambda: "noop" not in ip("link", "show", name), "the tap has a queue")
            yield driver, host
    finally:
        subprocess.run(["ip", "link", "delete", name], check=False, capture_output=True)


def frame(n: int, seed: int = 0) -> bytes:
    return b"\xff" * 6 + MAC + TYPE + bytes((seed + i) & 0xFF for i in range(n - 14))


def send(driver: Driver, header: bytes, data: bytes, *, at: int = DATA) -> None:
    driver.write(at, header + data)
    driver.tx.give([(at, HEADER, False), (at + HEADER, len(data), False)])
    driver.wait(driver.tx)


def heard(host: socket.socket) -> bytes:
    """Return the next frame of the guest; frames of the host itself are skipped."""
    while True:
        data, address = host.recvfrom(1 << 17)
        if data[12:14] == TYPE and address[2] != socket.PACKET_OUTGOING:
            return data


@pytest.mark.parametrize("packed", [False, True], ids=["split", "packed"])
def test_frames_go_both_ways(packed: bool) -> None:
    with card(packed=packed) as (driver, host):
        for n in (60, 1514):
            send(driver, bytes(HEADER), frame(n, n))
            assert heard(host) == frame(n, n)
        driver.rx.give(*([(DATA + n * PAGE, PAGE, True)] for n in range(40)))
        for number, n in enumerate((60, 1514)):
            host.send(frame(n, n))
            [(_, written)] = driver.wait(driver.rx)
            assert driver.read(DATA + number * PAGE, written) == struct.pack("<10xH", 1) + frame(n, n)


def test_few_or_small_buffers_lose_no_frame_that_fits() -> None:
    """With less room than the longest frame, the card reads a frame into its own memory to learn its length."""
    with card() as (driver, host):
        for n in range(12):
            host.send(frame(1000, n))
        for n in range(12):
            driver.rx.give([(DATA + 2 * n * PAGE, 512, True)], [(DATA + (2 * n + 1) * PAGE, 1024, True)])
            back = driver.wait(driver.rx, 2)
            assert [written for _, written in back] == [512, 500]
            data = driver.read(DATA + 2 * n * PAGE, 512) + driver.read(DATA + (2 * n + 1) * PAGE, 500)
            assert data == struct.pack("<10xH", 2) + frame(1000, n)


def test_a_frame_longer_than_any_buffer_is_dropped() -> None:
    with card() as (driver, host):
        driver.device.stop()
        driver.device.start([driver.rx.queue, driver.tx.queue], int(NetFeature.MAC))
        driver.rx.give(*([(DATA + n * PAGE, 600, True)] for n in range(4)))
        host.send(frame(1000))
        host.send(frame(500))
        [(_, written)] = driver.wait(driver.rx)
        assert written == HEADER + 500
        assert driver.device.native.received.dropped == 1


def test_a_buffer_in_a_private_page_loses_its_frame() -> None:
    with card() as (driver, host):
        driver.hide(DATA)
        driver.rx.give(*([(DATA + n * PAGE, PAGE, True)] for n in range(20)))
        host.send(frame(100))
        back = driver.wait(driver.rx, 17)
        assert {written for _, written in back} == {0}
        driver.rx.give(*([(DATA + n * PAGE, PAGE, True)] for n in range(20, 40)))
        host.send(frame(200))
        [(_, written)] = driver.wait(driver.rx)
        assert written == 212


# ---- headers

NEEDS_CSUM, TCPV4, TCPV6, ECN = 1, 1, 4, 0x80


@pytest.fixture(scope="module")
def one() -> Iterator[tuple[Driver, socket.socket]]:
    """Share one card for all headers: the kernel takes a while to make a tap."""
    with card(name=f"{NAME}h") as made:
        yield made


@settings(max_examples=150)
@given(
    flags=st.integers(0, 255),
    kind=st.one_of(st.integers(0, 255), st.sampled_from([TCPV4, TCPV6, TCPV4 | ECN])),
    numbers=st.tuples(*[st.integers(0, 0xFFFF)] * 4),
    length=st.integers(14, 3000),
)
def test_no_header_stops_the_card(
    one: tuple[Driver, socket.socket], flags: int, kind: int, numbers: tuple[int, int, int, int], length: int
) -> None:
    driver, host = one
    send(driver, struct.pack("<BBHHHHH", flags, kind, *numbers, 0), frame(length))
    send(driver, bytes(HEADER), frame(60, 77))
    while heard(host) != frame(60, 77):
        pass
    sent = driver.device.native.sent
    assert sent.frames + sent.dropped == driver.tx.queue.native.chains


def test_the_tap_has_the_negotiated_offloads() -> None:
    tap = Tap(NAME)
    try:
        wanted = NetFeature.CSUM | NetFeature.GUEST_CSUM | NetFeature.GUEST_TSO4 | NetFeature.HOST_TSO4
        assert tap.offloads & wanted == wanted
        tap.use(wanted)
        tap.use(NetFeature(0))
        with pytest.raises(HostError, match="TUNSETOFFLOAD"):
            tap.use(NetFeature.GUEST_TSO4)  # needs the checksum offload
    finally:
        tap.close()


SOL_PACKET, PACKET_VNET_HDR = 263, 15


@pytest.mark.parametrize("fewer", [False, True])
def test_a_driver_gets_no_frame_that_needs_offloads_it_lacks(fewer: bool) -> None:
    with card() as (driver, host):
        driver.device.stop()
        host.setsockopt(SOL_PACKET, PACKET_VNET_HDR, 1)
        unfinished = struct.pack("<BBHHHH", NEEDS_CSUM, 0, 0, 0, 34, 16) + frame(100)
        for _ in range(3):
            host.send(unfinished)  # waits in the tap, in the form for the last driver
        if fewer:
            driver.features = 0
        driver.reset(packed=False)
        driver.rx.give(*([(DATA + n * PAGE, PAGE, True)] for n in range(8)))
        host.send(bytes(10) + frame(200))
        came: list[tuple[int, int]] = []
        while not came or came[-1][1] != HEADER + 200:
            came += driver.wait(driver.rx)
        flags = [driver.read(DATA + n * PAGE, 1)[0] for n in range(len(came))]
        assert flags == ([] if fewer else [NEEDS_CSUM] * 3) + [0]


# ---- taps


def test_a_tap_made_by_pyvmm_is_up_has_its_address_and_is_removed_on_close() -> None:
    tap = Tap(NAME, IPv4Interface("10.219.77.1/28"))
    try:
        assert tap.is_up
        assert tap.mtu == 1500
        assert "10.219.77.1/28" in ip("addr", "show", NAME)
    finally:
        tap.close()
    assert not Path("/sys/class/net", NAME).exists()


def test_a_tap_made_again_has_the_address_that_a_saved_guest_knows() -> None:
    addresses = []
    for name in (NAME, NAME, f"{NAME}x"):
        tap = Tap(name)
        addresses.append(Path("/sys/class/net", name, "address").read_text())
        tap.close()
    assert addresses[0] == addresses[1] != addresses[2]
    assert addresses[0].startswith("fe:")


def test_a_tap_serves_one_card_at_a_time() -> None:
    tap = Tap(NAME)
    try:
        with pytest.raises(HostError, match="in use"):
            Tap(NAME)
    finally:
        tap.close()


@pytest.mark.parametrize("name", ["", "a" * 16, "a b", "a/b", "tap%d", "..", "a:1"])
def test_an_invalid_interface_name_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match="name of a tap"):
        Tap(name)


def test_an_interface_that_is_not_a_tap_is_refused_unchanged() -> None:
    with pytest.raises(UsageError, match="not a tap"):
        Tap("lo")


def test_deleting_the_tap_takes_the_link_down() -> None:
    with card() as (driver, _):
        driver.rx.give([(DATA, PAGE, True)])
        ip("link", "delete", NAME)
        eventually(lambda: driver.transport.changes == 1, "the configuration changes")
        assert not driver.device.link_up


def test_two_guests_with_one_address_on_one_bridge_are_refused() -> None:
    names = [f"{NAME}a", f"{NAME}b", f"{NAME}c"]
    bridges = [f"{NAME}x", f"{NAME}y"]
    with contextlib.ExitStack() as stack:
        for bridge in bridges:
            ip("link", "add", bridge, "type", "bridge")
            stack.callback(ip, "link", "delete", bridge)
        taps = [stack.enter_context(contextlib.closing(Tap(name))) for name in names]
        for tap, bridge in zip(taps, (bridges[0], bridges[0], bridges[1]), strict=True):
            ip("link", "set", tap.name, "master", bridge)
        taps[0].claim(MAC)
        with pytest.raises(HostError, match=f"02:00:7e:ad:be:ef is another guest's on the bridge {bridges[0]}"):
            taps[1].claim(MAC)
        taps[1].claim(bytes([*MAC[:5], 1]))
        taps[2].claim(MAC)  # another bridge
        taps[0].claim(bytes([*MAC[:5], 2]))  # the card of a restored guest: the saved address replaces the first
        taps[1].claim(MAC)
        taps[1].close()
        taps[0].claim(MAC)


def test_guests_with_one_address_and_no_bridge_do_not_meet() -> None:
    with contextlib.closing(Tap(f"{NAME}a")) as one, contextlib.closing(Tap(f"{NAME}b")) as other:
        one.claim(MAC)
        other.claim(MAC)
