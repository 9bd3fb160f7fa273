# SPDX-License-Identifier: Apache-2.0
"""pyvmm warns before a run that exceeds its cgroup's memory, with the figures."""

from __future__ import annotations

from pathlib import Path

import pytest

from pyvmm import log
from pyvmm.kvm.stand_in import StandIn
from pyvmm.machine.config import MachineConfig
from pyvmm.machine.machine import Machine
from pyvmm.memory import cgroup
from pyvmm.memory.address import MIB
from pyvmm.memory.cgroup import rooms, warn_of_cgroup
from pyvmm.protection import Protection


class Host:
    """A host's cgroups, as files."""

    def __init__(self, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.own, self.root = directory / "cgroup", directory / "fs"
        self.root.mkdir()
        monkeypatch.setattr(cgroup, "OWN", str(self.own))
        monkeypatch.setattr(cgroup, "ROOT", str(self.root))

    def put(self, path: str, **files: str) -> None:
        place = self.root / path
        place.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            (place / name.replace("__", ".")).write_text(text)


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Host:
    log.configure()
    return Host(tmp_path, monkeypatch)


def limited(host: Host, mib: int, used: int = 8) -> None:
    host.own.write_text("0::/a.slice/b.service\n")
    host.put("a.slice/b.service", memory__max="max\n", memory__current="1\n")
    stat = f"anon {2 * MIB}\nfile {5 * MIB}\nshmem {MIB}\n"
    host.put("a.slice", memory__max=f"{mib * MIB}\n", memory__current=f"{used * MIB}\n", memory__stat=stat)


def test_a_parent_cgroup_counts_and_reclaimable_memory_does_not(host: Host) -> None:
    limited(host, 48)
    assert [(room.cgroup, room.limit, room.kept) for room in rooms()] == [("/a.slice", 48 * MIB, 4 * MIB)]


def test_the_warning_has_the_figures(host: Host, capsys: pytest.CaptureFixture[str]) -> None:
    limited(host, 48)
    warn_of_cgroup(44 * MIB)
    assert capsys.readouterr().err == ""
    warn_of_cgroup(64 * MIB)
    said = capsys.readouterr().err
    for figure in ("cgroup_too_small", "cgroup=/a.slice", "limit_mib=48", "left_mib=44", "guest_mib=64", "SIGKILL"):
        assert figure in said


def test_the_warning_names_the_tightest_cgroup(host: Host, capsys: pytest.CaptureFixture[str]) -> None:
    limited(host, 48)
    host.put("a.slice/b.service", memory__max=f"{32 * MIB}", memory__current="0")
    warn_of_cgroup(64 * MIB)
    assert "cgroup=/a.slice/b.service" in capsys.readouterr().err


def test_version_1_of_cgroups_is_understood(host: Host) -> None:
    host.own.write_text("4:cpu,memory:/x\n2:devices:/y\n")
    stat = f"cache {MIB}\ntotal_cache {3 * MIB}\ntotal_shmem {MIB}\n"
    files = {"memory__limit_in_bytes": f"{48 * MIB}", "memory__usage_in_bytes": f"{8 * MIB}", "memory__stat": stat}
    host.put("memory/x", **files)
    assert [room.left for room in rooms()] == [42 * MIB]


@pytest.mark.parametrize("own", ["", "0::/gone\n", "nonsense\n", "0::/\n"])
def test_missing_information_causes_no_warning(own: str, host: Host, capsys: pytest.CaptureFixture[str]) -> None:
    host.own.write_text(own)
    warn_of_cgroup(1 << 40)
    host.own.unlink()
    warn_of_cgroup(1 << 40)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("protection", "prefault", "warned"),
    [
        (Protection.PKVM, False, True),
        (Protection.NONE, True, True),
        (Protection.NONE, False, False),  # memory that is not pinned can be swapped
    ],
)
def test_a_machine_warns_before_it_starts(
    protection: Protection, prefault: bool, warned: bool, host: Host, capsys: pytest.CaptureFixture[str]
) -> None:
    limited(host, 8, used=5)
    config = MachineConfig("payload:hello", protection, memory=16 * MIB, prefault=prefault, serial_out=None)
    with Machine(config, kernel=StandIn()) as machine:
        machine.start()
    assert ("cgroup_too_small" in capsys.readouterr().err) is warned
