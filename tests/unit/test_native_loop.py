# SPDX-License-Identifier: Apache-2.0
"""How the loop handles failures, kicks and ends of KVM_RUN, in a fake kernel."""

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


def test_a_failure_without_policy_stops_the_loop_and_is_decoded(rig: Rig) -> None:
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


def test_the_exit_reason_of_an_older_fault_is_not_taken_for_the_current_one(rig: Rig) -> None:
    rig.script(failure(errno.EFAULT, gpa=rig.RAM), {"error": errno.ENOMEM, "exit_reason": 0})
    rig.run()
    assert rig.vcpus[0].area[8] == 0
    assert rig.run() == "FAILED"
    assert (rig.vcpus[0].native.failure, rig.vcpus[0].native.fault_size) == (rig.lib.PV_FAIL_ENOMEM, 0)


def test_failures_in_a_row_are_retried_up_to_the_limit(rig: Rig) -> None:
    rig.vm.policy[rig.lib.PV_FAIL_EAGAIN] = rig.lib.PV_ACT_RETRY
    rig.vm.retry_limit = 2
    counter = rig.new("uint64_t *")
    rig.bus((DEVICE, 8, "COUNTER", counter))
    again = failure(errno.EAGAIN)
    rig.script(again, again, store(DEVICE, 1), again, again, again)
    assert rig.run() == "FAILED"
    assert (counter[0], rig.vcpus[0].fake.next) == (1, 6)


def test_the_punch_policy_drops_the_reported_page_and_continues(rig: Rig) -> None:
    rig.memory[:] = b"\x11" * len(rig.memory)
    rig.vm.policy[rig.lib.PV_FAIL_MEMORY] = rig.vm.policy[rig.lib.PV_FAIL_EFAULT] = rig.lib.PV_ACT_PUNCH
    rig.state(1, "HOST")
    rig.vm.retry_limit = 5
    rig.script(failure(errno.EFAULT, gpa=rig.RAM + 4096), failure(errno.EFAULT))
    assert rig.run() == "FAILED"
    assert rig.vcpus[0].native.failure == rig.lib.PV_FAIL_EFAULT
    assert rig.ledger[1] == rig.lib.PV_PAGE_HOLE
    assert [rig.memory[n * 4096] for n in range(4)] == [0x11, 0, 0x11, 0x11]


def test_a_punched_page_of_a_slot_being_removed_is_not_counted_as_a_hole(rig: Rig) -> None:
    rig.vm.policy[rig.lib.PV_FAIL_MEMORY], rig.vm.retry_limit = rig.lib.PV_ACT_PUNCH, 5
    rig.script(failure(errno.EFAULT, gpa=rig.RAM))
    assert rig.run() == "OTHER"
    assert (rig.ledger[0], rig.vm.pages[rig.lib.PV_PAGE_ABSENT]) == (rig.lib.PV_PAGE_ABSENT, 4)


def test_a_page_of_a_protected_guest_is_never_punched(make_rig: Callable[..., Rig]) -> None:
    rig = make_rig(protection="PKVM")
    rig.memory[:] = b"\x11" * len(rig.memory)
    rig.vm.policy[rig.lib.PV_FAIL_MEMORY], rig.vm.retry_limit = rig.lib.PV_ACT_PUNCH, 5
    rig.script(failure(errno.EFAULT, gpa=rig.RAM))
    assert rig.run() == "FAILED"
    assert rig.memory[0] == 0x11


def test_a_fault_outside_memory_cannot_be_punched(rig: Rig) -> None:
    rig.vm.policy[rig.lib.PV_FAIL_MEMORY], rig.vm.retry_limit = rig.lib.PV_ACT_PUNCH, 5
    rig.script(failure(errno.EFAULT, gpa=rig.RAM - 4096))
    assert rig.run() == "FAILED"


# ---- the rest


def test_a_signal_without_a_kick_does_not_reach_python(rig: Rig) -> None:
    rig.script(failure(errno.EINTR), failure(errno.EINTR))
    assert rig.run() == "OTHER"
    assert rig.vcpus[0].native.stats[rig.lib.PV_EXIT_INTR].count == 2


def test_a_kick_before_the_run_keeps_the_vcpu_out_of_the_guest(rig: Rig) -> None:
    vcpu = rig.vcpus[0]
    rig.lib.pv_kick(vcpu.native)
    assert vcpu.area[1] == 1
    assert [rig.run(), rig.run()] == ["KICK", "KICK"]
    assert vcpu.fake.entered == 0
    rig.lib.pv_unkick(vcpu.native)
    assert vcpu.area[1] == 0
    assert rig.run() == "OTHER"


def test_immediate_exit_left_set_without_a_kick_does_not_spin(rig: Rig) -> None:
    rig.vcpus[0].area[1] = 1
    assert rig.run() == "OTHER"
    assert rig.vcpus[0].fake.entered == 2


def test_settling_completes_the_access_in_kvm_without_running_the_guest(rig: Rig) -> None:
    exits = rig.script(load(DEVICE, 4), store(DEVICE, 2, 1))
    vcpu = rig.vcpus[0]
    assert rig.run() == "UNCLAIMED"
    rig.lib.pv_mmio_reply(vcpu.native, 0x1234)
    assert exits[0].answer == 0
    assert rig.lib.pv_settle(vcpu.native) == 0
    assert (exits[0].answer, vcpu.fake.next, vcpu.fake.entered, vcpu.area[1]) == (0x1234, 1, 2, 0)
    assert rig.run() == "UNCLAIMED"


def test_settling_leaves_an_access_that_the_loop_will_perform_later(rig: Rig) -> None:
    uart = rig.pl011(tx=1)
    rig.bus((DEVICE, 0x1000, "PL011", uart))
    rig.script(store(DEVICE, 1, 1), store(DEVICE, 2, 1))
    assert rig.run() == "FIFO"
    assert rig.lib.pv_settle(rig.vcpus[0].native) == 0
    assert rig.vcpus[0].fake.entered == 2
    assert printed(rig, uart) == b"\1"


def test_a_kick_does_not_lose_pending_work(rig: Rig) -> None:
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


def test_the_stop_has_the_fields_of_a_system_event(rig: Rig) -> None:
    rig.script({"exit_reason": EXIT_SYSTEM, "nr": 2, "len": 7, "data": 50})
    assert rig.run() == "SYSTEM"
    native = rig.vcpus[0].native
    assert (native.event, native.event_count, list(native.event_data)) == (2, 4, [50, 51, 52, 53])


def test_debug_exits_and_unknown_exits_stop_the_loop(rig: Rig) -> None:
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
    # Each exit, with the guest time before it, begins after the last one ended: slices of a trace do not overlap.
    assert all(before.ns <= after.ns - after.value for before, after in itertools.pairwise(records))


def test_exits_are_counted_without_histograms(rig: Rig) -> None:
    rig.bus((DEVICE, 8, "COUNTER", rig.new("uint64_t *")))
    rig.script(*[store(DEVICE, 1)] * 3)
    rig.run()
    stats = rig.vcpus[0].native.stats[rig.lib.PV_EXIT_MMIO_COUNTER]
    assert (stats.count, stats.guest_ns, sum(stats.guest.bucket)) == (3, 0, 0)
    assert rig.records() == []


# ---- signal masks


def test_a_vcpu_can_be_kicked_whatever_signal_mask_its_thread_inherited(rig: Rig) -> None:
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
