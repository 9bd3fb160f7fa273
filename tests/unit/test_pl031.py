# SPDX-License-Identifier: Apache-2.0
"""The clock: it follows the host's, keeps what the guest set, and says when an alarm has passed."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest

from pyvmm.devices import pl031
from pyvmm.devices.pl031 import At, Pl031
from pyvmm.errors import UsageError

NOW, HOUR, YEAR_2106 = 1_800_000_000, 3600, 1 << 32


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Replace the host's clock by one that stands at ``seconds``."""
    fake = SimpleNamespace(seconds=float(NOW))
    monkeypatch.setattr(pl031, "time", SimpleNamespace(time=lambda: fake.seconds))
    return fake


def read(clock: Pl031, at: int) -> int:
    return clock.read(at, 4, 0)


def write(clock: Pl031, at: int, value: int) -> None:
    clock.write(at, 4, value, 0)


def test_a_guest_reads_the_hosts_seconds(host: Any) -> None:
    clock = Pl031()
    assert read(clock, At.DR) == NOW
    host.seconds += 1.5
    assert read(clock, At.DR) == NOW + 1
    host.seconds = YEAR_2106 + 7
    assert read(clock, At.DR) == 7


def test_a_guest_that_sets_its_clock_does_not_change_the_hosts(host: Any) -> None:
    clock, other = Pl031(), Pl031()
    for value in (5, NOW + HOUR, YEAR_2106 - 1):
        write(clock, At.LR, value)
        assert (read(clock, At.DR), read(clock, At.LR)) == (value, value)
    host.seconds += 2
    assert read(clock, At.DR) == 1  # it has wrapped
    assert read(other, At.DR) == NOW + 2


def test_linux_finds_the_identity_of_the_part_and_a_clock_that_runs(host: Any) -> None:
    del host
    clock = Pl031()
    id = sum(read(clock, At.IDS + 4 * byte) << 8 * byte for byte in range(4))
    assert id & 0x000F_FFFF == 0x0004_1031  # pl031_ids of drivers/rtc/rtc-pl031.c
    cell = sum(read(clock, At.IDS + 16 + 4 * byte) << 8 * byte for byte in range(4))
    assert cell == 0xB105_F00D  # AMBA_CID
    write(clock, At.CR, 0)
    assert read(clock, At.CR) == 1
    assert [read(clock, at) for at in (0x20, 0xFDC, 0xFE1, 0x1000)] == [0, 0, 0, 0]


def test_an_alarm_has_passed_until_it_is_cleared(host: Any) -> None:
    clock = Pl031()
    assert read(clock, At.RIS) == 0
    write(clock, At.MR, NOW + 10)
    host.seconds += 9
    assert read(clock, At.RIS) == 0
    host.seconds += 1
    assert (read(clock, At.RIS), read(clock, At.MIS)) == (1, 0)
    write(clock, At.IMSC, 0xFF)
    assert (read(clock, At.IMSC), read(clock, At.MIS)) == (1, 1)
    write(clock, At.ICR, 0)
    assert read(clock, At.RIS) == 1
    write(clock, At.ICR, 1)
    host.seconds += HOUR
    assert (read(clock, At.RIS), read(clock, At.MIS)) == (0, 0)
    write(clock, At.MR, NOW)  # in the past: the counter does not come there again
    host.seconds += HOUR
    assert read(clock, At.RIS) == 0


def test_a_restored_clock_has_the_hosts_time_of_now_and_what_the_guest_had_set(host: Any) -> None:
    clock = Pl031()
    write(clock, At.LR, NOW + 100)
    write(clock, At.MR, NOW + 200)
    write(clock, At.IMSC, 1)
    saved = json.loads(json.dumps(clock.save()))
    host.seconds += HOUR
    restored = Pl031()
    restored.load(saved)
    assert restored.save() == saved
    assert read(restored, At.DR) == NOW + HOUR + 100
    assert read(restored, At.MIS) == 1  # the alarm passed meanwhile


def test_a_saved_clock_with_a_register_that_is_too_wide_is_refused(host: Any) -> None:
    del host
    clock = Pl031()
    with pytest.raises(UsageError, match="match is 0x100000000"):
        clock.load({**clock.save(), "match": 1 << 32})
