# SPDX-License-Identifier: Apache-2.0
"""The remote protocol's frames: every packet gets through, nothing else does, and no stream causes an error."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from pyvmm.debug.packets import PACKET_SIZE, Decoder, Event, Token, escape, frame, unescape


def decode(*parts: bytes) -> list[Event]:
    decoder = Decoder()
    return [event for part in parts for event in decoder.feed(part)]


@given(st.lists(st.binary(max_size=300), max_size=5), st.data())
def test_packets_get_through_however_the_stream_is_split(payloads: list[bytes], data: st.DataObject) -> None:
    stream = b"".join(frame(escape(payload)) for payload in payloads)
    cut = data.draw(st.integers(0, len(stream)))
    assert decode(stream[:cut], stream[cut:]) == payloads
    assert decode(*(bytes([byte]) for byte in stream)) == payloads


@given(st.binary())
def test_unescape_reverses_escape_and_escaped_data_cannot_end_a_packet(data: bytes) -> None:
    escaped = escape(data)
    assert not set(escaped) & set(b"#$*")
    assert unescape(escaped) == data


@given(st.lists(st.binary(max_size=200)))
def test_no_stream_raises_and_the_next_packet_is_found(parts: list[bytes]) -> None:
    decoder = Decoder()
    for part in parts:
        decoder.feed(part)
    # A packet before may still wait for its checksum.
    decoder.feed(b"#00")
    assert decoder.feed(frame(b"g"))[-1:] == [b"g"]


def test_a_wrong_or_invalid_checksum_is_reported() -> None:
    assert decode(b"$g#67", b"$g#68", b"$g#zz", b"$g#+7") == [b"g", *[Token.DAMAGED] * 3]


def test_acknowledgements_and_interrupts_between_packets_are_read() -> None:
    assert decode(b"+-\x03?\n$\x03#03\x03") == [Token.ACK, Token.NAK, Token.INTERRUPT, b"\x03", Token.INTERRUPT]


def test_a_packet_that_lost_its_end_does_not_swallow_the_next_one() -> None:
    assert decode(b"$m8000" + frame(b"g")) == [b"g"]


def test_a_giant_packet_is_reported_once_and_discarded() -> None:
    decoder = Decoder()
    assert decoder.feed(b"$") == []
    for _ in range(100):
        assert decoder.feed(b"a" * PACKET_SIZE) == []
        assert len(decoder._raw) <= PACKET_SIZE + 1
    assert decoder.feed(b"#00" + frame(b"g")) == [Token.OVERLONG, b"g"]
    assert decode(frame(b"a" * PACKET_SIZE)) == [b"a" * PACKET_SIZE]
    assert decode(frame(b"a" * (PACKET_SIZE + 1))) == [Token.OVERLONG]
