# SPDX-License-Identifier: Apache-2.0
"""A network card over plain memory: frames between its rings and a socket, whatever the driver and the socket do."""

from __future__ import annotations

import contextlib
import errno
import os
import random
import socket
import struct
import threading
import time
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyvmm.devices.kinds.net import parse_mac
from pyvmm.devices.virtio import tap
from pyvmm.devices.virtio.net import VirtioNet, default_mac
from pyvmm.devices.virtio.netbackend import HEADER, NetFeature, Stream
from pyvmm.errors import HostError, UsageError
from pyvmm.kvm import libc
from pyvmm.uapi import if_tun
from tests.unit.net_driver import DATA, PATIENCE, Driver, eventually
from tests.unit.plain_guest import BASE, PAGE, SIZE

MAC = bytes.fromhex("020000000001")
MOST = 65535 + 18


def pair() -> tuple[VirtioNet, socket.socket]:
    """Return a card, and the socket at its other end."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    theirs.settimeout(PATIENCE)
    return VirtioNet(Stream("peer", ours.detach()), MAC), theirs


@pytest.fixture(params=[False, True], ids=["split", "packed"])
def wired(request: pytest.FixtureRequest) -> Iterator[tuple[Driver, socket.socket]]:
    device, peer = pair()
    with peer, Driver(device, packed=request.param) as driver:
        yield driver, peer


def pattern(n: int, seed: int = 0) -> bytes:
    return bytes((seed + 7 * i + i // 251) & 0xFF for i in range(n))


def framed(frame: bytes) -> bytes:
    return struct.pack(">I", len(frame)) + frame


def receive(peer: socket.socket) -> bytes:
    def exactly(n: int) -> bytes:
        data = b""
        while len(data) < n:
            part = peer.recv(n - len(data))
            assert part, "the card hung up"
            data += part
        return data

    (length,) = struct.unpack(">I", exactly(4))
    return exactly(length)


def send(driver: Driver, frame: bytes, cuts: tuple[int, ...] = (), header: bytes = bytes(HEADER)) -> None:
    """Give the card a frame, header first, in segments that end at ``cuts``."""
    data = header + frame
    driver.write(DATA, data)
    ends = [*sorted({cut for cut in cuts if 0 < cut < len(data)}), len(data)]
    starts = [0, *ends[:-1]]
    driver.tx.give([(DATA + start, end - start, False) for start, end in zip(starts, ends, strict=True)])


def buffers(driver: Driver, count: int, size: int, *, at: int = DATA) -> list[int]:
    """Give the card receive buffers of one segment each, one behind the other."""
    places = [at + n * size for n in range(count)]
    driver.rx.give(*([(place, size, True)] for place in places))
    return places


# ---- what a driver reads


def test_the_configuration_has_address_link_queues_and_mtu() -> None:
    device, peer = pair()
    with peer, Driver(device):
        assert device.config() == MAC + struct.pack("<HHH", 1, 1, 65520)
        assert device.features == NetFeature.MAC | NetFeature.STATUS | NetFeature.MTU | NetFeature.MRG_RXBUF


def test_features_are_refused_without_those_they_require() -> None:
    device, peer = pair()
    with peer, Driver(device):
        assert "CSUM" in (device.negotiate(NetFeature.HOST_TSO4) or "")
        assert "GUEST_CSUM" in (device.negotiate(NetFeature.CSUM | NetFeature.GUEST_TSO6) or "")
        assert device.negotiate(NetFeature.CSUM | NetFeature.HOST_TSO6 | NetFeature.HOST_ECN) is None
        assert device.negotiate(0) is None


@pytest.mark.parametrize("text", ["", "02:00:00:00:00", "02:00:00:00:00:0g", "01:00:5e:00:00:01", "00:00:00:00:00:00"])
def test_an_address_that_no_card_can_have_is_refused(text: str) -> None:
    with pytest.raises(UsageError):
        parse_mac(text)


@pytest.mark.parametrize(
    ("there", "code", "words", "hint"),
    [
        (None, errno.EPERM, "there is no tap 'pvno', and .* may not make one", "ip tuntap add pvno mode tap user "),
        (if_tun.IFF_TAP, errno.EPERM, "the tap 'pvno' is not .*'s", "as root: ip link delete pvno && ip tuntap add"),
        (if_tun.IFF_TAP, errno.EBUSY, "the tap 'pvno' is in use", "--net tap=NAME"),
        (if_tun.IFF_TAP, errno.EINVAL, "TUNSETIFF.*Invalid argument", "a tap, not a tun"),
    ],
)
def test_the_error_for_a_tap_without_permission_has_the_commands_for_root(
    monkeypatch: pytest.MonkeyPatch, there: int | None, code: int, words: str, hint: str
) -> None:
    monkeypatch.setattr(tap, "_open", lambda: os.open(os.devnull, os.O_RDWR))
    monkeypatch.setattr(tap, "_flags_of", lambda _name: there)
    monkeypatch.setattr(libc, "ioctl", lambda *_: (-1, code))
    before = os.listdir("/proc/self/fd")
    with pytest.raises(HostError, match=words) as refused:
        tap.Tap("pvno")
    assert hint in (refused.value.hint or "")
    assert os.listdir("/proc/self/fd") == before


def test_the_error_on_a_host_without_taps_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tap, "CLONE", "/nonexistent/tun")
    with pytest.raises(HostError, match="/nonexistent/tun cannot be opened") as refused:
        tap.Tap("pvno")
    assert refused.value.hint == "as root: modprobe tun"


def test_the_default_address_is_local_stable_and_different_for_each_card() -> None:
    assert default_mac("tap0") == default_mac("tap0") != default_mac("tap1")
    assert default_mac("tap0")[0] == 0x02
    assert parse_mac("02:aB:00:00:00:01") == bytes.fromhex("02ab00000001")


# ---- from the guest


@pytest.mark.parametrize("cuts", [(), (12,), (1, 11, 13, 14), (20, 30, 40)])
def test_a_frame_is_sent_without_its_header_whatever_its_layout(
    wired: tuple[Driver, socket.socket], cuts: tuple[int, ...]
) -> None:
    driver, peer = wired
    for n in (14, 60, 1514, MOST):
        frame = pattern(n, n)
        send(driver, frame, cuts, header=b"\xff" * HEADER)
        assert receive(peer) == frame
        [(_, written)] = driver.wait(driver.tx)
        assert written == 0
    assert driver.device.native.sent.frames == 4


@pytest.mark.parametrize("n", [0, 1, 13, MOST + 1, 3 << 20])
def test_an_invalid_frame_is_dropped_and_the_next_one_is_sent(wired: tuple[Driver, socket.socket], n: int) -> None:
    driver, peer = wired
    driver.tx.give([(DATA, HEADER + n, False)])
    driver.wait(driver.tx)
    send(driver, pattern(60))
    assert receive(peer) == pattern(60)
    assert driver.device.native.sent.dropped == 1


def test_a_peer_that_does_not_read_delays_the_sender_and_still_gets_every_frame(
    wired: tuple[Driver, socket.socket],
) -> None:
    driver, peer = wired
    frames = [pattern(30000 + n, n) for n in range(60)]
    for n, frame in enumerate(frames):
        driver.write(DATA + n * 0x8000, bytes(HEADER) + frame)
    driver.tx.give(*([(DATA + n * 0x8000, HEADER + len(frame), False)] for n, frame in enumerate(frames)))
    eventually(lambda: driver.device.native.sent.frames > 0, "a frame goes")
    assert [receive(peer) for _ in frames] == frames
    assert len(driver.wait(driver.tx, len(frames))) == len(frames)
    assert driver.device.native.sent.dropped == 0


def test_only_a_frame_in_a_private_page_is_lost(wired: tuple[Driver, socket.socket]) -> None:
    driver, peer = wired
    driver.hide(DATA + PAGE)
    frame = pattern(2 * PAGE)
    driver.tx.give([(DATA, HEADER, False), (DATA + PAGE - 100, 200, False)])
    driver.tx.give([(BASE + SIZE, 100, False)])
    driver.wait(driver.tx, 2)
    driver.write(DATA + 2 * PAGE, bytes(HEADER) + frame)
    driver.tx.give([(DATA + 2 * PAGE, HEADER + len(frame), False)])
    assert receive(peer) == frame
    assert driver.device.native.sent.faults == 2


def test_a_private_page_inside_a_long_frame_does_not_desynchronise_the_stream(
    wired: tuple[Driver, socket.socket],
) -> None:
    """The socket takes a large frame in parts: the first is sent before the kernel reaches the page."""
    driver, peer = wired
    at = DATA + PAGE
    driver.hide(at + 15 * PAGE)
    driver.write(at, pattern(15 * PAGE))
    driver.tx.give(*([(DATA, HEADER, False), (at, 15 * PAGE + 100, False)] for _ in range(20)))
    send(driver, b"the end of the test", ())
    while receive(peer) != b"the end of the test":
        pass
    assert driver.device.native.sent.faults == 20


# ---- to the guest


def test_a_received_frame_follows_a_header_that_counts_its_buffers(wired: tuple[Driver, socket.socket]) -> None:
    driver, peer = wired
    places = buffers(driver, 40, 2000)
    frames = [pattern(n, n) for n in (14, 1988, 1989, 9000, 60)]
    peer.sendall(b"".join(map(framed, frames)))
    needed = [-(-(HEADER + len(frame)) // 2000) for frame in frames]
    back = driver.wait(driver.rx, sum(needed))
    assert len(back) == sum(needed)
    for frame, count in zip(frames, needed, strict=True):
        parts = [driver.read(places[ident], written) for ident, written in back[:count]]
        back = back[count:]
        assert b"".join(parts) == struct.pack("<10xH", count) + frame
    assert driver.device.native.received.bytes == sum(map(len, frames))


def test_a_frame_without_merged_buffers_fits_one_buffer_or_is_dropped() -> None:
    device, peer = pair()
    with peer, Driver(device, NetFeature.MAC) as driver:
        driver.rx.give(*([(DATA + n * PAGE, 500, True), (DATA + n * PAGE + 500, 500, True)] for n in range(3)))
        peer.sendall(framed(pattern(989)) + framed(pattern(988)) + framed(pattern(100)))
        back = driver.wait(driver.rx, 2)
        assert [written for _, written in back] == [1000, 112]
        assert driver.read(DATA, 1000) == struct.pack("<10xH", 1) + pattern(988)
        assert device.native.received.dropped == 1


def test_frames_wait_for_buffers_and_none_is_lost(wired: tuple[Driver, socket.socket]) -> None:
    driver, peer = wired
    frames = [pattern(3000, n) for n in range(5)]
    peer.sendall(b"".join(map(framed, frames)))
    got: list[bytes] = []
    for n in range(10):  # two to a frame
        [place] = buffers(driver, 1, 2000, at=DATA + n * PAGE)
        if n % 2:
            parts = [(DATA + (n - 1) * PAGE), place]
            back = driver.wait(driver.rx, 2)
            data = b"".join(driver.read(at, written) for at, (_, written) in zip(parts, back, strict=True))
            got.append(data[HEADER:])
        else:
            assert driver.rx.used() == []
    assert got == frames
    assert driver.device.native.received.dropped == 0


def test_buffers_that_cannot_be_written_are_returned_empty(wired: tuple[Driver, socket.socket]) -> None:
    driver, peer = wired
    driver.hide(DATA)
    driver.rx.give(
        [(DATA, 2000, True)],
        [(BASE + SIZE, 2000, True)],
        [(DATA + PAGE, HEADER - 1, True)],
        [(DATA + PAGE, 2000, False)],
    )
    peer.sendall(framed(pattern(100)) + framed(pattern(200)))
    assert {written for _, written in driver.wait(driver.rx, 4)} == {0}
    driver.rx.give([(DATA + PAGE, 2000, True)])
    assert [written for _, written in driver.wait(driver.rx)] == [212]
    assert driver.device.native.received.faults == 4


@pytest.mark.parametrize("n", [0, 1, 13])
def test_frames_from_the_peer_that_are_too_short_are_dropped(n: int) -> None:
    device, peer = pair()
    with peer, Driver(device) as driver:
        buffers(driver, 1, 2000)
        peer.sendall(framed(bytes(n)) + framed(pattern(14)))
        assert [written for _, written in driver.wait(driver.rx)] == [26]


# ---- the peer's end


@pytest.mark.parametrize("last", [b"", b"\0\0", framed(pattern(100))[:50], b"\xff\xff\xff\xff"])
def test_the_link_goes_down_with_the_peer_and_the_guest_continues(last: bytes) -> None:
    device, peer = pair()
    with peer, Driver(device) as driver:
        buffers(driver, 1, 2000)
        peer.sendall(last)
        peer.shutdown(socket.SHUT_RDWR)
        eventually(lambda: driver.transport.changes == 1, "the configuration changes")
        assert device.config()[6:8] == b"\0\0"
        send(driver, pattern(60))
        driver.wait(driver.tx)
        assert device.native.sent.dropped == 1
        assert not driver.transport.reset_needed


def test_a_send_notices_that_the_peer_has_gone() -> None:
    device, peer = pair()
    with Driver(device) as driver:
        peer.close()
        send(driver, pattern(60))
        driver.wait(driver.tx)
        eventually(lambda: driver.transport.changes == 1, "the configuration changes")


def test_the_error_names_a_missing_socket() -> None:
    with pytest.raises(UsageError, match="no socket"):
        Stream.connect("/nonexistent/passt.sock")


def test_the_error_names_a_socket_that_nobody_serves(tmp_path: object) -> None:
    path = f"{tmp_path}/socket"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(path)
    with pytest.raises(HostError, match="nothing answers"):
        Stream.connect(path)


# ---- reset, pause and restore


def test_a_broken_ring_needs_a_reset_and_works_afterwards() -> None:
    device, peer = pair()
    with peer, Driver(device) as driver:
        driver.write(driver.tx.base + 0x8002, struct.pack("<H", 999))
        os.eventfd_write(driver.tx.queue.kick, 1)
        eventually(lambda: driver.transport.reset_needed, "the device gives up")
        driver.reset(packed=True)
        send(driver, pattern(60))
        assert receive(peer) == pattern(60)


@pytest.mark.parametrize("sending", [False, True], ids=["received", "sent"])
def test_a_ring_whose_interrupt_flags_cannot_be_read_needs_a_reset_at_once(sending: bool) -> None:
    device, peer = pair()
    with peer, Driver(device, packed=True) as driver:
        ring = driver.tx if sending else driver.rx
        driver.hide(ring.base + 0x8000)
        buffers(driver, 1, 2000)
        peer.sendall(framed(pattern(100)))
        send(driver, pattern(60))
        eventually(lambda: driver.transport.reset_needed, "the card needs a reset")
        assert "one of its rings is not accessible" in str(ring.queue.problem)


@pytest.mark.parametrize("packed", [False, True], ids=["split", "packed"])
def test_overwritten_rings_break_only_the_card_while_frames_go_both_ways(packed: bool) -> None:
    device, peer = pair()
    chance = random.Random(5)
    peer.settimeout(None)

    def flood() -> None:
        with contextlib.suppress(ConnectionError):
            while True:
                peer.sendall(framed(pattern(1500)))

    def drain() -> None:
        with contextlib.suppress(ConnectionError):
            while peer.recv(1 << 16):
                pass

    with peer, Driver(device, packed=packed) as driver:
        threads = [threading.Thread(target=job, daemon=True) for job in (flood, drain)]
        for thread in threads:
            thread.start()
        for _ in range(40):
            buffers(driver, 8, 2000)
            driver.tx.give(*([(DATA, 1000, False)] for _ in range(4)))
            end = time.monotonic() + 0.02
            while time.monotonic() < end and not (driver.rx.queue.problem or driver.tx.queue.problem):
                ring = chance.choice((driver.rx, driver.tx))
                at = ring.base + chance.choice((chance.randrange(16 * 64), 0x8000 + chance.randrange(160)))
                driver.write(at, chance.randbytes(chance.choice((1, 2, 4, 8))))
                os.eventfd_write(ring.queue.kick, 1)
            driver.reset(packed=packed)
        assert driver.transport.reset_needed
        buffers(driver, 8, 2000, at=DATA + PAGE)
        driver.wait(driver.rx, 8)
        send(driver, pattern(60))
        driver.wait(driver.tx)
        assert device.link_up
        peer.shutdown(socket.SHUT_RDWR)
        for thread in threads:
            thread.join()


def test_a_paused_card_has_returned_every_buffer_and_continues_on_resume(wired: tuple[Driver, socket.socket]) -> None:
    driver, peer = wired
    places = buffers(driver, 8, 2000)
    peer.sendall(framed(pattern(60000)))  # more than fits: the card takes all eight buffers, and waits
    eventually(lambda: driver.rx.queue.native.chains == 8, "the buffers are taken")
    driver.device.pause()
    assert driver.rx.queue.native.chains == 0
    assert driver.rx.used() == []
    driver.device.resume()
    more = buffers(driver, 23, 2000, at=DATA + 8 * 2000)
    back = driver.wait(driver.rx, 31)
    data = b"".join(driver.read(at, written) for at, (_, written) in zip(places + more, back, strict=True))
    assert data == struct.pack("<10xH", 31) + pattern(60000)


@pytest.mark.parametrize("packed", [False, True], ids=["split", "packed"])
def test_buffers_before_an_invalid_one_are_returned_with_it_and_only_once(packed: bool) -> None:
    device, peer = pair()
    with peer, Driver(device, packed=packed) as driver:
        given = driver.rx.give(
            [(DATA, 100, True)],
            [(DATA + 100, 50, True), (DATA + 150, 50, True)],
            [(BASE + SIZE, 2000, True)],
            [(DATA + 200, 100, True)],
        )
        peer.sendall(framed(pattern(500)))  # the card examines all four buffers for it, and waits
        assert driver.wait(driver.rx, 3) == [(each, 0) for each in given[:3]]
        device.pause()
        device.resume()
        given += driver.rx.give([(DATA + 300, 2000, True)])
        assert driver.wait(driver.rx, 2) == [(given[3], 100), (given[4], 412)]


def test_a_reset_in_the_middle_of_a_frame_keeps_the_stream_in_step() -> None:
    device, peer = pair()
    with peer, Driver(device) as driver:
        buffers(driver, 1, 2000)
        peer.sendall(framed(pattern(1000))[:500])
        eventually(lambda: driver.rx.queue.native.kicks > 0, "it is served")
        device.stop()
        device.start([driver.rx.queue, driver.tx.queue], device.features)
        peer.sendall(framed(pattern(1000))[500:])
        assert [written for _, written in driver.wait(driver.rx)] == [1012]


def test_a_restored_card_has_the_address_that_its_driver_knows() -> None:
    (device, peer), (other, its_peer) = pair(), pair()
    other.mac = bytes.fromhex("020000000002")
    with peer, its_peer, Driver(device), Driver(other):
        other.load(device.save())
        assert other.config() == device.config()


def test_a_restored_card_cannot_get_another_address() -> None:
    (device, peer), (ours, theirs) = pair(), socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    other = VirtioNet(Stream("peer", ours.detach()), bytes.fromhex("020000000002"))
    with peer, theirs, Driver(device), Driver(other):
        with pytest.raises(UsageError, match="has the address 02:00:00:00:00:01, which a restore cannot change"):
            other.load(device.save())
        assert other.mac.hex() == "020000000002"


def test_a_restored_card_without_an_asked_address_gets_the_saved_one() -> None:
    (device, peer), (ours, theirs) = pair(), socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    other = VirtioNet(Stream("another name", ours.detach()))
    with peer, theirs, Driver(device), Driver(other):
        assert other.mac != MAC
        other.load(device.save())
        assert other.mac == MAC


def test_a_queue_that_the_driver_did_not_set_up_is_not_used() -> None:
    device, peer = pair()
    with peer, Driver(device) as driver:
        device.stop()
        driver.rx.queue.ready = False
        device.start([driver.rx.queue, driver.tx.queue], device.features)
        peer.sendall(framed(pattern(60)))
        send(driver, pattern(60))
        assert receive(peer) == pattern(60)
        peer.close()
        eventually(lambda: not device.link_up, "the link goes")


# ---- arbitrary chains

SEGMENT = st.tuples(
    st.one_of(st.integers(DATA, DATA + 8 * PAGE), st.sampled_from([0, BASE + SIZE - 10, BASE, 2**64 - 2**40])),
    st.one_of(st.integers(1, 3000), st.sampled_from([1 << 16, 1 << 20, 1 << 28])),
    st.booleans(),
)
# A card ordered to write a frame over its own rings does so, and then reads entries that no driver wrote.
ROOM = SEGMENT.filter(lambda segment: not (segment[2] and BASE <= segment[0] < DATA))


END = DATA + 16 * PAGE


def well_ordered(chain: list[tuple[int, int, bool]]) -> list[tuple[int, int, bool]]:
    return sorted(chain, key=lambda segment: segment[2])


@settings(max_examples=60)
@given(
    sent=st.lists(st.lists(SEGMENT, min_size=1, max_size=4).map(well_ordered), max_size=12),
    room=st.lists(st.lists(ROOM, min_size=1, max_size=3).map(well_ordered), max_size=12),
    frames=st.lists(st.binary(max_size=3000), max_size=8),
    hidden=st.sets(st.integers(0, 8), max_size=4),
    packed=st.booleans(),
    merged=st.booleans(),
)
def test_every_chain_is_returned_and_the_card_still_works(
    sent: list[list[tuple[int, int, bool]]],
    room: list[list[tuple[int, int, bool]]],
    frames: list[bytes],
    hidden: set[int],
    packed: bool,
    merged: bool,
) -> None:
    device, peer = pair()
    features = device.features if merged else NetFeature.MAC
    with peer, Driver(device, features, packed=packed) as driver:
        for page in hidden:
            driver.hide(DATA + page * PAGE)
        if room:
            driver.rx.give(*room)
        if sent:
            driver.tx.give(*sent)
        peer.sendall(b"".join(map(framed, frames)))
        driver.write(END, bytes(HEADER) + b"the end of the test")
        driver.tx.give([(END, HEADER + 19, False)])
        while receive(peer) != b"the end of the test":
            pass
        assert len(driver.wait(driver.tx, len(sent) + 1)) == len(sent) + 1
        device.pause()
        assert not driver.transport.reset_needed
        assert not driver.rx.queue.problem
