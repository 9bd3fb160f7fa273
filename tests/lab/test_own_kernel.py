"""The project's own kernel as the lab's host: pKVM with Debian's root on top, and a hypervisor that says when it runs.

Elsewhere than in CI a kernel that nobody has built yet is not built for these tests: it takes minutes.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from itertools import pairwise

import pytest

from pyvmm.lab import Lab, LabOptions, build_image
from pyvmm.lab.cache import Image
from pyvmm.lab.needs import require_for_kernel
from pyvmm.lab.ownkernel import build_kernel, usable_kernel

pytestmark = pytest.mark.lab

# Every entry to EL2 and every exit while a protected guest runs, CPU by CPU, between two readings of the clock. The
# marker is the last event of each CPU: a pipe that has no more blocks, and the file that does not may leave some out.
TRACE = """
import os, subprocess, time

def put(name, text):
    with open(name, "w") as file:
        file.write(text)

os.chdir("/sys/kernel/tracing/remotes/hypervisor")
put("buffer_size_kb", "4096")
put("events/enable", "1")
put("tracing_on", "1")
print(open("trace_clock").read(), time.clock_gettime(time.CLOCK_BOOTTIME))
run = ["python3", "-P", "-m", "pyvmm", "run", "--protection", "pkvm", "payload:echo"]
print(subprocess.run(run, capture_output=True).returncode)
for cpu in sorted(os.sched_getaffinity(0)):
    os.sched_setaffinity(0, {cpu})
    put("write_event", "4711")
print(time.clock_gettime(time.CLOCK_BOOTTIME))
put("tracing_on", "0")
for name in sorted(os.listdir("per_cpu")):
    with open(f"per_cpu/{name}/trace_pipe") as pipe:
        for line in pipe:
            print(line, end="")
            if "selftest id=4711" in line:
                break
"""
LINE = re.compile(r"\[(\d+)\]\s+(\d+\.\d{6}): (?:hyp_(enter|exit) reason=(\w+) vcpu=(\d+)|selftest id=4711)")


@pytest.fixture(scope="module")
def image(request) -> Image:
    if usable_kernel() is None:
        if not os.environ.get("CI"):
            pytest.skip("there is no kernel of the project's own yet: pyvmm lab kernel builds it")
        require_for_kernel()
        terminal, said = request.config.pluginmanager.getplugin("terminalreporter"), set()

        def say(what: str, _share: float) -> None:
            if what not in said:
                said.add(what)
                terminal.write_line(f"building the kernel: {what}")

        build_kernel(progress=say)
    return build_image("own")


@pytest.fixture(scope="module")
def lab(image) -> Iterator[Lab]:
    with Lab(image=image) as lab:
        yield lab


def test_it_is_pkvm_and_took_every_option(lab, image):
    kernel = usable_kernel()
    assert kernel is not None
    assert kernel.manifest.refused == []
    assert lab.capture(["uname", "-r"]).stdout.decode().strip() == kernel.release == image.release
    assert b"Protected nVHE mode initialized successfully" in lab.capture(["dmesg"]).stdout


def test_its_hypervisor_says_when_it_was_entered_and_left_and_why(lab):
    done = lab.capture(["python3", "-P", "-c", TRACE], timeout=300)
    assert done.status == 0, done.stderr
    clock, before, status, after, *lines = done.stdout.decode().split("\n")[:-1]
    assert (clock, status) == ("[boot]", "0")
    events = [match.groups() for match in map(LINE.fullmatch, lines) if match]
    assert len(events) == len(lines), set(lines) - {line for line in lines if LINE.fullmatch(line)}
    reasons = {(which, why) for _, _, which, why, _ in events}
    assert {("enter", "hvc"), ("enter", "host_abort"), ("exit", "eret_host")} <= reasons
    # The guest's vCPU is one thread, and whatever goes into it comes out again.
    entries = [vcpu for _, _, _, why, vcpu in events if why == "eret_guest"]
    assert entries == [vcpu for _, _, _, why, vcpu in events if why == "guest_exit"]
    assert len(set(entries)) == 1
    assert len(entries) > 400  # the payload's exits, most of them letters
    for cpu in {event[0] for event in events}:
        mine = [event for event in events if event[0] == cpu]
        moments = [float(moment) for _, moment, *_ in mine]
        assert moments == sorted(moments)
        assert float(before) - 1 < moments[0] <= moments[-1] <= float(after)
        turns = [which for _, _, which, *_ in mine if which]
        assert all(here != there for here, there in pairwise(turns))


def test_it_boots_without_protection_too(image):
    with Lab(LabOptions(mode="nvhe"), image=image, bare=True) as lab:
        assert b"Hyp nVHE mode initialized successfully" in lab.capture(["dmesg"]).stdout
