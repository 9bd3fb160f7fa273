# SPDX-License-Identifier: Apache-2.0
"""The project's own kernel as the lab's host: pKVM with Debian's root, and a hypervisor that traces when it runs.

Building the kernel takes minutes. Outside CI these tests do not build it, and are skipped without it.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from itertools import pairwise
from statistics import median
from typing import Any

import pytest

from pyvmm.bench.model import Series
from pyvmm.bench.split import PARTS, WHOLE
from pyvmm.lab import Lab, LabOptions, build_image
from pyvmm.lab.cache import Image
from pyvmm.lab.needs import require_for_kernel
from pyvmm.lab.ownkernel import Variant, build_kernels, usable_kernel
from pyvmm.observe.hyptrace import HypEvent

pytestmark = pytest.mark.lab

# Record every entry to EL2 and every exit while a protected guest runs, then check that the trace buffer is restored.
TRACE = """
import json, subprocess, sys
from pathlib import Path
from pyvmm.observe.hyptrace import HypTrace, now

remote = Path("/sys/kernel/tracing/remotes/hypervisor")
files = [remote / "tracing_on", remote / "buffer_size_kb", *remote.glob("events/*/*/enable")]
before = [file.read_text() for file in files]
with HypTrace() as trace:
    begin = now()
    run = ["python3", "-P", "-m", "pyvmm", "run", "--protection", "pkvm", "payload:echo"]
    status = subprocess.run(run, capture_output=True).returncode
    end = now()
restored = before == [file.read_text() for file in files]
json.dump([trace.why_not, trace.lost, status, restored, begin, end, trace.events()], sys.stdout)
"""

# Measure one point of a benchmark case, as the runner does.
MEASURE = """
import json, sys
from pyvmm.bench.task import measure_point

json.dump([series.to_json() for series in measure_point(sys.argv[1], json.loads(sys.argv[2]))], sys.stdout)
"""


@pytest.fixture(scope="module")
def image(request: pytest.FixtureRequest) -> Image:
    if usable_kernel() is None:
        if not os.environ.get("CI"):
            pytest.skip("there is no kernel of the project's own yet: pyvmm lab kernel builds it")
        require_for_kernel()
        terminal: Any = request.config.pluginmanager.getplugin("terminalreporter")
        said: set[str] = set()

        def say(what: str, _share: float) -> None:
            if what not in said:
                said.add(what)
                terminal.write_line(f"building the kernel: {what}")

        build_kernels(wanted=[Variant.HOST], progress=say)
    return build_image("own")


@pytest.fixture(scope="module")
def lab(image: Image) -> Iterator[Lab]:
    with Lab(image=image) as lab:
        yield lab


def test_the_kernel_is_a_pkvm_host_and_has_every_option_of_its_configuration(lab: Lab, image: Image) -> None:
    kernel = usable_kernel()
    assert kernel is not None
    assert kernel.manifest.refused == []
    assert lab.capture(["uname", "-r"]).stdout.decode().strip() == kernel.release == image.release
    assert re.search(rb"Protected [nh]VHE mode initialized successfully", lab.capture(["dmesg"]).stdout)


def test_the_hypervisor_traces_when_and_why_it_was_entered_and_left(lab: Lab) -> None:
    done = lab.capture(["python3", "-P", "-c", TRACE], timeout=300)
    assert done.status == 0, done.stderr
    why_not, lost, status, restored, begin, end, found = json.loads(done.stdout)
    assert (why_not, lost, status, restored) == ("", 0, 0, True)
    events = [HypEvent(*event) for event in found]
    reasons = {(event.entered, event.reason) for event in events}
    assert {(True, "hvc"), (True, "host_abort"), (False, "eret_host")} <= reasons
    # The guest's vCPU is one thread: each entry is followed by an exit.
    entries = [event.vcpu for event in events if event.reason == "eret_guest"]
    assert entries == [event.vcpu for event in events if event.reason == "guest_exit"]
    assert len(set(entries)) == 1
    assert len(entries) > 400  # the payload's exits, most of them for letters it prints
    for cpu in {event.cpu for event in events}:
        mine = [event for event in events if event.cpu == cpu]
        # Timestamps are truncated to microseconds. Recording begins shortly before the run.
        assert begin - 1_000_000_000 < mine[0].ns <= mine[-1].ns <= end + 1_000_000_000
        assert all(here.entered != there.entered for here, there in pairwise(mine))


@pytest.fixture(scope="module")
def counting(image: Image) -> Iterator[Lab]:
    """A lab in which time counts instructions."""
    with Lab(LabOptions(icount=True, cpus=1), image=image) as lab:
        yield lab


def measured(lab: Lab, case: str, **point: object) -> dict[str, Series]:
    """Give the series of a case at one point, by metric."""
    done = lab.capture(["python3", "-P", "-c", MEASURE, case, json.dumps(point)], timeout=300)
    assert done.status == 0, done.stderr
    found = [Series.from_json(each) for each in json.loads(done.stdout)]
    assert not [each.unavailable for each in found if each.unavailable]
    return {each.metric: each for each in found}


def test_the_parts_of_a_cold_donation_measured_separately_add_up_to_it(counting: Lab) -> None:
    found = measured(counting, "split", pages=128)
    cost = {metric: median(series.kept) for metric, series in found.items()}
    assert all(cost[part] > 0 for part in PARTS)
    assert sum(cost[part] for part in PARTS) == pytest.approx(cost[WHOLE], rel=0.1)
    # The cost subtracted for tracing is right: without tracing the guest waits equally long.
    assert cost[WHOLE] == pytest.approx(cost["whole, not traced"], rel=0.15)
    assert cost["tracing"] > 0


@pytest.mark.parametrize("protection", ["pkvm", "none"])
def test_bench_counts_residency_in_every_protection(counting: Lab, protection: str) -> None:
    found = measured(counting, "residency", protection=protection, pages=64)
    assert all(value > 0 for series in found.values() for value in series.kept)
    # Whatever the first touch of a page costs, the guest exits once for it.
    assert found["first touch"].notes["guest_exit entries"] == pytest.approx(1, abs=0.1)
    if protection == "pkvm":
        assert median(found["first touch"].kept) > median(found["share"].kept) > 0


def test_the_kernel_boots_without_protection_too(image: Image) -> None:
    with Lab(LabOptions(mode="nvhe"), image=image, bare=True) as lab:
        assert b"Hyp nVHE mode initialized successfully" in lab.capture(["dmesg"]).stdout
