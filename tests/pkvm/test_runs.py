# SPDX-License-Identifier: Apache-2.0
"""Whole runs of the shipped payloads, in every protection."""

from __future__ import annotations

import pytest

from pyvmm.protection import Protection
from pyvmm.vcpu.outcome import Ending
from tests.pkvm.harness import ALL, Footprint, run

pytestmark = pytest.mark.pkvm
each_protection = pytest.mark.parametrize("protection", ALL, ids=lambda p: p.value)


@each_protection
def test_hello_greets_and_powers_off(protection: Protection) -> None:
    result = run("payload:hello", protection)
    assert result.outcome.ending is Ending.POWEROFF
    assert b"hello" in result.output.lower()
    assert result.output.endswith(b"\n")


@pytest.mark.parametrize("cpus", [1, 4])
def test_echo_prints_the_same_bytes_in_every_protection(cpus: int) -> None:
    results = {protection: run("payload:echo", protection, cpus=cpus) for protection in ALL}
    assert {r.outcome.ending for r in results.values()} == {Ending.POWEROFF}, results
    assert len({r.output for r in results.values()}) == 1, {p.value: r.output for p, r in results.items()}
    assert results[Protection.PKVM].output.count(b"\n") > cpus


def test_the_relay_counts_the_shares_of_echo_in_every_protection() -> None:
    counted = {p: run("payload:echo", p).counters for p in ALL}
    assert all(c.shares > 0 and c.unshares > 0 for c in counted.values()), counted
    assert len({(c.shares, c.unshares) for c in counted.values()}) == 1, counted


def check_smp(protection: Protection, cpus: int) -> None:
    result = run("payload:smp", protection, cpus=cpus)
    assert result.outcome.ending is Ending.POWEROFF, result
    for index in range(cpus):
        assert f"vCPU {index}: up".encode() in result.output
    assert b"counted %d of %d" % (1000 * cpus, 1000 * cpus) in result.output


@each_protection
def test_smp_brings_up_every_vcpu(protection: Protection) -> None:
    check_smp(protection, 4)


@pytest.mark.parametrize("cpus", [8, 16])
@pytest.mark.parametrize("protection", [Protection.NONE, Protection.PKVM], ids=lambda p: p.value)
def test_smp_brings_up_as_many_vcpus_as_a_guest_may_have(protection: Protection, cpus: int) -> None:
    check_smp(protection, cpus)


def test_a_guest_with_sixty_four_gib_uses_only_the_memory_that_it_touches() -> None:
    size = 64 << 30
    result = run("payload:hello", Protection.NONE, memory=size, backing="anonymous")
    assert result.outcome.ending is Ending.POWEROFF, result
    assert b"%d MiB of memory" % (size >> 20) in result.output


def test_two_hundred_runs_in_a_row_lose_nothing_and_leak_nothing() -> None:
    for cpus in (1, 4):
        run("payload:echo", Protection.PKVM, cpus=cpus)  # let caches and lazy imports settle
    before = Footprint.now()
    for cpus, runs in ((1, 60), (4, 7)):
        results = [run("payload:echo", protection, cpus=cpus) for _ in range(runs) for protection in ALL]
        assert {result.outcome.ending for result in results} == {Ending.POWEROFF}
        assert len({result.output for result in results}) == 1
    assert Footprint.now() == before
