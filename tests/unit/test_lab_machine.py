# SPDX-License-Identifier: Apache-2.0
"""The lab's machine from outside: QEMU's command line, shared directories, the channel, and the errors."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import threading
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from pyvmm.errors import HostError, UsageError
from pyvmm.lab import frames, qemu, shares
from pyvmm.lab.cache import Image, Manifest
from pyvmm.lab.qemu import LabError, LabOptions, Ram
from pyvmm.lab.shares import Share
from pyvmm.lab.stream import ChannelClosedError, InsistedError, Pump

IMAGE = Image(Path("/i"), Manifest("9.9", "2026-01-02T03:04:05+00:00", "http://m", "r", [], {}))

# ---- QEMU


def fake_qemu(directory: Path, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (directory / qemu.PROGRAM).write_text(f"#!/bin/sh\n{script}\n")
    (directory / qemu.PROGRAM).chmod(0o755)
    monkeypatch.setenv("PATH", f"{directory}:/usr/bin:/bin")


def test_the_error_for_missing_qemu_names_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(HostError) as caught:
        qemu.require_qemu()
    assert caught.value.hint == "apt install qemu-system-arm"


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("echo QEMU emulator version 6.2.0", "version 6.2; the lab needs 7.2"),
        ("echo something else", "does not say its version"),
    ],
)
def test_an_unsuitable_qemu_is_refused_with_its_version(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, words: str
) -> None:
    fake_qemu(tmp_path, script, monkeypatch)
    with pytest.raises(HostError, match=words):
        qemu.require_qemu()


def test_the_error_for_a_qemu_that_dies_has_its_command_line_and_output(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pyvmm.lab import Lab

    script = '[ "$1" = --version ] && echo QEMU emulator version 9.0.0 && exit; echo no such machine; exit 1'
    fake_qemu(tmp_path, script, monkeypatch)
    with pytest.raises(LabError) as caught, Lab(LabOptions(boot="fresh"), image=IMAGE, bare=True):
        pass
    assert "ended while it was booting (QEMU exited with status 1)" in caught.value.message
    assert "-M virt,virtualization=on,gic-version=3" in caught.value.message
    assert "| no such machine" in caught.value.message


@pytest.mark.parametrize("failing", ["socketpair", "second socketpair", "Monitor", "Popen"])
def test_a_qemu_that_cannot_be_started_leaves_no_descriptor(monkeypatch: pytest.MonkeyPatch, failing: str) -> None:
    monkeypatch.setattr(qemu, "_tree", lambda *_: os.memfd_create("tree"))
    before = set(os.listdir("/proc/self/fd"))
    real, count = socket.socketpair, {"socketpair": 0, "second socketpair": 1}.get(failing, 2)
    left = iter(range(count))

    def fail(*_: Any, **__: Any) -> Any:
        raise OSError("no more")

    monkeypatch.setattr(socket, "socketpair", lambda: fail() if next(left, None) is None else real())
    if failing == "Monitor":
        monkeypatch.setattr(qemu, "Monitor", fail)
    if failing == "Popen":
        monkeypatch.setattr(subprocess, "Popen", fail)
    with pytest.raises((OSError, HostError), match="no more"):
        qemu.Qemu("q", "9.0.0", IMAGE, LabOptions(gic=0, mode="nvhe"))
    assert set(os.listdir("/proc/self/fd")) == before


def test_a_lab_has_the_cpu_and_the_interrupt_controller_that_are_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pyvmm.lab import Lab

    script = '[ "$1" = --version ] && echo QEMU emulator version 9.0.0 && exit; echo "$@"; exit 1'
    fake_qemu(tmp_path, script, monkeypatch)
    for options, words in (
        (LabOptions(mode="nvhe", cpu="neoverse-n1", gic=2, boot="fresh"), "gic-version=2 -cpu neoverse-n1 -smp 2"),
        (LabOptions(its=False, boot="fresh"), "gic-version=3,its=off -cpu"),
    ):
        with pytest.raises(LabError) as caught, Lab(options, image=IMAGE, bare=True):
            pass
        assert words in caught.value.message


@pytest.mark.parametrize(
    ("version", "options", "cpu"),
    [
        ("7.2.19", {}, "cortex-a72"),
        ("8.1.5", {"icount": True, "cpus": 1}, "cortex-a72,cntfrq=1000000000"),
        ("8.2.2", {}, "neoverse-n1"),
        ("10.0.2", {"icount": True, "cpus": 1}, "neoverse-n1,cntfrq=1000000000"),
        ("10.0.2", {"mode": "nvhe"}, "cortex-a72"),
        ("7.2.19", {"mode": "vhe"}, "neoverse-n1"),
        ("7.2.19", {"cpu": "max"}, "max"),
        ("10.0.2", {"cpu": "cortex-a72"}, "cortex-a72"),
    ],
)
def test_pkvm_gets_a_cpu_that_this_qemu_emulates_rightly(version: str, options: dict[str, Any], cpu: str) -> None:
    line = qemu.command_line("q", version, IMAGE, LabOptions(**options), [], 5)
    assert line[line.index("-cpu") + 1] == cpu


@pytest.mark.parametrize("wrong", [{"cpu": "max,sve=on"}, {"cpu": ""}, {"gic": 4}, {"mode": "el2"}])
def test_a_lab_of_odd_parts_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        LabOptions(**wrong)


@pytest.mark.parametrize("seconds", [0.1, 1.0])
def test_the_error_for_a_lab_that_never_answers_says_it_is_late(
    seconds: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pyvmm.lab import Lab

    script = '[ "$1" = --version ] && echo QEMU emulator version 9.0.0 && exit; echo hanging; exec sleep 100'
    fake_qemu(tmp_path, script, monkeypatch)
    options = LabOptions(boot="fresh", boot_timeout=seconds)
    with (
        pytest.raises(LabError, match=f"did not come up in {seconds:g} s") as caught,
        Lab(options, image=IMAGE, bare=True),
    ):
        pass
    assert "--boot-timeout" in str(caught.value.hint)
    assert "| hanging" in caught.value.message or seconds < 1  # if it got as far as printing that
    assert "its console:" in caught.value.message


@pytest.mark.parametrize(
    ("mode", "words"), [("protected", "kvm-arm.mode=protected "), ("nvhe", "kvm-arm.mode=nvhe "), ("vhe", "")]
)
def test_the_mode_reaches_the_kernels_command_line(mode: str, words: str) -> None:
    line = qemu.command_line("q", "7.2.1", IMAGE, LabOptions(mode=mode), [], 5)
    append = line[line.index("-append") + 1]
    assert append.startswith(words)
    assert "kvm-arm" in append or mode == "vhe"


def test_a_machine_without_el2_has_no_virtualization() -> None:
    line = qemu.command_line("q", "7.2.1", IMAGE, LabOptions(mode="no-el2"), [], 5)
    assert line[line.index("-M") + 1] == "virt,virtualization=off,gic-version=3"


def test_a_machine_boots_with_a_tree_of_ours_where_guests_get_no_interrupt_controller() -> None:
    options = LabOptions(mode="nvhe", gic=0)
    line = qemu.command_line("q", "7.2.1", IMAGE, options, [], 5, tree=7)
    assert line[line.index("-dtb") + 1] == "/proc/self/fd/7"
    assert line[line.index("-M") + 1] == "virt,virtualization=on,gic-version=3"
    restored = qemu.Ram(9, restored=True, empty=Path("/"))
    assert "-dtb" not in qemu.command_line("q", "7.2.1", IMAGE, options, [], 5, restored)
    assert "-dtb" not in qemu.command_line("q", "7.2.1", IMAGE, LabOptions(mode="no-el2", gic=0), [], 5)


def test_icount_uses_one_cpu_and_is_repeatable() -> None:
    line = qemu.command_line("q", "7.2.1", IMAGE, LabOptions(icount=True, cpus=1), [], 5)
    assert line[line.index("-icount") + 1] == "shift=0,sleep=off"
    assert "-seed" in line
    assert line[line.index("-cpu") + 1].endswith(",cntfrq=1000000000")
    with pytest.raises(UsageError, match="one CPU"):
        LabOptions(icount=True, cpus=2)


@pytest.mark.parametrize("options", [{"mode": "fast"}, {"cpus": 0}, {"cpus": 9}, {"memory": 64}, {"boot": "slow"}])
def test_impossible_machines_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        LabOptions(**options)


def test_a_machine_booted_to_be_saved_and_a_restored_one_have_the_same_devices() -> None:
    shown = [Share(Path("/a"), Path("/a"))]
    saved = qemu.command_line("q", "7.2.1", IMAGE, LabOptions(), [], 5, Ram(7, restored=False, empty=Path("/e")), 6)
    restored = qemu.command_line(
        "q", "7.2.1", IMAGE, LabOptions(), shown, 5, Ram(7, restored=True, empty=Path("/e")), 6
    )
    assert [word for word in saved if word.startswith("-")].count("-virtfs") == qemu.SHARES
    assert "path=/a," in restored[restored.index("-virtfs") + 1]
    drop = ("-kernel", "-initrd", "-append", "-incoming")

    def devices(line: list[str]) -> list[str]:
        kept = [word for option, word in pairwise(line) if option.startswith("-") and option not in drop]
        return [re.sub("path=[^,]*|share=(on|off)|,readonly=on", "", word) for word in kept]

    assert devices(saved) == devices(restored)
    assert "share=on" in " ".join(saved)
    assert "share=off" in " ".join(restored)
    assert "-incoming" in restored
    assert "-kernel" not in restored


def test_a_share_with_a_comma_in_its_path_stays_one_option() -> None:
    line = qemu.command_line("q", "7.2.1", IMAGE, LabOptions(), [Share(Path("/a,b"), Path("/a,b"), readonly=True)], 5)
    option = line[line.index("-virtfs") + 1]
    assert "path=/a,,b," in option
    assert option.endswith(",readonly=on")


def test_an_error_shows_the_lines_before_a_panic_instead_of_its_trace() -> None:
    console = "\n".join(["why it happened", "Kernel panic - not syncing: x"] + [f"trace {i}" for i in range(30)])
    error = LabError("it ended", ["qemu"], console)
    assert "why it happened" in error.message
    assert "trace" not in error.message


# ---- shared directories

TREE = shares.PACKAGE.parent


def targets(found: list[Share]) -> dict[str, bool]:
    return {str(share.target): share.readonly for share in found}


def test_the_tree_is_shared_at_its_own_path_and_covers_what_is_below() -> None:
    assert targets(shares.find_shares(TREE / "tests", ["tests/conftest.py"])) == {str(TREE): False}


def test_the_current_directory_is_shared_too_if_it_is_outside_the_tree(tmp_path: Path) -> None:
    assert targets(shares.find_shares(tmp_path, [])) == {str(TREE): False, str(tmp_path): False}


def test_directories_of_named_files_are_shared_read_only(tmp_path: Path) -> None:
    for name in ("kernels/Image", "elsewhere/initrd", "linked/real"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text("")
    (tmp_path / "kernels" / "link").symlink_to(tmp_path / "linked" / "real")
    found = shares.find_shares(
        TREE, ["run", str(tmp_path / "kernels" / "link"), f"--initrd={tmp_path}/elsewhere/initrd", "-p", "no=file"]
    )
    assert targets(found) == {str(TREE): False} | {
        str(tmp_path / name): True for name in ("elsewhere", "kernels", "linked")
    }


def test_a_file_in_a_directory_that_the_lab_has_itself_is_refused_with_a_hint() -> None:
    with pytest.raises(UsageError, match="/etc/passwd cannot be made visible") as caught:
        shares.find_shares(TREE, ["run", "/etc/passwd"])
    assert "copy" in (caught.value.hint or "")


def test_the_root_directory_is_never_shared() -> None:
    assert targets(shares.find_shares(Path("/"), ["/"])) == {str(TREE): False}


def test_directories_of_outputs_are_shared_writable_even_if_also_read(tmp_path: Path) -> None:
    (tmp_path / "a, b=c").mkdir()
    (tmp_path / "a, b=c" / "Image").write_text("")
    (tmp_path / "far").mkdir()
    (tmp_path / "a, b=c" / "link").symlink_to(tmp_path / "far" / "to be made")
    named = str(tmp_path / "a, b=c" / "Image")
    directory = str(tmp_path / "a, b=c")
    assert targets(shares.find_shares(TREE, [named])) == {str(TREE): False, directory: True}
    assert targets(shares.find_shares(TREE, [named], [f"{directory}/x.json"])) == {str(TREE): False, directory: False}
    assert targets(shares.find_shares(TREE, [], [f"{directory}/link"])) == {
        str(TREE): False,
        directory: False,
        str(tmp_path / "far"): False,
    }


@pytest.mark.parametrize("form", ["{},ro", "path={},ro", "--disk={},queues=2", "{}"])
def test_a_file_followed_by_a_comma_and_options_is_found_too(tmp_path: Path, form: str) -> None:
    (tmp_path / "a.img").touch()
    found = shares.find_shares(TREE, ["run", form.format(tmp_path / "a.img")])
    assert targets(found) == {str(TREE): False, str(tmp_path): True}


def test_files_that_any_command_names_are_the_workstations_unless_the_lab_has_them_itself(tmp_path: Path) -> None:
    script, link = tmp_path / "x.py", tmp_path / "python3"
    script.touch()
    link.symlink_to("/bin/sh")
    own = [
        "/bin/sh",
        "/etc/passwd",
        "/proc/cpuinfo",
        "/sys/kernel",
        "/usr/bin/env",
        "/dev/null",
        "/tmp",
        "/",
        str(link),
    ]
    words = ["python3", "-c", "print", *own, str(script), f"--data={script}", str(tmp_path), "/nothing/there"]
    found = shares.workstation_files(TREE, words)
    assert found == [str(script), f"--data={script}", str(tmp_path)]
    assert targets(shares.find_shares(TREE, found)) == {str(TREE): False, str(tmp_path): True}


def test_outputs_in_the_current_directory_and_dev_null_need_no_share() -> None:
    outputs = ["out.dtb", "tests/out=1.dtb", "/dev/null"]
    assert targets(shares.find_shares(TREE, [*outputs, "file=/dev/null"], outputs)) == {str(TREE): False}


@pytest.mark.parametrize(
    ("output", "why"),
    [
        ("/etc/out.dtb", "/etc is a directory of its own there"),
        ("/dev/stdout", "/dev is a directory of its own there"),
        ("/var/run/out", "/run is a directory of its own there"),
        ("/no/such place/out.dtb", "/no/such place does not exist\n  hint: mkdir -p '/no/such place'"),
        ("/etc/passwd/out.dtb", "/etc/passwd is not a directory"),
        ("", "is a directory"),
        ("/tmp", "/tmp is a directory"),
    ],
)
def test_an_output_that_would_be_lost_is_refused(output: str, why: str) -> None:
    with pytest.raises(UsageError) as caught:
        shares.find_shares(TREE, [], [output])
    assert f"the output file {output!r} cannot be written" in str(caught.value)
    assert why in str(caught.value)


def test_an_output_in_the_root_directory_is_refused_also_if_that_is_the_current_one() -> None:
    with pytest.raises(UsageError, match="/ is a directory of its own there"):
        shares.find_shares(Path("/"), [], ["out.dtb"])


def test_temporary_files_stay_in_the_lab_even_if_tmp_is_shared() -> None:
    from pyvmm.lab import Lab

    assert "TMPDIR" not in Lab(image=IMAGE, cwd=TREE)._environment()
    assert Lab(image=IMAGE, cwd=TREE, outputs=["/tmp/no-such-file-of-pyvmm"])._environment()["TMPDIR"] == "/var/tmp"


# ---- the channel


def test_frames_survive_a_split_anywhere() -> None:
    sent = [(frames.OUTPUT, b"abc"), (frames.EXIT, b"\0"), (frames.OUTPUT, b"")]
    stream = b"".join(frames.pack(kind, payload) for kind, payload in sent)
    for cut in range(len(stream)):
        unpacker = frames.Unpacker()
        assert unpacker.feed(stream[:cut]) + unpacker.feed(stream[cut:]) == sent


def test_a_frame_that_claims_too_much_is_refused() -> None:
    with pytest.raises(ValueError, match="claims"):
        frames.Unpacker().feed(frames.HEADER.pack(1, frames.MAX_PAYLOAD + 1))
    with pytest.raises(ValueError, match="longer"):
        frames.pack(1, bytes(frames.MAX_PAYLOAD + 1))


class Agent:
    """The other end of a Pump: it sends what the test requests."""

    def __init__(self) -> None:
        self.ours, self._channel = socket.socketpair()
        self._unpacker = frames.Unpacker()
        self._frames: list[tuple[int, bytes]] = []

    def next(self) -> tuple[int, bytes]:
        while not self._frames:
            data = self._channel.recv(65536)
            if not data:
                raise EOFError
            self._frames += self._unpacker.feed(data)
        return self._frames.pop(0)

    def say(self, kind: int, payload: bytes = b"") -> None:
        self._channel.sendall(frames.pack(kind, payload))

    def close(self) -> None:
        self._channel.close()


def pump(
    agent: Agent,
    script: Callable[..., Any],
    stdin: bytes | int = b"",
    stdout: Callable[..., Any] | None = None,
    timeout: float | None = 20.0,
) -> int:
    thread = threading.Thread(target=script, args=(agent,))
    thread.start()
    try:
        sink = stdout or bytearray().extend
        return Pump(agent.ours, stdin, sink, sink, timeout=timeout).run(frames.pack(frames.EXEC))
    finally:
        agent.ours.close()
        thread.join()


def test_output_arrives_whole_and_before_the_status() -> None:
    def script(agent: Agent) -> None:
        agent.say(frames.OUTPUT, bytes(range(256)))
        agent.say(frames.OUTPUT, b"end")
        agent.say(frames.EXIT, b"\7")

    out = bytearray()
    assert pump(Agent(), script, stdout=out.extend) == 7
    assert out == bytes(range(256)) + b"end"


@pytest.mark.parametrize("through", ["bytes", "fd"])
def test_input_never_exceeds_the_window_and_arrives_whole(through: str, tmp_path: Path) -> None:
    blob = os.urandom(3 * frames.WINDOW + 17)
    got = bytearray()
    excess = []

    def script(agent: Agent) -> None:
        agent.next()
        pending = 0
        while (frame := agent.next())[1]:
            got.extend(frame[1])
            pending += len(frame[1])
            excess.append(pending > frames.WINDOW)
            if pending > frames.WINDOW // 2:
                agent.say(frames.CREDIT, pending.to_bytes(4, "little"))
                pending = 0
        agent.say(frames.EXIT, b"\0")

    (tmp_path / "input").write_bytes(blob)
    with (tmp_path / "input").open("rb") as file:
        assert pump(Agent(), script, stdin=blob if through == "bytes" else file.fileno()) == 0
    assert got == blob
    assert not any(excess)


def test_the_command_hears_that_its_reader_has_gone() -> None:
    def gone(_data: bytes) -> None:
        raise BrokenPipeError

    def script(agent: Agent) -> None:
        agent.say(frames.OUTPUT, b"x")
        while agent.next() != (frames.HANGUP, b"\1"):
            pass
        agent.say(frames.OUTPUT, b"y")
        agent.say(frames.EXIT, b"\0")

    assert pump(Agent(), script, stdout=gone) == 0


def test_a_lab_that_ends_is_noticed() -> None:
    with pytest.raises(ChannelClosedError):
        pump(Agent(), Agent.close)


def test_a_signal_reaches_the_command_and_its_status_comes_back() -> None:
    def script(agent: Agent) -> None:
        agent.next()
        os.kill(os.getpid(), signal.SIGTERM)
        while (frame := agent.next())[0] != frames.SIGNAL:
            pass
        agent.say(frames.EXIT, bytes([128 + frame[1][0]]))

    before = signal.getsignal(signal.SIGTERM)
    assert pump(Agent(), script) == 128 + signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_second_signal_makes_the_pump_give_up() -> None:
    def script(agent: Agent) -> None:
        agent.next()
        os.kill(os.getpid(), signal.SIGINT)
        while agent.next()[0] != frames.SIGNAL:
            pass
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(InsistedError):
        pump(Agent(), script)


def test_a_command_that_takes_too_long_is_a_timeout() -> None:
    with pytest.raises(TimeoutError):
        pump(Agent(), lambda agent: agent.next(), timeout=0.2)
