# SPDX-License-Identifier: Apache-2.0
"""Who handles the kicks of virtqueues: the calls to KVM and their time, and the counts."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from pyvmm.devices.virtio.device import Feature
from pyvmm.devices.virtio.registers import Register, Status
from pyvmm.kvm.stand_in import Lacking, Recording, StandIn
from pyvmm.kvm.system import System
from pyvmm.machine.kicks import Kicks
from pyvmm.uapi.kvm_cap import KVM_CAP_IOEVENTFD, KVM_CAP_IRQFD
from pyvmm.vcpu.counters import Counters
from tests.memory_helper import BASE
from tests.twin_virtqueue import Driver, Rings
from tests.virtio_board import DATA, RUNNING, TABLES, Board, Toy, answer, ask, eventually
from tests.virtqueue_rig import PAGE, Guest

if TYPE_CHECKING:
    from collections.abc import Mapping

    from pyvmm.kvm.causes import Value
    from pyvmm.kvm.fd import CData, Fd
    from pyvmm.kvm.stand_in import Call
    from pyvmm.uapi.ioctl import Ioctl

TRANSPORT = 0x0A00_0400


class Grudging(StandIn):
    """A fake VM with or without the capability. It takes the kicks of ``room`` queues."""

    def __init__(self, *, known: int = 1, room: int = 1000, error: int = errno.ENOSPC) -> None:
        self.known, self.room, self.error = known, room, error

    def ioctl(self, fd: Fd, request: Ioctl, argument: int | CData, values: Mapping[str, Value]) -> tuple[int, int]:
        if request.name == "KVM_CHECK_EXTENSION" and argument == KVM_CAP_IOEVENTFD:
            return self.known, 0
        if request.name == "KVM_IOEVENTFD":
            self.room -= 1
            return (0, 0) if self.room >= 0 else (-1, self.error)
        return super().ioctl(fd, request, argument, values)


def queue(index: int) -> Any:
    return SimpleNamespace(kick=70 + index, index=index)


def handed_over(kernel: StandIn, count: int = 3) -> tuple[list[bool], list[Call]]:
    """Offer the kicks of some queues to KVM. Returns the result of each, and the calls made."""
    recording = Recording(kernel)
    with System.open(kernel=recording) as system:
        kicks = Kicks(system.create_vm())
        recording.calls.clear()
        return [kicks.hand_over(TRANSPORT, queue(index)) for index in range(count)], recording.calls


def test_the_kernel_is_asked_once_and_gets_every_queue_by_its_number() -> None:
    found, calls = handed_over(Grudging())
    assert found == [True] * 3
    asked, *given = calls
    assert (asked.name, asked.on, asked.values["cap"]) == ("KVM_CHECK_EXTENSION", "vm", "KVM_CAP_IOEVENTFD")
    assert [(each.name, each.on) for each in given] == [("KVM_IOEVENTFD", "vm")] * 3
    assert [dict(each.values) for each in given] == [
        {"fd": 70 + index, "gpa": TRANSPORT + 0x50, "size": 4, "datamatch": index, "flags": 1} for index in range(3)
    ]


def test_a_kernel_without_the_capability_gets_no_further_call() -> None:
    found, calls = handed_over(Grudging(known=0))
    assert found == [False] * 3
    assert [(call.on, call.values["cap"]) for call in calls] == [
        ("vm", "KVM_CAP_IOEVENTFD"),
        ("vm", "KVM_CAP_IMMEDIATE_EXIT"),
    ]


class Denying(StandIn):
    """A VM that answers 0 to every question, as a protected one of Linux 7.3 does. The host answers truly."""

    def ioctl(self, fd: Fd, request: Ioctl, argument: int | CData, values: Mapping[str, Value]) -> tuple[int, int]:
        if request.name == "KVM_CHECK_EXTENSION" and fd.kind == "vm":
            return 0, 0
        return super().ioctl(fd, request, argument, values)


def test_the_host_is_asked_where_a_vm_denies_what_every_vm_has() -> None:
    found, calls = handed_over(Denying(), count=1)
    assert found == [True]
    assert [(call.on, call.values.get("cap")) for call in calls] == [
        ("vm", "KVM_CAP_IOEVENTFD"),
        ("vm", "KVM_CAP_IMMEDIATE_EXIT"),
        ("kvm", "KVM_CAP_IOEVENTFD"),
        ("vm", None),
    ]


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.ENOMEM])
def test_pyvmm_logs_once_that_the_kernel_has_no_room(events: Callable[[], list[dict[str, Any]]], error: int) -> None:
    found, calls = handed_over(Grudging(room=1, error=error))
    assert found == [True, False, False]
    assert [call.name for call in calls] == ["KVM_CHECK_EXTENSION", "KVM_IOEVENTFD", "KVM_IOEVENTFD"]
    [said] = [event for event in events() if event["event"] == "kicks_by_exits"]
    assert errno.errorcode[error] in said["error"]


def test_lacking_removes_only_the_named_capabilities(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Lacking.__base__, "ioctl", lambda _self, _fd, _request, _argument, _values: (7, 0))
    monkeypatch.setattr(Lacking.__base__, "open", lambda _self, _path: os.memfd_create("kvm"))
    fd = System(os.memfd_create("kvm"), kernel=Lacking(KVM_CAP_IOEVENTFD))
    with fd:
        assert (fd.check(KVM_CAP_IOEVENTFD), fd.check(KVM_CAP_IRQFD), fd.vcpu_mmap_size) == (0, 7, 7)


# -- the transport


class Offered:
    """Records the queues it is offered, and takes those in ``taken``."""

    def __init__(self, *taken: int) -> None:
        self.taken = taken
        self.seen: list[int] = []

    def __call__(self, queue: Any) -> bool:
        self.seen.append(queue.index)
        return queue.index in self.taken


def board(guest: Guest, offered: Offered) -> Iterator[Board]:
    made = Board(guest, Toy(), hand_over=offered)
    yield made
    made.close()


@pytest.fixture
def both(guest: Guest) -> Iterator[Board]:
    yield from board(guest, Offered(0, 1))


@pytest.fixture
def first(guest: Guest) -> Iterator[Board]:
    yield from board(guest, Offered(0))


def offered_of(made: Board) -> list[int]:
    found = made.transport._hand_over
    assert isinstance(found, Offered)
    return found.seen


def test_the_transport_hands_over_kicks_of_ready_queues_when_the_driver_is_ready(both: Board) -> None:
    assert both.negotiate(Feature.VERSION_1)
    assert both.set_queue(1, 4, BASE, BASE + PAGE, BASE + 2 * PAGE)
    both.store(Register.QUEUE_NOTIFY, 1)
    assert offered_of(both) == []
    both.store(Register.STATUS, RUNNING)
    assert offered_of(both) == [1]
    assert [queue.kicks_in_kernel for queue in both.transport.queues] == [False, True]


def test_a_reset_keeps_kicks_handed_over_and_offers_refused_ones_again(first: Board) -> None:
    for wanted in ([0, 1], [0, 1, 1]):
        first.drive()
        assert offered_of(first) == wanted
        first.store(Register.STATUS, 0)
        assert first.transport.queues[0].kicks_in_kernel
        os.eventfd_write(first.transport.queues[0].kick, 1)  # a kick taken by the kernel, of an idle queue
    [driver, _] = first.drive()
    ask(first, driver, b"after all that")
    assert answer(first, driver) == b"AFTER ALL THAT"


def test_kicks_through_the_kernel_and_the_loop_are_served_alike_and_counted(first: Board) -> None:
    drivers = first.drive()
    for number, driver in enumerate(drivers):
        first.guest.write(DATA, b"text")
        driver.add([(DATA, 4, False), (DATA + PAGE, 64, True)])
        if number:
            first.store(Register.QUEUE_NOTIFY, number)
        else:
            os.eventfd_write(first.transport.queues[number].kick, 1)
        assert answer(first, driver) == b"TEXT"
    told = first.transport.info()["queues"]
    assert [each["kicks"] for each in told] == [1, 1]
    assert first.transport.kicks_without_exit == 1  # only of the first queue


@pytest.mark.parametrize("size", [1, 2, 8])
def test_a_kick_of_another_width_reaches_the_queue_through_the_loop(both: Board, size: int) -> None:
    assert both.negotiate(Feature.VERSION_1)
    assert both.set_queue(0, 8, BASE, BASE + PAGE, BASE + 2 * PAGE)
    driver = Driver(both.guest, Rings(8, BASE, BASE + PAGE, BASE + 2 * PAGE), TABLES)
    both.store(Register.STATUS, RUNNING)
    both.guest.write(DATA, b"odd")
    driver.add([(DATA, 3, False), (DATA + PAGE, 64, True)])
    both.store(Register.QUEUE_NOTIFY, 0, size)
    assert answer(both, driver) == b"ODD"


def test_kicks_during_a_pause_are_seen_on_resume(both: Board) -> None:
    [driver, _] = both.drive()
    both.transport.pause()
    both.guest.write(DATA, b"late")
    driver.add([(DATA, 4, False), (DATA + PAGE, 64, True)])
    for _ in range(3):
        os.eventfd_write(both.transport.queues[0].kick, 1)
    assert list(driver.used()) == []
    both.transport.resume()
    assert answer(both, driver) == b"LATE"
    eventually(lambda: both.transport.kicks_without_exit == 3)


def test_the_transport_hands_over_the_kicks_of_a_restored_device(guest: Guest, both: Board) -> None:
    both.drive()
    both.transport.pause()
    saved = both.transport.save()
    offered = Offered(0, 1)
    again = Board(guest, Toy(), hand_over=offered)
    try:
        again.transport.load(saved)
        assert Status.DRIVER_OK in again.status
        assert offered.seen == [0, 1]
    finally:
        again.close()
        both.transport.resume()


# -- what the user sees


@pytest.mark.parametrize(("kicks", "wanted"), [(0, ""), (1, "; 1 kick without"), (5, "; 5 kicks without")])
def test_the_statistics_say_how_many_kicks_made_no_exit(kicks: int, wanted: str) -> None:
    line = Counters((), 0, 0, 0, 0, kicks=kicks).line()
    assert line == f"0 exits in 0.000 s: none{wanted and wanted + ' an exit'}"
