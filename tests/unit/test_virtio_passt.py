# SPDX-License-Identifier: Apache-2.0
"""A passt that pyvmm starts, played by scripts: its start, its output and its end. Also: the options of a card."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from pyvmm.devices.kind import DeviceSpec
from pyvmm.devices.kinds.net import PARTS, Net
from pyvmm.devices.virtio import net, passt
from pyvmm.devices.virtio.net import VirtioNet
from pyvmm.devices.virtio.netbackend import HEADER
from pyvmm.devices.virtio.passt import Passt
from pyvmm.errors import HostError, UsageError
from pyvmm.options.devices import DEVICE_OPTIONS, device_specs
from pyvmm.options.table import Table
from tests.unit.net_driver import DATA, Driver, eventually

PRELUDE = """
import signal, socket, struct, sys, time
connection = socket.socket(fileno=int(sys.argv[sys.argv.index("--fd") + 1]))
def frame(data): connection.sendall(struct.pack(">I", len(data)) + data)
"""


def script(folder: Path, body: str) -> str:
    path = folder / "passt"
    path.write_text(f"#!{sys.executable}\n{PRELUDE}\n{body}\n")
    path.chmod(0o755)
    return str(path)


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.parametrize("loopback", [False, True])
def test_passt_gets_its_socket_its_ports_and_the_access_of_the_guest(tmp_path: Path, loopback: bool) -> None:
    program = script(tmp_path, 'frame(" ".join(sys.argv[1:]).encode().ljust(60)); connection.recv(1)')
    with Driver(VirtioNet(Passt(program, [(8080, 80), (2222, 22)], loopback=loopback))) as driver:
        driver.rx.give([(DATA, 2000, True)])
        [(_, written)] = driver.wait(driver.rx)
        words = driver.read(DATA + HEADER, written - HEADER).decode().split()
    fd = words[words.index("--fd") + 1]
    kept = [] if loopback else ["--no-map-gw"]
    assert words == ["--foreground", "--quiet", "--fd", fd, *kept, "--tcp-ports", "8080:80,2222:22"]


def test_passt_ends_when_the_connection_is_closed(tmp_path: Path) -> None:
    backend = Passt(script(tmp_path, "connection.recv(1)"))
    pid = backend._process.pid
    began = time.monotonic()
    backend.close()
    backend.close()
    assert backend._process.returncode == 0
    assert not alive(pid)
    assert time.monotonic() - began < passt.PATIENCE


@pytest.mark.parametrize("deaf", [(), ("SIGTERM",)])
def test_a_passt_that_does_not_end_is_killed(
    tmp_path: Path, deaf: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    ignored = "".join(f"signal.signal(signal.{name}, signal.SIG_IGN); " for name in deaf)
    backend = Passt(script(tmp_path, f"{ignored}frame(b'x'); time.sleep(600)"))
    assert os.read(backend.fd, 5)  # it has started
    monkeypatch.setattr(passt, "PATIENCE", 0.1)
    backend.close()
    assert backend._process.returncode == -(signal.SIGKILL if deaf else signal.SIGTERM)


def test_the_link_goes_down_when_passt_ends_and_its_last_output_is_logged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[dict[str, str]] = []
    monkeypatch.setattr(net, "log", SimpleNamespace(warning=lambda _, **values: said.append(values)))
    program = script(tmp_path, 'print("no route", file=sys.stderr, flush=True); sys.exit(1)')
    device = VirtioNet(Passt(program))
    with Driver(device) as driver:
        eventually(lambda: driver.transport.changes == 1, "the configuration changes")
        assert not device.link_up
        eventually(lambda: "status 1" in device.backend.last_words(), "it has ended")
    [values] = said
    assert "no route" in values["reason"]


def test_a_killed_passt_is_said_to_be_killed_and_the_guest_loses_its_link(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[dict[str, str]] = []
    monkeypatch.setattr(net, "log", SimpleNamespace(warning=lambda _, **values: said.append(values)))
    monkeypatch.setattr(passt, "MOMENT", 60.0)
    backend = Passt(script(tmp_path, "frame(bytes(14)); connection.recv(1)"))
    # The socket hangs up before the process has ended: to a mere look it still runs.
    monkeypatch.setattr(backend._process, "poll", lambda: None)
    with Driver(VirtioNet(backend)) as driver:
        driver.rx.give([(DATA, 2000, True)])
        driver.wait(driver.rx)
        backend._process.kill()
        eventually(lambda: driver.transport.changes == 1, "the configuration changes")
        assert driver.device.config()[6:8] == bytes(2), "the guest reads that there is no link"
    [values] = said
    assert "signal 9" in values["reason"]


def test_a_passt_with_much_output_is_not_blocked(tmp_path: Path) -> None:
    program = script(
        tmp_path,
        "import os\n"
        "try:\n"
        "    while True: os.write(2, b'x' * 4096)\n"
        "except BlockingIOError: frame(bytes(14)); connection.recv(1)",
    )
    with Driver(VirtioNet(Passt(program))) as driver:
        driver.rx.give([(DATA, 2000, True)])
        assert [written for _, written in driver.wait(driver.rx)] == [HEADER + 14]


def test_the_error_for_a_missing_program_says_what_to_install() -> None:
    with pytest.raises(HostError, match="No such file") as error:
        Passt("/nonexistent/passt")
    assert "apt install passt" in str(error.value)


# ---- options


def specs(*words: str) -> tuple[DeviceSpec, ...]:
    parser = argparse.ArgumentParser()
    Table(DEVICE_OPTIONS, lambda _parser: None).add_to(parser)
    return device_specs(parser.parse_args(words))


def test_the_option_selects_the_backend_of_a_card() -> None:
    found = specs(
        "--net",
        "tap=t0",
        "--net",
        "tap=t1,host=10.0.0.1/24,mac=02:00:00:00:00:01",
        "--net",
        "socket=/run/passt.sock",
        "--net",
        "passt,loopback,fwd=8080:80+2222:22",
    )
    assert found[:3] == (
        Net(tap="t0"),
        Net(tap="t1", address="10.0.0.1/24", mac="02:00:00:00:00:01"),
        Net(socket="/run/passt.sock"),
    )
    last = found[3]
    assert isinstance(last, Net)
    assert Path(last.passt).name == "passt"
    assert last.forwards == ((8080, 80), (2222, 22))
    assert last.loopback


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "one of tap=NAME, passt and socket=PATH"),
        ("mac=02:00:00:00:00:01", "one of tap=NAME"),
        ("tap=t0,passt", "one of tap=NAME"),
        ("tap", "needs a value: tap="),
        ("passt=x", "passt takes no value"),
        ("passt,fwd=80", "'80' is not a pair of TCP ports"),
        ("passt,fwd=80:80+", "'' is not a pair"),
        (
            "bridge=br0",
            "'bridge' in 'bridge=br0' is not known; known are tap=, passt, socket=, mac=, host=, fwd=, loopback",
        ),
    ],
)
def test_the_error_for_an_invalid_option_names_the_part(text: str, complaint: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match=complaint):
        PARTS(text)


@pytest.mark.parametrize(
    ("values", "complaint"),
    [
        ({}, "connected to nothing"),
        ({"tap": "t0", "socket": "s"}, "tap and socket at once"),
        ({"socket": "s", "address": "10.0.0.1/24"}, "only a tap has one"),
        ({"tap": "t0", "forwards": ((80, 80),)}, "only passt, started by pyvmm"),
        ({"socket": "s", "loopback": True}, "only passt, started by pyvmm"),
        ({"passt": "passt", "forwards": ((0, 80),)}, "ports are 1 to 65535"),
        ({"passt": "passt", "forwards": ((80, 65536),)}, "ports are 1 to 65535"),
        ({"tap": "t0", "address": "10.0.0.1"}, "not an IPv4 address with a prefix"),
        ({"tap": "t0", "address": "fd00::1/64"}, "not an IPv4 address with a prefix"),
        ({"tap": "sixteen-letters-"}, "cannot be the name of a tap"),
        ({"tap": "\N{SNOWMAN}" * 6}, "cannot be the name of a tap"),
        ({"passt": "passt", "mac": "zz"}, "not a MAC address"),
    ],
)
def test_a_card_has_one_backend_and_only_the_options_of_that_backend(values: dict[str, object], complaint: str) -> None:
    with pytest.raises(UsageError, match=complaint):
        Net(**values)  # type: ignore[arg-type]
