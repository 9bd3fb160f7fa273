# SPDX-License-Identifier: Apache-2.0
"""The remote protocol's requests with a fake target: the calls to it, and the answers to the debugger."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyvmm.debug.breakpoints import Kind
from pyvmm.debug.errors import EFAULT, Refused
from pyvmm.debug.packets import PACKET_SIZE
from pyvmm.debug.protocol import SIGINT, Go, Session, Stop
from pyvmm.debug.registers import REGISTERS

SIZE = sum(register.size for register in REGISTERS)


class Fake:
    """Three threads, 64 KiB of memory from 0x1000."""

    def __init__(self) -> None:
        self.registers = [bytearray(SIZE) for _ in range(3)]
        self.memory = bytearray(1 << 16)
        self.points: set[tuple[Kind, int, int]] = set()
        self.resumed: list[dict[int, Go]] = []
        self.said: list[Any] = []

    def threads(self) -> range:
        return range(1, 4)

    def describe(self, thread: int) -> str:
        return f"number {thread}"

    def _at(self, number: int) -> slice:
        start = sum(register.size for register in REGISTERS[:number])
        return slice(start, start + REGISTERS[number].size)

    def read_register(self, thread: int, number: int) -> bytes:
        return bytes(self.registers[thread - 1][self._at(number)])

    def write_register(self, thread: int, number: int, value: bytes) -> None:
        assert len(value) == REGISTERS[number].size
        self.registers[thread - 1][self._at(number)] = value

    def read_memory(self, thread: int, address: int, size: int) -> bytes:
        assert thread in self.threads()
        if not 0x1000 <= address < 0x1000 + len(self.memory):
            raise Refused(EFAULT, "nothing there")
        return bytes(self.memory[address - 0x1000 : address - 0x1000 + size])

    def write_memory(self, thread: int, address: int, data: bytes) -> None:
        self.read_memory(thread, address, 1)
        self.memory[address - 0x1000 : address - 0x1000 + len(data)] = data

    def insert(self, kind: Kind, address: int, length: int) -> None:
        self.points.add((kind, address, length))

    def remove(self, kind: Kind, address: int, length: int) -> None:
        self.points.discard((kind, address, length))

    def resume(self, actions: Mapping[int, Go]) -> None:
        self.resumed.append(dict(actions))

    def detach(self) -> None:
        self.said.append("detach")

    def kill(self) -> None:
        self.said.append("kill")


def monitor(thread: int, command: str) -> str:
    return f"{thread}: {command}\n"


@pytest.fixture
def fake() -> Fake:
    return Fake()


@pytest.fixture
def session(fake: Fake) -> Session:
    return Session(fake, Stop(1), monitor)


def test_the_server_offers_the_features_that_gdb_needs(session: Session) -> None:
    offers = (session.handle(b"qSupported:multiprocess+;swbreak+") or b"").split(b";")
    assert {b"PacketSize=%x" % PACKET_SIZE, b"qXfer:features:read+", b"vContSupported+", b"hwbreak+"} <= set(offers)
    assert session.handle(b"vCont?") == b"vCont;c;C;s;S"
    assert session.handle(b"QStartNoAckMode") == b"OK"
    assert session.no_acks


@pytest.mark.parametrize("packet", [b"vMustReplyEmpty", b"qSymbol::", b"qTStatus", b"", b"!", b"qCRC:0,1", b"\xff\x00"])
def test_an_unknown_request_gets_an_empty_answer(session: Session, packet: bytes) -> None:
    assert session.handle(packet) == b""


def test_the_description_comes_in_pieces_and_lists_every_register_in_order(session: Session) -> None:
    text, answer = b"", b"m"
    while answer[:1] == b"m":
        answer = session.handle(b"qXfer:features:read:target.xml:%x,100" % len(text)) or b""
        text += answer[1:]
    root = ElementTree.fromstring(text.decode())
    sizes = [(reg.attrib["name"], int(reg.attrib["bitsize"]) // 8) for reg in root.iter("reg")]
    assert sizes == [(register.name, register.size) for register in REGISTERS]
    assert [feature.attrib["name"] for feature in root.iter("feature")] == [
        "org.gnu.gdb.aarch64.core",
        "org.gnu.gdb.aarch64.fpu",
        "org.pyvmm.aarch64.system",
    ]


def test_registers_are_those_of_the_selected_thread(session: Session, fake: Fake) -> None:
    assert session.handle(b"Hg2") == b"OK"
    assert session.handle(b"P20=0102030405060708") == b"OK"
    assert session.handle(b"p20") == b"0102030405060708"
    everything = session.handle(b"g")
    assert everything is not None
    assert len(everything) == 2 * SIZE
    assert session.handle(b"Hg3") == b"OK"
    assert session.handle(b"G" + everything) == b"OK"
    assert fake.registers[2] == fake.registers[1] != fake.registers[0]


def test_reads_of_memory_may_be_short_and_both_kinds_of_write_work(session: Session) -> None:
    assert session.handle(b"M1010,4:01020304") == b"OK"
    assert session.handle(b"X1014,3:a\x00\xff") == b"OK"
    assert session.handle(b"X1014,0:") == b"OK"
    assert session.handle(b"m1010,7") == b"010203046100ff"
    assert session.handle(b"m10ffe,8") == b"0000"
    assert session.handle(b"m0,8") == b"E14"
    assert session.handle(b"M0,1:00") == b"E14"
    assert len(session.handle(b"m1000,ffffffff") or b"") == PACKET_SIZE


def test_breakpoints_of_every_kind(session: Session, fake: Fake) -> None:
    for kind in Kind:
        assert session.handle(b"Z%d,1000,4" % kind) == b"OK"
    assert fake.points == {(kind, 0x1000, 4) for kind in Kind}
    assert session.handle(b"z2,1000,4;X1,0") == b"OK"
    assert (Kind.WRITE, 0x1000, 4) not in fake.points


@pytest.mark.parametrize(
    ("packet", "actions"),
    [
        (b"vCont;c", {1: Go.CONTINUE, 2: Go.CONTINUE, 3: Go.CONTINUE}),
        (b"vCont;s:2;c", {1: Go.CONTINUE, 2: Go.STEP, 3: Go.CONTINUE}),
        (b"vCont;c;s:2", {1: Go.CONTINUE, 2: Go.CONTINUE, 3: Go.CONTINUE}),
        (b"vCont;S05:3", {3: Go.STEP}),
        (b"vCont;s:0", {1: Go.STEP}),
        (b"vCont;c:-1", {1: Go.CONTINUE, 2: Go.CONTINUE, 3: Go.CONTINUE}),
        (b"c", {1: Go.CONTINUE, 2: Go.CONTINUE, 3: Go.CONTINUE}),
        (b"s", {1: Go.STEP}),
        (b"C05;1000", {1: Go.CONTINUE, 2: Go.CONTINUE, 3: Go.CONTINUE}),
    ],
)
def test_a_continue_gets_no_answer_until_the_guest_stops(
    session: Session, fake: Fake, packet: bytes, actions: dict[int, Go]
) -> None:
    assert session.handle(packet) is None
    assert session.running
    assert fake.resumed == [actions]
    reply = session.stopped(Stop(2, reason="watch:1008"))
    assert not session.running
    assert reply.startswith(b"T05")
    assert reply.endswith(b"thread:2;watch:1008;")
    assert session.handle(b"?") == reply
    assert session.handle(b"qC") == b"QC2"


def test_one_thread_may_continue_alone_and_from_another_address(session: Session, fake: Fake) -> None:
    assert session.handle(b"Hc2") == b"OK"
    assert session.handle(b"c1234") is None
    assert fake.resumed == [{2: Go.CONTINUE}]
    assert fake.read_register(2, 32) == (0x1234).to_bytes(8, "little")


def test_threads_are_listed_and_can_be_checked(session: Session) -> None:
    assert session.handle(b"qfThreadInfo") == b"m1,2,3"
    assert session.handle(b"qsThreadInfo") == b"l"
    assert session.handle(b"qThreadExtraInfo,2") == b"number 2".hex().encode()
    assert (session.handle(b"T3"), session.handle(b"T4")) == (b"OK", b"E22")


def test_the_debugger_hears_of_an_interrupt_and_of_the_end_of_the_run(session: Session) -> None:
    session.handle(b"c")
    assert session.stopped(Stop(1, SIGINT)).startswith(b"T02")
    session.handle(b"c")
    assert session.ended(0) == b"W00"
    assert session.over


def test_the_target_runs_monitor_commands(session: Session) -> None:
    assert bytes.fromhex((session.handle(b"qRcmd," + b"phys on".hex().encode()) or b"").decode()) == b"1: phys on\n"


@pytest.mark.parametrize(
    ("packet", "said", "reply"), [(b"D", "detach", b"OK"), (b"D;1", "detach", b"OK"), (b"k", "kill", None)]
)
def test_the_debugger_can_detach_or_kill(
    session: Session, fake: Fake, packet: bytes, said: str, reply: bytes | None
) -> None:
    assert session.handle(packet) == reply
    assert fake.said == [said]
    assert session.over


@pytest.mark.parametrize(
    "packet",
    [
        b"P99=00",
        b"P1=00",
        b"P1",
        b"p",
        b"pzz",
        b"G00",
        b"m",
        b"m1000",
        b"m-1,1",
        b"m1000,0x10",
        b"mffffffffffffffff0,1",
        b"M1000,4:00",
        b"M1000,1:0",
        b"X1000,4:abc",
        b"Z9,0,4",
        b"Z1,0",
        b"Z1,0,4,5",
        b"z",
        b"H",
        b"Hg9",
        b"Hgxyz",
        b"vCont;x",
        b"vCont;c:9",
        b"vCont;",
        b"qThreadExtraInfo,9",
        b"qRcmd,1",
        b"qXfer:features:read:target.xml:0",
        b"T",
        b"c12345678901234567",
    ],
)
def test_a_malformed_request_gets_an_error_and_has_no_effect(session: Session, fake: Fake, packet: bytes) -> None:
    before = [bytes(registers) for registers in fake.registers], bytes(fake.memory)
    assert session.handle(packet) == b"E22"
    assert ([bytes(registers) for registers in fake.registers], bytes(fake.memory)) == before
    assert (fake.points, fake.resumed, session.running) == (set(), [], False)


REQUESTS = st.sampled_from(
    b"? g G p P m M X Z0 z2 H Hg T c C s S D k vCont; vCont? vKill; qRcmd, qC qXfer:features:read:target.xml: "
    b"qThreadExtraInfo, qfThreadInfo qSupported".split()
)


@given(
    st.lists(
        st.tuples(REQUESTS, st.one_of(st.binary(max_size=40), st.text("0123456789abcdef,:;=-", max_size=40))),
        max_size=20,
    )
)
def test_no_request_raises(requests: list[tuple[bytes, bytes | str]]) -> None:
    session = Session(Fake(), Stop(1), monitor)
    for verb, rest in requests:
        reply = session.handle(verb + (rest.encode() if isinstance(rest, str) else rest))
        assert reply is None or len(reply) <= PACKET_SIZE
        if session.running:
            session.stopped(Stop(3))
