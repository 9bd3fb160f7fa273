# SPDX-License-Identifier: Apache-2.0
"""The loop on a real KVM: every kind of range, kicks, several vCPUs at once, and the twin on the same kernel."""

from __future__ import annotations

import os
import threading
import time
from typing import Any

import pytest

from pyvmm._native import ffi, lib
from tests import twin
from tests.real_guest import DEVICES, ENDED, SIZES, Code, RealGuest, uart

pytestmark = [
    pytest.mark.kvm,
    pytest.mark.skipif(not os.access("/dev/kvm", os.R_OK | os.W_OK), reason="no /dev/kvm that we may open"),
]

REGISTERS, COUNTER, DOORBELL, UART, COLD, NOBODY = range(0, 0x6000, 0x1000)


def read_tx(made: Any) -> bytes:
    room = ffi.new("uint8_t[]", 64)
    return bytes(room)[:0] if not (n := lib.pv_fifo_read(ffi.addressof(made, "tx"), room, 64)) else bytes(room)[:n]


def test_guest_reads_back_what_it_stored_in_registers() -> None:
    code = Code()
    for size in SIZES:
        code.store(REGISTERS + 16 * size, 0x7877_6655_4433_2211, size)
        code.load(REGISTERS + 16 * size, size).store(REGISTERS + 16 * size + 8, None, size)
    with RealGuest(code.end()) as guest:
        state = ffi.new("uint8_t[]", 0x1000)
        (entry,) = guest.bus((REGISTERS, 0x1000, lib.PV_KIND_REGISTERS, state))
        assert lib.pv_run(guest.vcpus[0]) == ENDED
        for size in SIZES:
            expected = 0x7877_6655_4433_2211.to_bytes(8, "little")[:size]
            assert bytes(ffi.buffer(state + 16 * size, size)) == expected
            assert bytes(ffi.buffer(state + 16 * size + 8, size)) == expected
        assert (entry.reads, entry.writes) == (len(SIZES), 2 * len(SIZES))


def test_the_loop_handles_counter_doorbell_and_uart_without_python() -> None:
    code = Code().repeat(100, Code().store(COUNTER, 3)).load(COUNTER).store(REGISTERS)
    code.store(DOORBELL, 1).store(DOORBELL, 2).store(DOORBELL, 2)
    for byte in b"hello":
        code.store(UART, byte, 1)
    with RealGuest(code.end()) as guest:
        fd = os.eventfd(0, os.EFD_NONBLOCK)
        slots = ffi.new("struct pv_doorbell_slot[]", [(0, 2, fd, 0)])
        bell = ffi.new("struct pv_doorbell *", {"count": 1, "slots": slots})
        counter, registers, (made, keep) = ffi.new("uint64_t *"), ffi.new("uint32_t *"), uart()
        guest.bus(
            (REGISTERS, 4, lib.PV_KIND_REGISTERS, registers),
            (COUNTER, 8, lib.PV_KIND_COUNTER, counter),
            (DOORBELL, 8, lib.PV_KIND_DOORBELL, bell),
            (UART, 0x1000, lib.PV_KIND_PL011, made),
        )
        assert lib.pv_run(guest.vcpus[0]) == ENDED
        assert (counter[0], registers[0], os.eventfd_read(fd), bell.missed) == (300, 300, 2, 1)
        assert read_tx(made) == b"hello"
        assert keep
        stats = guest.vcpus[0].stats
        assert [stats[n].count for n in (lib.PV_EXIT_MMIO_COUNTER, lib.PV_EXIT_MMIO_DOORBELL)] == [101, 3]
        os.close(fd)


def test_full_uart_makes_the_guest_wait_and_loses_nothing() -> None:
    text = bytes(range(65, 91))
    code = Code()
    for byte in text:
        code.store(UART, byte, 1)
    with RealGuest(code.end()) as guest:
        made, keep = uart(tx=4)
        guest.bus((UART, 0x1000, lib.PV_KIND_PL011, made))
        got = b""
        while (stop := lib.pv_run(guest.vcpus[0])) == lib.PV_STOP_FIFO:
            got += read_tx(made)
        assert stop == ENDED
        assert got + read_tx(made) == text
        assert keep


@pytest.mark.parametrize("size", SIZES)
def test_python_answers_cold_loads_and_unclaimed_loads(size: int) -> None:
    answer = 0x7122_3344_5566_7788
    code = Code().load(COLD + 8, size).store(REGISTERS, None, size).load(NOBODY, size).store(REGISTERS + 8, None, size)
    with RealGuest(code.end()) as guest:
        state = ffi.new("uint8_t[]", 16)
        guest.bus((REGISTERS, 16, lib.PV_KIND_REGISTERS, state), (COLD, 0x1000, lib.PV_KIND_COLD, None))
        vcpu = guest.vcpus[0]
        assert lib.pv_run(vcpu) == lib.PV_STOP_MMIO
        assert (vcpu.offset, vcpu.size, vcpu.is_write) == (8, size, 0)
        lib.pv_mmio_reply(vcpu, answer)
        assert lib.pv_run(vcpu) == lib.PV_STOP_UNCLAIMED
        assert vcpu.gpa == DEVICES + NOBODY
        lib.pv_mmio_reply(vcpu, ~answer & 2**64 - 1)
        assert lib.pv_run(vcpu) == ENDED
        expected = answer.to_bytes(8, "little")[:size]
        assert bytes(state)[:size] == expected
        assert bytes(state)[8 : 8 + size] == bytes(byte ^ 0xFF for byte in expected)


def test_kick_before_the_first_entry_keeps_the_guest_out() -> None:
    with RealGuest(Code().store(COUNTER, 1).end()) as guest:
        counter, vcpu = ffi.new("uint64_t *"), guest.vcpus[0]
        guest.bus((COUNTER, 8, lib.PV_KIND_COUNTER, counter))
        lib.pv_kick(vcpu)
        assert [lib.pv_run(vcpu), lib.pv_run(vcpu)] == [lib.PV_STOP_KICK] * 2
        assert counter[0] == 0
        lib.pv_unkick(vcpu)
        assert lib.pv_run(vcpu) == ENDED
        assert counter[0] == 1


def test_no_kick_is_lost_at_any_time() -> None:
    with RealGuest(Code().forever().bytes) as guest:
        vcpu, kicks, seen, waiting = guest.vcpus[0], 300, 0, threading.Semaphore(0)

        def kicker() -> None:
            for n in range(kicks):
                for _ in range(n % 7 * 20):
                    pass
                if n % 3 == 0:
                    time.sleep(0.0002)
                lib.pv_kick(vcpu)
                # A lost kick leaves the guest looping: then this times out and the count below is too small.
                if not waiting.acquire(timeout=20):
                    return

        thread = threading.Thread(target=kicker)
        rescue = threading.Timer(60, lambda: lib.pv_kick(vcpu))
        thread.start()
        rescue.start()
        while seen < kicks and rescue.is_alive():
            assert lib.pv_run(vcpu) == lib.PV_STOP_KICK
            lib.pv_unkick(vcpu)
            seen += 1
            waiting.release()
        rescue.cancel()
        thread.join()
        assert seen == kicks


def test_many_kicks_do_not_lose_the_guests_work() -> None:
    with RealGuest(Code().repeat(3000, Code().store(COUNTER, 1)).end()) as guest:
        counter, vcpu, over = ffi.new("uint64_t *"), guest.vcpus[0], threading.Event()
        guest.bus((COUNTER, 8, lib.PV_KIND_COUNTER, counter))

        def storm() -> None:
            while not over.is_set():
                for _ in range(5):
                    lib.pv_kick(vcpu)
                time.sleep(0.0001)  # the guest must make progress in between

        thread = threading.Thread(target=storm)
        thread.start()
        kicked = 0
        while (stop := lib.pv_run(vcpu)) == lib.PV_STOP_KICK:
            kicked += 1
            lib.pv_unkick(vcpu)
        over.set()
        thread.join()
        assert stop == ENDED
        assert counter[0] == 3000
        assert kicked > 0


def test_vcpus_run_at_once_on_one_bus() -> None:
    count, rounds = 4, 500
    code = Code().repeat(rounds, Code().store(COUNTER, 1).store(UART, 46, 1)).end()
    with RealGuest(*[code] * count) as guest:
        counter, (made, keep) = ffi.new("uint64_t *"), uart(tx=16)
        ranges = guest.bus((COUNTER, 8, lib.PV_KIND_COUNTER, counter), (UART, 0x1000, lib.PV_KIND_PL011, made))
        stops: list[int] = []
        got: list[bytes] = []
        draining = threading.Lock()  # a FIFO has one consumer

        def run(vcpu: Any) -> None:
            while (stop := lib.pv_run(vcpu)) == lib.PV_STOP_FIFO:
                with draining:
                    got.append(read_tx(made))
            stops.append(stop)

        threads = [threading.Thread(target=run, args=(vcpu,)) for vcpu in guest.vcpus]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        got.append(read_tx(made))
        assert stops == [ENDED] * count
        assert counter[0] == count * rounds
        assert len(b"".join(got)) == count * rounds
        assert [r.writes for r in ranges] == [count * rounds] * 2
        assert [v.stats[lib.PV_EXIT_MMIO_COUNTER].count for v in guest.vcpus] == [rounds] * count
        assert keep


def test_histograms_hold_every_exit_and_a_plausible_time() -> None:
    with RealGuest(Code().repeat(500, Code().store(COUNTER, 1)).end()) as guest:
        guest.bus((COUNTER, 8, lib.PV_KIND_COUNTER, ffi.new("uint64_t *")))
        vcpu = guest.vcpus[0]
        vcpu.timed = 1
        began = time.monotonic_ns()
        assert lib.pv_run(vcpu) == ENDED
        took = time.monotonic_ns() - began
        stats = vcpu.stats[lib.PV_EXIT_MMIO_COUNTER]
        assert (stats.count, sum(stats.guest.bucket), sum(stats.vmm.bucket)) == (500, 500, 500)
        assert 0 < stats.vmm_ns < took
        assert 0 < stats.guest_ns < took


class KvmKernel:
    """The twin's kernel: a real one, entered from Python."""

    def __init__(self, guest: RealGuest) -> None:
        self.guest = guest
        self.rung: list[int] = []

    def enter(self) -> int:
        return self.guest.enter(0)

    def signal(self, fd: int) -> None:
        self.rung.append(fd)

    def irq_line(self, irq: int, level: bool) -> None:
        raise AssertionError(f"line {irq} set to {level}: this guest's UART has none")

    def get_x(self, n: int) -> int:
        return self.guest.kvm_vcpus[0].get_reg(twin_core_x(n))

    def set_x(self, n: int, value: int) -> None:
        self.guest.kvm_vcpus[0].set_reg(twin_core_x(n), value)

    def protect(self, gpa: int, open_: bool) -> bool:
        raise AssertionError((gpa, open_))

    def drop(self, gpa: int, conversion: int) -> bool:
        raise AssertionError((gpa, conversion))

    def probe(self, gpa: int) -> bool:
        raise AssertionError(gpa)


def twin_core_x(n: int) -> int:
    return 0x6030_0000_0010_0000 + 2 * n


def test_twin_behaves_the_same_on_the_same_kernel() -> None:
    code = Code().repeat(5, Code().store(COUNTER, 7)).load(COUNTER).store(REGISTERS).store(DOORBELL, 9)
    for byte in b"twin":
        code.store(UART, byte, 1)
    with RealGuest(code.load(COLD).store(REGISTERS + 4).end()) as guest:
        vm = twin.Vm(lib.PV_NONE)
        registers, counter, made = bytearray(8), twin.Counter(), twin.Pl011(16, 16)
        vm.ranges = [
            twin.Range(DEVICES + REGISTERS, 8, lib.PV_KIND_REGISTERS, registers),
            twin.Range(DEVICES + COUNTER, 8, lib.PV_KIND_COUNTER, counter),
            twin.Range(DEVICES + DOORBELL, 8, lib.PV_KIND_DOORBELL, twin.Doorbell([(0, 9, 33)])),
            twin.Range(DEVICES + UART, 0x1000, lib.PV_KIND_PL011, made),
            twin.Range(DEVICES + COLD, 0x1000, lib.PV_KIND_COLD),
        ]
        kernel = KvmKernel(guest)
        vcpu = twin.Vcpu(vm, 0, guest.area(0), kernel)
        assert vcpu.run() == lib.PV_STOP_MMIO
        vcpu.reply(0x1234)
        assert vcpu.run() == ENDED
        assert (counter.value, int.from_bytes(registers, "little")) == (35, 0x1234 << 32 | 35)
        assert (kernel.rung, bytes(made.tx)) == ([33], b"twin")
        assert vcpu.counts[lib.PV_EXIT_MMIO_COUNTER] == 6
