# SPDX-License-Identifier: Apache-2.0
"""Peers in the lab, where time counts instructions: pyvmm is as fast as simpler programs that do the same.

Missing peers are built first: two minutes and 200 MB of downloads. Outside CI a test whose peer
cannot be built is skipped with the reason. The project's own kernel for guests is never built for these tests.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from typing import Any

import pytest

from pyvmm.bench.model import Series
from pyvmm.guest.kernels import OWN
from pyvmm.lab import Lab, LabOptions, build_image, kvmtool, programs, selftests
from pyvmm.lab.peers import LOOP, RECIPES, Prepared, prepare

pytestmark = pytest.mark.lab

MEASURE = """
import json, sys
from pyvmm.bench.peers import PEERS
json.dump([series.to_json() for series in PEERS[sys.argv[1]](**json.loads(sys.argv[2]))], sys.stdout)
"""


NEEDS = {
    "demand_paging_test": [selftests.NAME],
    "access_tracking_perf_test": [selftests.NAME],
    "guest_memfd_test": [selftests.NAME],
    "qemu": [programs.QEMU.name],
    "qemu boot": [programs.QEMU.name, OWN],
    "kvmtool boot": [kvmtool.NAME, OWN],
    "qemu virtio": [programs.QEMU.name, OWN],
    "bare loop": [LOOP],
    "twin": [],
}
"""What each peer is measured with."""


@pytest.fixture(scope="module")
def prepared(request: pytest.FixtureRequest) -> Prepared:
    terminal: Any = request.config.pluginmanager.getplugin("terminalreporter")
    said: set[str] = set()

    def say(what: str, _share: float) -> None:
        if what not in said:
            said.add(what)
            terminal.write_line(f"building the peers: {what}")

    build_image(progress=say)  # needed to build kernels for guests
    return prepare(progress=say)


def require(prepared: Prepared, names: Iterable[str]) -> None:
    """Skip the test if one of these could not be built. In CI fail it."""
    lacking = [prepared.lacking[name].replace("\n  hint", "; hint") for name in names if name in prepared.lacking]
    if lacking:
        (pytest.fail if os.environ.get("CI") else pytest.skip)("; ".join(lacking))


@pytest.fixture(scope="module")
def lab(prepared: Prepared) -> Iterator[Lab]:
    with Lab(LabOptions(icount=True, cpus=1), image=build_image(), arguments=prepared.paths) as lab:
        yield lab


def measure(lab: Lab, prepared: Prepared, name: str, **how: object) -> list[Series]:
    require(prepared, NEEDS[name])
    command = ["python3", "-P", "-c", MEASURE, name, json.dumps(how)]
    done = lab.capture(command, env=prepared.environment, timeout=600)
    assert done.status == 0, done.stderr.decode()
    return [Series.from_json(each) for each in json.loads(done.stdout)]


def ratio(series: list[Series], **point: str) -> float:
    [own] = [each for each in series if each.point["peer"] == "pyvmm" and point.items() <= each.point.items()]
    assert own.unit == "instructions"
    assert own.kept
    [value] = [value for note, value in own.notes.items() if note.startswith("ratio to ")]
    assert isinstance(value, float)
    return value


def test_every_peer_was_built(prepared: Prepared) -> None:
    require(prepared, RECIPES)
    assert set(prepared.trees) == {recipe().name for recipe in RECIPES.values()}


def test_a_first_touch_costs_as_much_as_in_the_kernels_own_test(lab: Lab, prepared: Prepared) -> None:
    series = measure(lab, prepared, "demand_paging_test")
    assert ratio(series, what="first write", backing="memfd") <= 1.05
    others = {each.point["what"]: each.kept for each in series if each.point["peer"] == "demand_paging_test"}
    assert min(others["first write, userfaultfd copies"]) > max(others["first write"])


def test_an_exit_costs_no_more_than_under_qemu(lab: Lab, prepared: Prepared) -> None:
    series = measure(lab, prepared, "qemu")
    assert ratio(series, what="store to the UART") < 1
    assert ratio(series, what="load from the UART") < 1
    assert ratio(series, what="PSCI version") < 1.05


@pytest.mark.parametrize(("name", "most"), [("qemu boot", 1.0), ("kvmtool boot", 3.2)])
def test_a_linux_guest_boots_about_as_fast_as_under_another_vmm(
    lab: Lab, prepared: Prepared, name: str, most: float
) -> None:
    # Notice when starting becomes much slower. Measured: 0.91 and 2.83. Up to the first KVM_RUN pyvmm takes twice what
    # kvmtool takes for the whole boot. tests.bench.linux_bars has the bars.
    assert ratio(measure(lab, prepared, name, turns=2), what="boot") < most


def test_a_disk_is_as_fast_as_qemus_and_a_network_card_carries_what_it_is_given(lab: Lab, prepared: Prepared) -> None:
    operations = ["blk read", "net send"]
    series = measure(lab, prepared, "qemu virtio", operations=operations, turns=1, passes=2)
    assert ratio(series, what="blk read") < 1 / 0.8
    assert ratio(series, what="net send") < 2


def test_the_loop_costs_little_more_than_bare_ioctls_and_far_less_than_its_twin(lab: Lab, prepared: Prepared) -> None:
    assert ratio(measure(lab, prepared, "bare loop")) <= 1.05
    assert ratio(measure(lab, prepared, "twin")) < 0.7


def test_the_kernels_test_of_guest_memfd_passes(lab: Lab, prepared: Prepared) -> None:
    [series] = measure(lab, prepared, "guest_memfd_test")
    assert series.notes == {"passed": True}
    assert series.kept


def test_bench_refuses_to_run_peers_where_they_would_measure_something_else(lab: Lab, prepared: Prepared) -> None:
    [series] = measure(lab, prepared, "access_tracking_perf_test")
    assert not series.values
    assert "on one CPU" in series.unavailable
