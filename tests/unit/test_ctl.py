# SPDX-License-Identifier: Apache-2.0
"""Orders to a run in another process: the socket that a user names, the answers of a run, and the verb."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pyvmm.cli import ctl, make_parser
from pyvmm.devices.pl011 import RX_BYTES, Pl011
from pyvmm.devices.virtio.console import VirtioConsole
from pyvmm.errors import PyvmmError, UsageError
from pyvmm.machine.config import MachineConfig
from pyvmm.machine.plan import Plan
from pyvmm.options.consoles import places
from pyvmm.options.machine import machine_config
from pyvmm.session import consoles, control
from pyvmm.session.connection import Connection, running
from pyvmm.session.control import Control
from pyvmm.session.requests import Requests


@pytest.fixture
def runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    return tmp_path


class Stub:
    """The parts of a machine that orders need."""

    def __init__(self) -> None:
        self.started_ns, self.ended_ns, self.elapsed_ns = 1, 0, 1_500_000_000
        self.paused = False
        self.clock = SimpleNamespace(goes_on=None)
        self.told: list[str] = []
        self.uart = Pl011()
        self.config = MachineConfig("payload:smp", memory=64 << 20, backing="memfd", cpus=2)
        slot = SimpleNamespace(gpa=0x8000_0000, size=64 << 20, backing=SimpleNamespace(kind="memfd"))
        self.memory = SimpleNamespace(slots=[slot])
        line = SimpleNamespace(spi=1)
        self.bus = SimpleNamespace(placed=[SimpleNamespace(device=self.uart, base=0x0900_0000, line=line)])

    def role(self, kind: type) -> tuple[Any, ...]:  # noqa: ARG002 - its only device is the UART
        return ()

    def pause(self) -> None:
        self.told.append("pause")
        self.paused = True

    def resume(self) -> None:
        self.told.append("resume")
        self.paused = False

    def stop(self, reason: str) -> None:
        self.told.append(reason)
        self.ended_ns = 2


@pytest.fixture
def stub() -> Iterator[Stub]:
    made = Stub()
    yield made
    made.uart.close()


@contextlib.contextmanager
def serving(stub: Any, path: Path) -> Iterator[None]:
    with Control(Requests(stub).verbs, str(path)):
        yield


def run_ctl(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pyvmm", "ctl", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


# -- the socket that the user names


def test_a_named_socket_exists_from_the_start_to_the_end_of_the_run(runtime: Path) -> None:
    path = runtime / "vm.sock"
    with Control({"counters": lambda: 1}, str(path)), Connection(str(path)) as connection:
        assert connection.ask("counters") == 1
        assert not (runtime / "pyvmm").exists()
    assert not path.exists()


def test_the_named_and_the_usual_socket_lead_to_the_same_run(runtime: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control, "SETTLED", 0.01)
    path = runtime / "vm.sock"
    with Control({"counters": lambda: 1}, str(path)), Connection(str(path)) as early:
        while not running():
            assert early.ask("counters") == 1
        with Connection(os.getpid()) as usual:
            assert [early.ask("counters"), usual.ask("counters")] == [1, 1]
    assert list((runtime / "pyvmm").iterdir()) == []


def test_a_path_in_use_is_refused_and_a_killed_runs_path_is_taken_over(runtime: Path) -> None:
    path = runtime / "vm.sock"
    with Control({}, str(path)), pytest.raises(UsageError, match=r"--socket .* is in use"), Control({}, str(path)):
        pass
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(path))
    with Control({"counters": lambda: 2}, str(path)), Connection(str(path)) as connection:
        assert connection.ask("counters") == 2


@pytest.mark.parametrize("taken", [False, True])
def test_a_socket_that_a_killed_ctl_left_aside_gets_its_name_back_if_it_is_free(
    runtime: Path, monkeypatch: pytest.MonkeyPatch, taken: bool
) -> None:
    monkeypatch.setattr(control, "SETTLED", 0.01)
    gone = subprocess.Popen(["true"])
    gone.wait()
    with Control({"counters": lambda: 1}, None):
        while not running():
            time.sleep(0.002)
        where = runtime / "pyvmm"
        (usual,) = where.iterdir()
        aside = where / f"{usual.name}.{gone.pid}"
        os.link(usual, aside)
        if not taken:
            usual.unlink()
        (where / f"{usual.name}.{os.getpid()}").touch()  # of a process that lives
        assert running() == [os.getpid()]
        assert not aside.exists()
        assert usual.is_socket()


@pytest.mark.parametrize("name", ["file", "missing/vm.sock", "x" * 120])
def test_a_path_that_cannot_hold_a_socket_is_refused_with_the_reason(runtime: Path, name: str) -> None:
    before = set(os.listdir("/proc/self/fd"))
    (runtime / "file").write_text("precious")
    with pytest.raises(UsageError, match="--socket"), Control({}, str(runtime / name)):
        pass
    assert (runtime / "file").read_text() == "precious"
    assert "pyvmm-control" not in {thread.name for thread in threading.enumerate()}
    assert set(os.listdir("/proc/self/fd")) == before


# -- requests


def test_an_exception_in_a_request_becomes_its_answer_and_the_run_goes_on(runtime: Path) -> None:
    def refuse() -> None:
        raise PyvmmError("not today", hint="tomorrow")

    def broken() -> None:
        raise ZeroDivisionError("oh")

    path = str(runtime / "vm.sock")
    verbs: dict[str, Any] = {"refuse": refuse, "broken": broken, "double": lambda number: 2 * number}
    with Control(verbs, path), Connection(path) as connection:
        with pytest.raises(PyvmmError, match="not today") as refused:
            connection.ask("refuse")
        assert refused.value.hint == "tomorrow"
        with pytest.raises(PyvmmError, match="ZeroDivisionError: oh"):
            connection.ask("broken")
        with pytest.raises(PyvmmError, match="invalid arguments for 'double': missing a required"):
            connection.ask("double", much=1)
        assert connection.ask("double", number=4) == 8


def test_an_unreadable_request_does_not_end_the_run(runtime: Path) -> None:
    path = str(runtime / "vm.sock")
    with Control({"counters": lambda: 1}, path), socket.socket(socket.AF_UNIX) as client:
        client.connect(path)
        client.settimeout(20)
        for line in (b"[" * 60_000, b"\xff", b"", b"1"):
            client.sendall(line + b"\n")
            assert b'"error"' in client.recv(4096)
        client.sendall(b'{"do": "counters"}\n')
        assert json.loads(client.recv(4096)) == {"format": 1, "counters": 1}


def test_a_client_without_a_free_descriptor_is_accepted_later(runtime: Path) -> None:
    path = str(runtime / "vm.sock")
    with Control({"counters": lambda: 1}, path), socket.socket(socket.AF_UNIX) as client:
        client.settimeout(20)
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(map(int, os.listdir("/proc/self/fd"))) + 1, hard))
        taken = []
        try:
            with contextlib.suppress(OSError):
                while True:
                    taken.append(os.dup(0))
            client.connect(path)
            time.sleep(3 * control.BREATH)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            for fd in taken:
                os.close(fd)
        client.sendall(b'{"do": "counters"}\n')
        assert json.loads(client.recv(4096)) == {"format": 1, "counters": 1}


def test_two_pause_orders_pause_once_and_two_resume_orders_resume_once(stub: Any) -> None:
    requests = Requests(stub)
    answers = [requests.verbs[word]()["state"] for word in ("pause", "pause", "resume", "resume")]  # type: ignore[index]
    assert answers == ["paused", "paused", "running", "running"]
    assert stub.told == ["pause", "resume"]


def test_a_run_that_has_not_started_cannot_be_paused(stub: Any) -> None:
    stub.started_ns = 0
    with pytest.raises(PyvmmError, match="is starting"):
        Requests(stub).pause()


def test_a_run_can_end_while_it_is_paused(stub: Any) -> None:
    def pause() -> None:
        Stub.pause(stub)
        stub.ended_ns = 2

    stub.pause = pause
    with pytest.raises(PyvmmError, match="is ended cannot be paused"):
        Requests(stub).pause()
    assert stub.told == ["pause", "resume"]


def test_a_run_that_was_ordered_to_stop_says_so(stub: Any) -> None:
    requests = Requests(stub)
    assert requests.asked is None
    requests.stop()
    assert requests.asked == stub.told[-1] == "pyvmm ctl stop"


def test_a_run_between_two_machines_answers_and_remembers_a_stop(stub: Any, runtime: Path) -> None:
    requests = Requests()
    with Control(requests.verbs, str(runtime / "s")), Connection(str(runtime / "s")) as connection:
        with pytest.raises(PyvmmError, match="still being made"):
            connection.ask("info")
        with requests.about(stub):
            assert connection.ask("pause") == {"state": "paused"}
        with pytest.raises(PyvmmError, match="that is starting cannot be paused"):
            connection.ask("pause")
        assert connection.ask("stop") == {"state": "starting"}
        assert requests.asked
        with requests.about(stub):
            stub.paused = False
            assert connection.ask("pause") == {"state": "paused"}, "the next machine must still pause on order"


def test_a_kick_types_the_whole_line_or_nothing(stub: Any) -> None:
    requests = Requests(stub)
    assert requests.kick() == {"typed": 1}
    assert requests.kick("ls") == {"typed": 3}
    with pytest.raises(PyvmmError, match="does not read"):
        requests.kick("x" * (RX_BYTES - 4))
    assert requests.kick("x" * (RX_BYTES - 5)) == {"typed": RX_BYTES - 4}


@pytest.mark.parametrize(
    ("text", "typed"),
    [
        ("^C", b"\x03"),
        ("^d", b"\x04"),
        ("^[", b"\x1b"),
        ("^@", b"\0"),
        ("^", b"^\r"),
        ("^1", b"^1\r"),
        ("x^C", b"x^C\r"),
    ],
)
def test_a_kick_types_a_control_key_without_return(stub: Any, text: str, typed: bytes) -> None:
    requests = Requests(stub)
    assert requests.kick(text) == {"typed": len(typed)}
    assert bytes.fromhex(stub.uart.save()["rx"]) == typed


def test_a_break_goes_to_the_uart_with_its_key(stub: Any) -> None:
    requests = Requests(stub)
    assert requests.send_break("h") == {"typed": 1}
    assert (stub.uart.save()["rx"], stub.uart.save()["break"]) == (b"\0h".hex(), 0)
    with pytest.raises(PyvmmError, match="takes no BREAK now: it does not read its input"):
        requests.send_break()


@pytest.mark.parametrize(
    ("words", "console"),
    [
        ([], "uart"),
        (["--console", "file=b"], "uart"),
        (["--console", "file=b", "--serial", "file=a"], "uart"),
        (["--console", "file=b", "--serial", "none"], "virtio"),
        (["--console", "stdio"], "virtio"),
        (["--console", "stdio", "--serial", "file=a"], "virtio"),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
@pytest.mark.parametrize("terminal", [False, True], ids=["", "in the background of a terminal"])
def test_a_kick_goes_to_the_console_that_has_stdio(
    words: list[str], console: str, terminal: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    line = ["run", *words, "payload:hello"]
    args = make_parser(line).parse_args(line)
    kicked: list[str] = []

    def noting(name: str) -> Callable[..., bool]:
        def offer(*_: object) -> bool:
            kicked.append(name)
            return True

        return offer

    monkeypatch.setattr(Pl011, "offer", noting("uart"))
    monkeypatch.setattr(VirtioConsole, "offer", noting("virtio"))
    with contextlib.ExitStack() as stack:
        ends = [consoles.open_place(where, stack, 1) for where in places(args)]
        if terminal:
            ends = [(out, None if source is None else consoles.nobody(stack)) for out, source in ends]
        config = machine_config(args, *ends)
        with Plan(config) as plan:
            plan.machine.config = config  # the UART of a plan is not connected
            assert Requests(plan.machine).kick("ls") == {"typed": 3}
    assert kicked == [console]


# -- the verb


@pytest.mark.parametrize(
    ("words", "meant"),
    [
        ("info", (None, "info", {})),
        ("1234 stop", (1234, "stop", {})),
        ("./vm.sock kick", ("./vm.sock", "kick", {})),
        ("kick ls", (None, "kick", {"text": "ls"})),
        ("balloon", (None, "balloon", {})),
        ("balloon 64M", (None, "balloon", {"size": 64 << 20})),
        ("balloon full", "'full' is not a size"),
        ("snapshot /tmp/a", (None, "snapshot", {"file": "/tmp/a"})),
        ("snapshot", "snapshot needs a file"),
        ("stop stop", "takes no argument"),
        ("1234", "no order for 1234"),
        ("1234 halt", "'halt' is not an order"),
        ("kick a b", "takes one argument"),
    ],
)
def test_an_order_may_name_its_run(words: str, meant: object) -> None:
    if isinstance(meant, str):
        with pytest.raises(UsageError, match=meant):
            ctl.parse(words.split())
    else:
        assert ctl.parse(words.split()) == meant


def test_a_run_knows_every_order_of_the_verb(stub: Any) -> None:
    assert set(ctl.ORDERS) == set(Requests(stub).verbs)


def test_orders_reach_a_run_by_its_path(runtime: Path, stub: Any) -> None:
    path = runtime / "vm.sock"
    with serving(stub, path):
        info, paused = run_ctl(str(path), "info"), run_ctl("--json", str(path), "pause")
    assert info.stdout == (
        f"payload:smp: running, 1.5 s since its start, process {os.getpid()}\n"
        "protection none, 64 MiB of memfd, 2 vCPUs\n"
        "    0x900_0000     0x1000  pl011, SPI 1\n"
        "   0x8000_0000  0x4000000  memory: memfd\n"
    )
    assert json.loads(paused.stdout) == {"state": "paused"}
    assert (info.returncode, paused.returncode) == (0, 0)


def test_stop_returns_when_the_run_has_ended(runtime: Path, stub: Any) -> None:
    path = runtime / "vm.sock"
    stopped = threading.Event()
    stub.stop = lambda _reason: stopped.set()
    with serving(stub, path):
        asking = subprocess.Popen([sys.executable, "-m", "pyvmm", "ctl", str(path), "stop"], stdout=subprocess.PIPE)
        assert stopped.wait(60)
        with pytest.raises(subprocess.TimeoutExpired):
            asking.wait(0.2)
    assert asking.communicate(timeout=60)[0] == b"state: ended\n"
    assert asking.returncode == 0


def test_an_order_to_a_missing_or_ambiguous_run_is_refused(
    runtime: Path, stub: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(control, "SETTLED", 3600.0)  # this process must not count as a third run
    nobody, stranger, nowhere = run_ctl("info"), run_ctl("1", "info"), run_ctl("./nowhere", "info")
    assert [done.returncode for done in (nobody, stranger, nowhere)] == [2, 2, 2]
    assert "no guest of this user runs" in nobody.stderr
    assert "process 1 runs no guest" in stranger.stderr
    assert "nobody listens at ./nowhere" in nowhere.stderr
    sockets = runtime / "pyvmm"
    sockets.mkdir(0o700)
    with serving(stub, sockets / "11.sock"), serving(stub, sockets / "12.sock"):
        several, refused = run_ctl("info"), run_ctl("12", "kick", "x" * RX_BYTES)
    assert (several.returncode, refused.returncode) == (2, 1)
    assert "2 guests run, in processes 11, 12" in several.stderr
    assert "does not read" in refused.stderr
