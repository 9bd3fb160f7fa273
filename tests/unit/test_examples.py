# SPDX-License-Identifier: Apache-2.0
"""The devices of pyvmm/examples: what somebody else adds, from Python and from the command line."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from pyvmm import plugins
from pyvmm.cli import make_parser, with_file
from pyvmm.cli.run import TABLE
from pyvmm.devices.kind import Around
from pyvmm.devices.virtio.registers import Register
from pyvmm.errors import UsageError
from pyvmm.examples.dice import KIND, Dice, DiceDevice
from pyvmm.examples.upper import MOST, UpperDevice
from pyvmm.machine import layout
from pyvmm.machine.config import MachineConfig
from pyvmm.machine.fdt import cells64
from pyvmm.machine.plan import Plan
from pyvmm.options.devices import device_specs
from pyvmm.options.written import machine_options
from pyvmm.protection import Protection
from tests.memory_helper import BASE
from tests.unit.installed import install
from tests.virtio_board import DATA, Board, answer, ask, eventually
from tests.virtqueue_rig import PAGE, SIZE, Guest

ENTRY = {"dice": "pyvmm.examples.dice:KIND"}


@pytest.mark.parametrize("sides", [1, 6, 256])
def test_dice_gives_every_side_and_nothing_else(sides: int) -> None:
    dice = DiceDevice(sides)
    assert {dice.read(0, 4, 0) for _ in range(40 * sides)} == set(range(1, sides + 1))
    assert [dice.read(offset, 4, 0) for offset in (1, 4, 0xFFC)] == [0, 0, 0]


def test_dice_throws_bytes_again_that_would_favour_a_side(monkeypatch: pytest.MonkeyPatch) -> None:
    given = iter((255, 252, 251, 0))
    monkeypatch.setattr(os, "getrandom", lambda size: bytes([next(given)]) * size)
    dice = DiceDevice(6)
    assert [dice.read(0, 1, 0), dice.read(0, 1, 0)] == [6, 1]


@pytest.mark.parametrize("sides", [0, 257])
def test_dice_of_so_many_sides_is_refused(sides: int) -> None:
    with pytest.raises(UsageError, match=f"a dice with {sides} sides: it can have 1 to 256"):
        Dice(sides)


def node_of(plan: Plan) -> Mapping[str, object]:
    tree = plan.machine.entry.tree
    assert tree is not None
    [node] = [node for node in tree.root.children if node.name.startswith("dice@")]
    assert node.name == f"dice@{layout.OTHER_DEVICES.start:x}"
    return node.properties


@pytest.mark.parametrize("protection", list(Protection))
def test_guest_is_told_where_a_dice_is(protection: Protection) -> None:
    config = MachineConfig("payload:hello", protection)
    # Brought by a script, and asked for by a configuration.
    for plan in (Plan(config, devices=[DiceDevice(20)]), Plan(config._replace(devices=(Dice(20),)))):
        with plan:
            assert node_of(plan) == {
                "compatible": ("pyvmm,dice",),
                "reg": cells64(layout.OTHER_DEVICES.start, 0x1000),
                "pyvmm,sides": 20,
            }
            assert plan.machine.pool == 0
            [line] = [line for line in plan.lines() if line.endswith("  dice")]
            assert line.split()[:2] == ["0xb00_0000", "0xb00_1000"]


# ---- brought by an installed package


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    directory = tmp_path / "site"
    directory.mkdir()
    monkeypatch.syspath_prepend(directory)
    monkeypatch.setattr(plugins, "_asked", {})
    monkeypatch.setenv("PYTHONPATH", str(directory))
    return directory


def run(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pyvmm", "run", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def specs(*words: str) -> tuple[object, ...]:
    return device_specs(make_parser(["run", *words]).parse_args(["run", *words, "payload:hello"]))


def test_command_line_asks_for_it_by_name(site: Path) -> None:
    install(site, "pyvmm-dice", {}, {plugins.DEVICES: ENTRY})
    assert specs("--device", "dice,sides=20", "--device", "dice") == (Dice(20), Dice(6))
    assert [each.metadata["Name"] for each in plugins.asked()] == ["pyvmm-dice"]  # what a lab has to mount
    done = run("--dry-run", "--pkvm", "--device", "dice", "payload:hello")
    assert (done.returncode, done.stderr) == (0, "")
    assert "    0xb00_0000    0xb00_1000  dice" in done.stdout.splitlines()


def test_file_and_snapshot_say_it_too(site: Path, tmp_path: Path) -> None:
    install(site, "pyvmm-dice", {}, {plugins.DEVICES: ENTRY})
    path = tmp_path / "vm.toml"
    path.write_text('kernel = "payload:hello"\n[[device]]\nsides = 8\nname = "dice"\n[[device]]\nname = "dice"\n')
    line = ["run", "--config", str(path)]
    args = with_file(line, make_parser(line).parse_args(line))[1]
    assert device_specs(args) == (Dice(8), Dice(6))
    assert 'device = ["sides=8,name=dice", "name=dice"]' in machine_options(args, TABLE, "/somewhere")
    path.write_text('kernel = "payload:hello"\n[[device]]\nname = "dice"\nsides = 257\n')
    done = run("--config", str(path), "--dry-run")
    assert done.returncode == 2
    assert "device (line 2): a dice with 257 sides: it can have 1 to 256" in done.stderr
    path.write_text('kernel = "payload:hello"\n[[device]]\nname = "dice"\ncolour = "red"\n')
    done = run("--config", str(path), "--dry-run")
    assert (done.returncode, "line 4" in done.stderr, "'colour'" in done.stderr) == (2, True, True)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("dice,sides=0", "sides in 'sides=0'"),
        ("dice,eyes=2", "'eyes' in 'eyes=2' is not known; known are sides="),
        ("coin", "no installed package has a device 'coin'; --device help lists them"),
        ("disk", "'disk' has its own option: --disk"),
    ],
)
def test_what_is_no_device_is_said_in_one_line(site: Path, text: str, said: str) -> None:
    install(site, "pyvmm-dice", {}, {plugins.DEVICES: ENTRY})
    done = run("--device", text, "payload:hello")
    assert done.returncode == 2
    [line] = [line for line in done.stderr.splitlines() if said in line]
    assert line.startswith("pyvmm run: argument --device: ")


@pytest.mark.parametrize(
    ("name", "reason"),
    [("bad", "ZeroDivisionError: division by zero"), ("word", "os:name is a str, not a DeviceKind")],
)
def test_faulty_package_is_one_line_with_what_to_do(site: Path, name: str, reason: str, tmp_path: Path) -> None:
    install(site, "pyvmm-bad", {"bad.py": "1 / 0"}, {plugins.DEVICES: {"bad": "bad:KIND", "word": "os:name"}})
    what = f"the plug-in {name!r} of the package pyvmm-bad cannot be used: {reason}"
    todo = "  hint: fix or remove it: pip uninstall pyvmm-bad"
    done = run("--device", name, "payload:hello")
    assert (done.returncode, done.stdout, done.stderr) == (2, "", f"pyvmm: {what}\n{todo}\n")
    path = tmp_path / "guest.toml"
    path.write_text(f'kernel = "payload:hello"\n[[device]]\nname = "{name}"\n')
    done = run("--config", str(path))
    assert (done.returncode, done.stdout, done.stderr) == (2, "", f"pyvmm: {path}, line 2: device: {what}\n{todo}\n")


def test_list_has_the_good_ones_and_a_line_for_each_of_the_others(site: Path) -> None:
    assert run("--device", "help").stdout.startswith("no installed package has a device")
    install(site, "pyvmm-dice", {}, {plugins.DEVICES: ENTRY})
    done = run("--device", "help")
    assert (done.returncode, done.stdout, done.stderr) == (
        0,
        "dice[,sides=N]  a dice, thrown by a load (package pyvmm-dice)\n",
        "",
    )
    install(site, "pyvmm-bad", {"bad.py": "1 / 0"}, {plugins.DEVICES: {"bad": "bad:KIND", "rng": "bad:KIND"}})
    done = run("--device", "help")
    assert (done.returncode, done.stdout.count("\n"), done.stderr.count("\n")) == (2, 1, 2)
    assert (
        "the plug-in 'rng' of the package pyvmm-bad cannot be used: pyvmm has a built-in one with this name"
        in done.stderr
    )


def test_run_of_known_devices_reads_no_entry_points() -> None:
    words = ["run", "--rng", "--disk", "a.img,ro", "--vsock", "uds=v,cid=3", "payload:hello"]
    code = f"""
import sys
from pyvmm.cli import make_parser
from pyvmm.options.devices import device_specs
assert device_specs(make_parser({words}).parse_args({words}))
print([name for name in sys.modules if name in ("pyvmm.plugins", "importlib.metadata", "pyvmm._native")])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "[]\n"


def test_its_kind_makes_it() -> None:
    assert KIND.spec({"sides": 3}, Around()) == Dice(3)
    assert repr(Dice(3)) == "Dice(sides=3)"


# ---- the virtio device


@pytest.fixture
def guest() -> Iterator[Guest]:
    guest = Guest()
    yield guest
    guest.close()


@pytest.mark.parametrize("packed", [False, True])
def test_upper_answers_in_upper_case(guest: Guest, packed: bool) -> None:
    board = Board(guest, UpperDevice())
    [driver] = board.drive(packed=packed)
    for text in (b"hello", b"from", b"a guest"):
        ask(board, driver, text)
        assert answer(board, driver) == text.upper()
    board.close()


def test_upper_bounds_a_request_and_fails_one_outside_of_memory_alone(guest: Guest) -> None:
    board = Board(guest, UpperDevice())
    [driver] = board.drive()
    for start, size, written in ((BASE + SIZE, 4, 0), (DATA, 2 * PAGE, MOST)):
        driver.add([(start, size, False), (DATA + 4 * PAGE, 4 * PAGE, True)])
        board.store(Register.QUEUE_NOTIFY, 0)
        done: list[tuple[int, int]] = []
        eventually(lambda done=done: done.extend(driver.used()) or done)  # type: ignore[misc]
        assert [length for _, length in done] == [written]
    board.close()
