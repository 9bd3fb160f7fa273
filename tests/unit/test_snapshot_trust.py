# SPDX-License-Identifier: Apache-2.0
"""A snapshot from somebody else opens nothing of this host that the user has not named or allowed. Needs no KVM."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pyvmm import plugins
from pyvmm.cli import main, make_parser, with_file
from pyvmm.cli.run import TABLE
from pyvmm.errors import OptionError, UsageError
from pyvmm.machine import saving
from pyvmm.machine.config import MachineConfig
from pyvmm.machine.plan import Plan
from pyvmm.machine.snapshot import Snapshot
from pyvmm.options.contradictions import check_run
from pyvmm.syntax.option import FLAG, MACHINE, SWITCH, Option

GREEDY = """
kernel = "payload:hello"
rng = true
disk = ["path=/etc/passwd", "/dev/sda,ro"]
net = ["tap=t0", "passt,fwd=22:2222+80:80,loopback", "socket=/run/passt"]
vsock = "uds=/run/v,cid=3"
console = "file=/root/.bashrc"
dtb = "/secret.dtb"
"""
OPENS = {
    "--disk=path=/etc/passwd": "'/etc/passwd' to read and write",
    "--disk=/dev/sda,ro": "'/dev/sda' to read",
    "--net=tap=t0": "the tap 't0'",
    "--net=passt,fwd=22:2222+80:80,loopback": "the host's network by passt, also its 127.0.0.1, and its TCP port 22, "
    "and its TCP port 80",
    "--net=socket=/run/passt": "the socket '/run/passt'",
    "--vsock=uds=/run/v,cid=3": "the socket '/run/v' and those whose names begin like '/run/v_'",
    "--console=file=/root/.bashrc": "'/root/.bashrc' to write",
    "--dtb=/secret.dtb": "'/secret.dtb' to read",
}
"""What that snapshot opens, by the words that allow it."""


@pytest.fixture
def snapshot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Make a snapshot with options of one's own."""
    monkeypatch.setattr(saving, "lib", SimpleNamespace(pv_settle=lambda _native: 0))
    with Plan(MachineConfig("payload:hello", memory=8 << 20)) as plan:

        def make(options: str) -> str:
            path = str(tmp_path / "guest.snap")
            saving.save(plan.machine, path, options=options)
            return path

        yield make


def parsed(*words: str) -> tuple[list[str], Any]:
    line = ["run", *words]
    return with_file(line, make_parser(line).parse_args(line))


def test_a_snapshot_that_reaches_the_host_is_refused_with_all_that_it_would_open(snapshot: Any) -> None:
    path = snapshot(GREEDY)
    with pytest.raises(UsageError) as refused:
        parsed("--restore", path)
    for word, name in OPENS.items():
        assert name in refused.value.message
        assert word in str(refused.value.hint)
    assert "--trust-snapshot" in str(refused.value.hint)


def test_the_refusal_is_one_of_the_command_line_and_opens_nothing(
    snapshot: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = tmp_path / "log"
    path = snapshot(f'kernel = "payload:hello"\nconsole = "file={log}"\n')
    assert main(["run", "--restore", path]) == 2
    assert f"would open what the command line does not name: '{log}' to write" in capsys.readouterr().err
    assert not log.exists()


def test_what_the_command_line_repeats_is_opened_and_the_rest_is_still_refused(snapshot: Any) -> None:
    path = snapshot(GREEDY)
    given: list[str] = ["--restore", path]
    for option in ("disk", "net", "vsock", "console"):
        given += [word for word in OPENS if word.startswith(f"--{option}=")]
        with pytest.raises(UsageError) as refused:
            parsed(*given)
        left = [word for word in OPENS if word not in given]
        assert [word for word in OPENS if word in str(refused.value.hint)] == left
    words, args = parsed(*given, "--dtb", "/secret.dtb")
    assert [disk["path"] for disk in args.disk] == ["/etc/passwd", "/dev/sda"]
    assert args.rng
    # The lab reads the words it was sent, and must not ask again.
    assert vars(with_file(words, args)[1]) == vars(args)


@pytest.mark.parametrize("how", ["text", "json", "quiet"])
def test_a_trusted_snapshot_says_what_it_opens(snapshot: Any, capsys: pytest.CaptureFixture[str], how: str) -> None:
    path = snapshot(GREEDY)
    flags = {"text": [], "json": ["--log-json"], "quiet": ["-q"]}[how]
    words, args = parsed(*flags, "--restore", path, "--trust-snapshot")
    said = capsys.readouterr().err
    for name in OPENS.values():
        assert (name in said) is (how != "quiet")
    if how == "text":
        assert said.splitlines()[0] == f"pyvmm: {path} opens '/etc/passwd' to read and write"
    with_file(words, args)
    assert capsys.readouterr().err == ""


def test_a_snapshot_that_reaches_nothing_needs_no_trust(snapshot: Any, capsys: pytest.CaptureFixture[str]) -> None:
    _, args = parsed("--restore", snapshot('kernel = "payload:hello"\nrng = true\nconsole = "stdio"\ncpus = 1\n'))
    assert args.rng
    assert capsys.readouterr().err == ""


def test_a_device_of_another_package_is_not_imported_for_a_snapshot(
    snapshot: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def find(*_: object) -> None:
        raise AssertionError("the package is imported")

    monkeypatch.setattr(plugins, "find", find)
    path = snapshot('kernel = "payload:hello"\ndevice = ["dice,sides=6"]\n')
    with pytest.raises(UsageError, match="the device 'dice' of an installed package"):
        parsed("--restore", path)


@pytest.mark.parametrize("options", ['disk = "a', "= 1", "a = 1\na = 2"])
def test_options_that_are_not_toml_are_refused(snapshot: Any, options: str) -> None:
    with pytest.raises(UsageError, match="is damaged: its options are not TOML"):
        parsed("--restore", snapshot(options))


@pytest.mark.parametrize("options", ['disk = [["/a"]]', "disk = [1.5, {}]", 'vsock = {uds = "/v"}', 'net = "tun=t"'])
def test_options_that_are_invalid_are_refused_trusted_or_not(snapshot: Any, options: str) -> None:
    path = snapshot(f'kernel = "payload:hello"\n{options}\n')
    for trust in ([], ["--trust-snapshot"]):
        with pytest.raises(UsageError):
            parsed("--restore", path, *trust)


@pytest.mark.parametrize("trust", [[], ["--trust-snapshot"]])
@pytest.mark.parametrize("option", [option for option in TABLE if option.about != MACHINE and option.keys])
def test_no_option_but_those_of_a_machine_comes_from_a_snapshot(
    snapshot: Any, option: Option, trust: list[str]
) -> None:
    value = "true" if option.takes in (FLAG, SWITCH) else '"file=/root/.bashrc"'
    path = snapshot(f'kernel = "payload:hello"\n{option.key} = {value}\n')
    with pytest.raises(
        UsageError, match=f"line 2: {option.key} is not an option of pyvmm run that a snapshot may give"
    ):
        parsed("--restore", path, *trust)


def test_options_that_write_files_or_listen_are_among_those_that_no_snapshot_gives() -> None:
    of_runs = {option.key for option in TABLE if option.about != MACHINE}
    assert {"serial", "map", "trace", "socket", "gdb", "reboot", "dump-dtb"} <= of_runs


def test_every_option_of_a_machine_that_names_a_file_tells_what_it_opens() -> None:
    silent = [option.key for option in TABLE if option.about == MACHINE and option.path and not option.reaches]
    assert silent == []


@pytest.mark.parametrize("option", ["--verify", "--trust-snapshot"])
def test_an_option_about_snapshots_is_refused_without_one(option: str) -> None:
    line = ["run", option, "payload:hello"]
    with pytest.raises(OptionError, match=f"{option} is about a snapshot, but --restore is missing"):
        check_run(make_parser(line).parse_args(line))


def test_verify_reads_all_of_the_file_on_any_machine_before_anything_else(
    snapshot: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    path = snapshot('kernel = "payload:hello"\n')
    parsed("--restore", path, "--verify")
    with Snapshot(path) as good:
        region = good.description["memory"][0]
    with open(path, "r+b") as file:
        os.pwrite(file.fileno(), b"\1", region["offset"] + (7 << 20))
    parsed("--restore", path)
    assert main(["run", "--restore", path, "--verify"]) == 2
    assert "memory at gpa 0x8070_0000 does not match its checksum" in capsys.readouterr().err
