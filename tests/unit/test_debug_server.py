# SPDX-License-Identifier: Apache-2.0
"""Where a debugger connects, and how a fake guest fares whatever the debugger does."""

from __future__ import annotations

import contextlib
import socket
import stat
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyvmm.cli import main
from pyvmm.debug import server as module
from pyvmm.debug.monitor import HELP
from pyvmm.debug.packets import PACKET_SIZE, frame
from pyvmm.debug.protocol import Go, Stop
from pyvmm.debug.registers import REGISTERS
from pyvmm.debug.server import GdbServer
from pyvmm.errors import UsageError
from pyvmm.vcpu.outcome import Ending, Outcome


@pytest.mark.parametrize(
    ("where", "address"),
    [("tcp:0", "127.0.0.1:"), ("tcp:localhost:0", "127.0.0.1:"), ("tcp:127.0.0.1:0,nowait", "127.0.0.1:")],
)
def test_a_tcp_port_is_local_unless_requested_otherwise(where: str, address: str) -> None:
    with GdbServer(where) as server:
        assert server.address.startswith(address)
        assert server.waits is not where.endswith("nowait")
        port = server.address.rpartition(":")[2]
        with pytest.raises(
            UsageError, match=f"no debugger can connect at tcp:{port}: Address already in use"
        ) as caught:
            GdbServer(f"tcp:{port}")
        assert "use another address" in str(caught.value.hint)


def test_a_socket_is_open_only_to_its_owner_and_is_removed_after_the_run(tmp_path: Path) -> None:
    path = tmp_path / "gdb"
    with GdbServer(str(path)) as server:
        assert server.address == str(path)
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        with pytest.raises(UsageError, match="Address already in use") as caught:
            GdbServer(str(path))
        assert f"rm {path}" in str(caught.value.hint)
        with socket.socket(socket.AF_UNIX) as client:  # the socket of the first server is still there
            client.connect(str(path))
    assert not path.exists()


@pytest.mark.parametrize(
    ("where", "words"),
    [
        ("", "no address"),
        ("tcp:", "nothing is not a TCP port"),
        ("tcp:gdb", "gdb is not a TCP port"),
        ("tcp:1:70000", "70000 is not a TCP port"),
        ("tcp:192.0.2.1:0", "Cannot assign"),
        ("/nonexistent/gdb", "No such file"),
        ("/tmp/" + "long" * 50, "too long"),
    ],
)
def test_an_invalid_address_is_refused(where: str, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        GdbServer(where)


@pytest.mark.parametrize("words", ["--lab run", "--lab map", "--lab trace", "lab run run"])
def test_a_lab_does_not_boot_for_an_address_that_nobody_could_reach(
    words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*words.split(), "--gdb", "tcp:1234", "payload:hello"]) == 2
    assert "pyvmm lab shell --with gdb" in capsys.readouterr().err


class Target:
    """A guest of one thread with scripted answers; ``free`` is set while it runs without a debugger."""

    def __init__(self, _machine: Any, wake: Callable[[], None]) -> None:
        self._wake = wake
        self.stops: list[Stop] = []
        self.halts = 0
        self.killed = self.watched = self.physical = False
        self.running = threading.Event()
        self.free = threading.Event()
        made.append(self)

    @property
    def has_stopped(self) -> bool:
        return bool(self.stops)

    def stop(self, stop: Stop) -> None:
        """Stop at a breakpoint."""
        self.stops.append(stop)
        self._wake()

    def halt(self) -> None:
        self.running.clear()
        self.free.clear()

    def take_stop(self) -> Stop | None:
        self.halt()
        self.halts += 1
        return self.stops.pop(0) if self.stops else None

    def resume(self, _: Mapping[int, Go]) -> None:
        self.running.set()

    def detach(self) -> None:
        self.running.set()
        self.free.set()

    def kill(self) -> None:
        self.killed = True

    def threads(self) -> range:
        return range(1, 2)

    def describe(self, _: int) -> str:
        return "all there is"

    def read_register(self, _: int, number: int) -> bytes:
        return bytes(REGISTERS[number].size)

    def write_register(self, *_: object) -> None:
        raise RuntimeError("a fault of this program's own")

    def read_memory(self, _thread: int, _address: int, size: int) -> bytes:
        return bytes(size)

    def write_memory(self, *_: object) -> None:
        pass

    insert = remove = write_memory


made: list[Target] = []


@contextlib.contextmanager
def serving() -> Iterator[tuple[GdbServer, Target]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "GuestTarget", Target)
        with GdbServer("tcp:0") as server, server.serving(None):  # type: ignore[arg-type]
            yield server, made[-1]


@pytest.fixture
def served() -> Iterator[tuple[GdbServer, Target]]:
    with serving() as both:
        yield both


def connect(server: GdbServer) -> socket.socket:
    host, port = server.address.split(":")
    return socket.create_connection((host, int(port)), timeout=10)


def take(connection: socket.socket, size: int) -> bytes:
    """Receive ``size`` bytes, or fewer where the connection ends."""
    data = b""
    while len(data) < size and (more := connection.recv(size - len(data))):
        data += more
    return data


def exchange(connection: socket.socket, packet: bytes, answer: bytes) -> None:
    connection.sendall(frame(packet))
    expected = b"+" + frame(answer)
    assert take(connection, len(expected)) == expected


def test_packets_are_acknowledged_unless_switched_off_and_resent_when_lost(
    served: tuple[GdbServer, Target],
) -> None:
    with connect(served[0]) as debugger:
        exchange(debugger, b"qC", b"QC1")
        debugger.sendall(b"+-")
        assert take(debugger, 7) == frame(b"QC1")
        debugger.sendall(b"$qC#00")
        assert take(debugger, 1) == b"-"
        exchange(debugger, b"a" * (PACKET_SIZE + 1), b"E22")
        exchange(debugger, b"QStartNoAckMode", b"OK")
        debugger.sendall(frame(b"qC"))
        assert take(debugger, 7) == frame(b"QC1")


def test_monitor_commands_are_carried_out(served: tuple[GdbServer, Target]) -> None:
    server, target = served
    with connect(server) as debugger:
        exchange(debugger, b"qRcmd," + b"phys on".hex().encode(), b"addresses are guest physical\n".hex().encode())
        assert target.physical
        exchange(debugger, b"qRcmd," + b"help".hex().encode(), HELP.encode().hex().encode())


def test_a_stop_is_reported_once_and_an_interrupt_stops_a_running_guest(
    served: tuple[GdbServer, Target],
) -> None:
    server, target = served
    with connect(server) as debugger:
        exchange(debugger, b"qC", b"QC1")
        debugger.sendall(frame(b"c"))
        assert take(debugger, 1) == b"+"
        assert target.running.wait(10)
        target.stop(Stop(1, reason="hwbreak:"))
        said = take(debugger, 4)
        while not said.endswith(b"#"):
            said += take(debugger, 1)
        assert said.startswith(b"$T05")
        assert said.endswith(b"thread:1;hwbreak:;#")
        take(debugger, 2)
        debugger.sendall(frame(b"c"))
        assert take(debugger, 1) == b"+"
        debugger.sendall(b"\x03")
        assert take(debugger, 4) == b"$T02"
        assert not target.running.is_set()


def test_one_debugger_connects_at_a_time_and_the_guest_runs_on_without_one(served: tuple[GdbServer, Target]) -> None:
    server, target = served
    for _ in range(2):
        with connect(server) as debugger:
            exchange(debugger, b"qC", b"QC1")
            assert not target.free.is_set()
            with connect(server) as second:
                assert take(second, 1) == b""
            exchange(debugger, b"qC", b"QC1")
        assert target.free.wait(10)


def test_a_bug_in_the_server_ends_the_connection_and_not_the_guest(served: tuple[GdbServer, Target]) -> None:
    server, target = served
    with connect(server) as debugger:
        debugger.sendall(frame(b"P0=0000000000000000"))
        assert take(debugger, 2) == b"+"
    assert target.free.wait(10)


@pytest.mark.parametrize(("ending", "told"), [(Ending.POWEROFF, b"W00"), (Ending.CRASH, b"W03")])
def test_a_waiting_debugger_hears_how_the_run_ended(ending: Ending, told: bytes) -> None:
    with contextlib.ExitStack() as stack:
        with serving() as (server, _):
            debugger = stack.enter_context(connect(server))
            exchange(debugger, b"qC", b"QC1")
            debugger.sendall(frame(b"c"))
            assert take(debugger, 1) == b"+"
            server.ended(Outcome(ending, "so it ended"))
        assert take(debugger, 100) == frame(told)


@settings(max_examples=25)
@given(
    st.lists(
        st.one_of(
            st.binary(max_size=100),
            st.binary(max_size=20).map(frame),
            st.sampled_from([b"$", b"\x03", b"#", frame(b"c"), frame(b"?"), frame(b"D"), frame(b"G")]),
        ),
        max_size=8,
    )
)
def test_the_guest_runs_on_whatever_a_debugger_sends(parts: list[bytes]) -> None:
    with serving() as (server, target):
        with connect(server) as debugger, contextlib.suppress(ConnectionError, BrokenPipeError):
            for part in parts:
                debugger.sendall(part)
        assert target.free.wait(10) or target.killed
        with connect(server) as debugger:
            exchange(debugger, b"qC", b"QC1")
