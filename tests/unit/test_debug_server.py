"""Where a debugger connects: places that are none, or taken, are refused with what to do."""

from __future__ import annotations

import socket
import stat
from pathlib import Path

import pytest

from pyvmm.debug.server import GdbServer
from pyvmm.errors import UsageError


@pytest.mark.parametrize(
    ("where", "address"),
    [("tcp:0", "127.0.0.1:"), ("tcp:localhost:0", "127.0.0.1:"), ("tcp:127.0.0.1:0,nowait", "127.0.0.1:")],
)
def test_a_tcp_port_is_on_this_machine_alone_unless_said(where: str, address: str) -> None:
    with GdbServer(where) as server:
        assert server.address.startswith(address)
        assert server.waits is not where.endswith("nowait")
        port = server.address.rpartition(":")[2]
        with pytest.raises(
            UsageError, match=f"no debugger can connect at tcp:{port}: Address already in use"
        ) as caught:
            GdbServer(f"tcp:{port}")
        assert "name another place" in str(caught.value.hint)


def test_a_socket_is_its_owners_alone_and_goes_with_the_run(tmp_path: Path) -> None:
    path = tmp_path / "gdb"
    with GdbServer(str(path)) as server:
        assert server.address == str(path)
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        with pytest.raises(UsageError, match="Address already in use") as caught:
            GdbServer(str(path))
        assert f"rm {path}" in str(caught.value.hint)
        with socket.socket(socket.AF_UNIX) as client:  # the first one's is still there
            client.connect(str(path))
    assert not path.exists()


@pytest.mark.parametrize(
    ("where", "words"),
    [
        ("", "no place"),
        ("tcp:", "nothing is no TCP port"),
        ("tcp:gdb", "gdb is no TCP port"),
        ("tcp:1:70000", "70000 is no TCP port"),
        ("tcp:192.0.2.1:0", "Cannot assign"),
        ("/nonexistent/gdb", "No such file"),
        ("/tmp/" + "long" * 50, "too long"),
    ],
)
def test_a_place_that_is_none_is_refused(where: str, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        GdbServer(where)
