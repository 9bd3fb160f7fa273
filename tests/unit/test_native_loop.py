# SPDX-License-Identifier: Apache-2.0
"""What the loop does when KVM_RUN fails, is kicked or ends, in a fake kernel."""

from __future__ import annotations

import errno
import itertools
import signal
import threading
from typing import TYPE_CHECKING

from tests.fake_kvm import EXIT_DEBUG, EXIT_SYSTEM, failure, load, printed, store

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.fake_kvm import Rig

DEVICE = 0x0930_0000


# ---- failures of KVM_RUN


def test_failure_without_policy_stops_and_is_decoded(rig: Rig) -> None:
    rig.script(failure(errno.EFAULT, gpa=rig.RAM + 4096), failure(errno.EFAULT), failure(errno.EIO))
    native = rig.vcpus[0].native
    assert rig.run() == "FAILED"
    assert (native.error, native.failure) == (errno.EFAULT, rig.lib.PV_FAIL_MEMORY)
    assert (native.fault_gpa, native.fault_size) == (rig.RAM + 4096, 4096)
    assert rig.run() == "FAILED"
    assert (native.failure, native.fault_gpa, native.fault_size) == (rig.lib.PV_FAIL_EFAULT, 0, 0)
    assert rig.run() == "FAILED"
    assert (native.error, native.failure) == (errno.EIO, rig.lib.PV_FAIL_OTHER)
    assert [(r.kind, r.code, r.addr) for r in rig.records()] == [
        (rig.lib.PV_REC_FAULT, errno.EFAULT, rig.RAM + 4096),
        (rig.lib.PV_REC_FAULT, errno.EFAULT, 0),
        (rig.lib.PV_REC_FAULT, errno.EIO, 0),
    ]


def test_exit_reason_of_an_older_fault_is_not_taken_for_this_ones(rig: Rig) -> None:
    rig.script(failure(errno.EFAULT, gpa=rig.RAM), {"error": errno.ENOMEM, "exit_reason": 0})
    rig.run()
    assert rig.vcpus[0].area[8] == 0
    assert rig.run() == "FAILED"
    assert (rig.vcpus[0].native.failure, rig.vcpus[0].native.fault_size) == (rig.lib.PV_FAIL_ENOMEM, 0)


def test_failures_are_retried_so_often_in_a_row_and_no_more(rig: Rig) -> None:
    rig.vm.policy[rig.lib.PV_FAIL_EAGAIN] = rig.lib.PV_ACT_RETRY
    rig.vm.retry_limit = 2
    counter = rig.new("uint64_t *")
    rig.bus((DEVICE, 8, "COUNTER", counter))
    again = failure(errno.EAGAIN)
    rig.script(again, again, store(DEVICE, 1), again, again, again)
    assert rig.run() == "FAILED"
    assert (counter[0], rig.vcpus[0].fake.next) == (1, 6)


def test_punch_policy_drops_the_page_that_was_told_and_goes_on(rig: Rig) -> None:
    rig.memory[:] = b"\x11" * len(rig.memory)
    rig.vm.policy[rig.lib.PV_FAIL_MEMORY] = rig.vm.policy[rig.lib.PV_FAIL_EFAULT] = rig.lib.PV_ACT_PUNCH
    rig.state(1, "HOST")
    rig.vm.retry_limit = 5
    rig.script(failure(errno.EFAULT, gpa=rig.RAM + 4096), failure(errno.EFAULT))
    assert rig.run() == "FAILED"
    assert rig.vcpus[0].native.failure == rig.lib.PV_FAIL_EFAULT
    assert rig.ledger[1] == rig.lib.PV_PAGE_HOLE
    assert [rig.memory[n * 4096] for n in range(4)] == [0x11, 0, 0x11, 0x11]


def test_punched_page_whose_slot_is_going_is_not_counted_as_a_hole(rig: Rig) -> None:
    rig.vm.policy[rig.lib.PV_FAIL_MEMORY], rig.vm.retry_limit = rig.lib.PV_ACT_PUNCH, 5
    rig.script(failure(errno.EFAULT, gpa=rig.RAM))
    assert rig.run() == "OTHER"
    assert (rig.ledger[0], rig.vm.pages[rig.lib.PV_PAGE_ABSENT]) == (rig.lib.PV_PAGE_ABSENT, 4)


def test_protected_guests_page_is_never_punched_under_it(make_rig: Callable[..., Rig]) -> None:
    rig = make_rig(protection="PKVM")
    rig.memory[:] = b"\x11" * len(rig.memory)
    rig.vm.policy[rig.lib.PV_FAIL_MEMORY], rig.vm.retry_limit = rig.lib.PV_ACT_PUNCH, 5
    rig.script(failure(errno.EFAULT, gpa=rig.RAM))
    assert rig.run() == "FAILED"
    assert rig.memory[0] == 0x11


def test_fault_outside_memory_cannot_be_punched(rig: Rig) -> None:
    rig.vm.policy[rig.lib.PV_FAIL_MEMORY], rig.vm.retry_limit = rig.lib.PV_ACT_PUNCH, 5
    rig.script(failure(errno.EFAULT, gpa=rig.RAM - 4096))
    assert rig.run() == "FAILED"


# ---- the rest


def test_signal_without_a_kick_is_not_seen_by_python(rig: Rig) -> None:
    rig.script(failure(errno.EINTR), failure(errno.EINTR))
    assert rig.run() == "OTHER"
    assert rig.vcpus[0].native.stats[rig.lib.PV_EXIT_INTR].count == 2


def test_kick_before_the_run_keeps_the_guest_out(rig: Rig) -> None:
    vcpu = rig.vcpus[0]
    rig.lib.pv_kick(vcpu.native)
    assert vcpu.area[1] == 1
    assert [rig.run(), rig.run()] == ["KICK", "KICK"]
    assert vcpu.fake.entered == 0
    rig.lib.pv_unkick(vcpu.native)
    assert vcpu.area[1] == 0
    assert rig.run() == "OTHER"


def test_immediate_exit_left_without_a_kick_does_not_spin(rig: Rig) -> None:
    rig.vcpus[0].area[1] = 1
    assert rig.run() == "OTHER"
    assert rig.vcpus[0].fake.entered == 2


def test_settling_takes_the_answer_to_kvm_and_no_guest_further(rig: Rig) -> None:
    exits = rig.script(load(DEVICE, 4), store(DEVICE, 2, 1))
    vcpu = rig.vcpus[0]
    assert rig.run() == "UNCLAIMED"
    rig.lib.pv_mmio_reply(vcpu.native, 0x1234)
    assert exits[0].answer == 0
    assert rig.lib.pv_settle(vcpu.native) == 0
    assert (exits[0].answer, vcpu.fake.next, vcpu.fake.entered, vcpu.area[1]) == (0x1234, 1, 2, 0)
    assert rig.run() == "UNCLAIMED"


def test_settling_leaves_an_access_undone_that_the_loop_would_carry_out_later(rig: Rig) -> None:
    uart = rig.pl011(tx=1)
    rig.bus((DEVICE, 0x1000, "PL011", uart))
    rig.script(store(DEVICE, 1, 1), store(DEVICE, 2, 1))
    assert rig.run() == "FIFO"
    assert rig.lib.pv_settle(rig.vcpus[0].native) == 0
    assert rig.vcpus[0].fake.entered == 2
    assert printed(rig, uart) == b"\1"


def test_kick_does_not_lose_what_was_left_to_do(rig: Rig) -> None:
    uart = rig.pl011(tx=1)
    rig.bus((DEVICE, 0x1000, "PL011", uart))
    rig.script(store(DEVICE, 1, 1), store(DEVICE, 2, 1))
    assert rig.run() == "FIFO"
    rig.lib.pv_kick(rig.vcpus[0].native)
    assert rig.run() == "KICK"
    rig.lib.pv_unkick(rig.vcpus[0].native)
    assert printed(rig, uart) == b"\1"
    assert rig.run() == "OTHER"
    assert printed(rig, uart) == b"\2"


def test_system_event_is_laid_open(rig: Rig) -> None:
    rig.script({"exit_reason": EXIT_SYSTEM, "nr": 2, "len": 7, "data": 50})
    assert rig.run() == "SYSTEM"
    native = rig.vcpus[0].native
    assert (native.event, native.event_count, list(native.event_data)) == (2, 4, [50, 51, 52, 53])


def test_debug_exits_and_unknown_ones_stop(rig: Rig) -> None:
    rig.script({"exit_reason": EXIT_DEBUG}, {"exit_reason": 17})
    assert [rig.run(), rig.run()] == ["DEBUG", "OTHER"]
    assert rig.vcpus[0].native.exit_reason == 17


def test_histograms_and_trace_hold_every_exit_once(rig: Rig) -> None:
    counter = rig.new("uint64_t *")
    rig.bus((DEVICE, 8, "COUNTER", counter))
    native = rig.vcpus[0].native
    native.timed = native.ring.exits = 1
    rig.script(*[store(DEVICE, 1)] * 10)
    assert rig.run() == "OTHER"
    stats = native.stats[rig.lib.PV_EXIT_MMIO_COUNTER]
    assert (stats.count, sum(stats.guest.bucket), sum(stats.vmm.bucket)) == (10, 10, 10)
    assert stats.guest_ns > 0
    records = rig.records()
    assert [(r.kind, r.code, r.addr, r.size) for r in records[:10]] == [
        (rig.lib.PV_REC_EXIT, rig.lib.PV_EXIT_MMIO_COUNTER, DEVICE, 8 | 1 << 31)
    ] * 10
    assert (records[10].code, len(records)) == (rig.lib.PV_EXIT_OTHER, 11)
    assert sum(r.value for r in records[:10]) == stats.guest_ns
    # Each begins, guest time before it, after the last one ended: a trace has slices that do not overlap.
    assert all(before.ns <= after.ns - after.value for before, after in itertools.pairwise(records))


def test_counts_are_kept_without_histograms(rig: Rig) -> None:
    rig.bus((DEVICE, 8, "COUNTER", rig.new("uint64_t *")))
    rig.script(*[store(DEVICE, 1)] * 3)
    rig.run()
    stats = rig.vcpus[0].native.stats[rig.lib.PV_EXIT_MMIO_COUNTER]
    assert (stats.count, stats.guest_ns, sum(stats.guest.bucket)) == (3, 0, 0)
    assert rig.records() == []


# ---- masks


def test_a_vcpu_is_kicked_whatever_its_thread_inherited(rig: Rig) -> None:
    rig.script()
    kick = rig.lib.pv_kick_signal()
    blocked: list[bool] = []

    def vcpu() -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, [kick])
        blocked.append(kick in signal.pthread_sigmask(signal.SIG_BLOCK, ()))
        rig.run()
        blocked.append(kick in signal.pthread_sigmask(signal.SIG_BLOCK, ()))

    thread = threading.Thread(target=vcpu)
    thread.start()
    thread.join()
    assert blocked == [True, False]
