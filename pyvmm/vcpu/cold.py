# SPDX-License-Identifier: Apache-2.0
"""Handle the stops of the native loop: one small function per reason, which says whether the vCPU runs on.

Called in the vCPU's own thread. A function that ends the run calls ``finish`` and lets the thread end. The machine
stops the other vCPUs.
"""

from __future__ import annotations

from pyvmm import abi
from pyvmm._native import lib
from pyvmm.errors import PyvmmError, hex_
from pyvmm.log import get_logger
from pyvmm.memory.address import Gpa
from pyvmm.memory.relay import ShareEvent, ShareRelay, ShareSource
from pyvmm.vcpu.outcome import Ending, Outcome

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import TypeAlias

    from pyvmm._native import pv_vcpu
    from pyvmm.devices.bus import Bus
    from pyvmm.devices.mailbox import Mailboxes
    from pyvmm.devices.pl011 import Pl011
    from pyvmm.kvm.vcpu import Vcpu
    from pyvmm.memory.memory import Memory

log = get_logger("vcpu")

Unclaimed: TypeAlias = "Callable[[pv_vcpu], bool]"
"""Takes the ``struct pv_vcpu`` of an access outside of all slots and devices. True if it completed the access."""

Intercept: TypeAlias = "Callable[[int, pv_vcpu], bool | None]"
"""Called first at every stop, in the vCPU's thread. True runs on, False ends the thread, None lets pyvmm decide."""

UNCLAIMED_LOGGED = 8


class ColdExits:
    """The context of one vCPU's cold exits."""

    def __init__(
        self,
        *,
        native: pv_vcpu,
        vcpu: Vcpu,
        memory: Memory,
        relay: ShareRelay,
        bus: Bus,
        uart: Pl011,
        mailboxes: Mailboxes,
        finish: Callable[[Outcome], object],
        wanted: Callable[[], bool],
        unclaimed: Unclaimed | None = None,
        intercept: Intercept | None = None,
    ) -> None:
        self.native, self.vcpu, self.memory, self.relay, self.bus = native, vcpu, memory, relay, bus
        self.uart, self.mailboxes = uart, mailboxes
        self.finish, self.wanted = finish, wanted
        self.unclaimed, self.intercept = unclaimed, intercept
        self._unclaimed_seen = 0

    def handle(self, stop: int) -> bool:
        """Handle ``stop`` (enum pv_stop). Returns True to run on."""
        if self.intercept is not None and (answer := self.intercept(stop, self.native)) is not None:
            return answer
        match stop:
            case lib.PV_STOP_MMIO:
                self.bus.answer(self.native)
                return True
            case lib.PV_STOP_MAILBOX:
                return self._mailbox()
            case lib.PV_STOP_FIFO:
                self.uart.wait_for_room(self.wanted)
                return True
            case lib.PV_STOP_SHARE:
                self._share()
                return True
            case lib.PV_STOP_CONVERT:
                self.native.share_status = self.memory.convert(Gpa(self.native.share_gpa), bool(self.native.share_op))
                return True
            case lib.PV_STOP_UNCLAIMED:
                return self._unclaimed()
            case lib.PV_STOP_SYSTEM:
                return self._system_event()
            case lib.PV_STOP_FAILED:
                from pyvmm.vcpu.failure import explain  # few runs fail

                why = explain(self.vcpu, self.native, self.memory)
                return self._end(why) if isinstance(why, Outcome) else self.handle(why)
            case lib.PV_STOP_KICK:
                return True
            case _:
                return self._end(self._unexpected(stop))

    def _end(self, outcome: Outcome) -> bool:
        self.finish(outcome)
        return False

    def _mailbox(self) -> bool:
        index = self.native.index
        trap = self.mailboxes.trap(index)
        if trap is None:
            self.mailboxes.serve(index, self.wanted)
            return True
        return self._end(Outcome(Ending.CRASH, f"the guest crashed: {trap.describe()}", index))

    def _share(self) -> None:
        native = self.native
        self.relay.deliver(
            ShareEvent(
                shared=bool(native.share_op),
                gpa=Gpa(native.share_gpa),
                npages=1,
                source=ShareSource(native.share_source),
                ns=native.left_ns,
            )
        )

    def _unclaimed(self) -> bool:
        native = self.native
        if self.unclaimed is not None and self.unclaimed(native):
            return True
        what = "store to" if native.is_write else "load from"
        if self._unclaimed_seen < UNCLAIMED_LOGGED:
            self._unclaimed_seen += 1
            log.warning(
                "unclaimed_access",
                vcpu=native.index,
                access=what,
                gpa=hex_(native.gpa),
                size=native.size,
                at=self.vcpu.place,
                last_one_told=self._unclaimed_seen == UNCLAIMED_LOGGED,
            )
        try:
            # Like a bus without a device at the address: the guest's exception vectors then report the address.
            self.vcpu.inject_abort()
        except PyvmmError as error:
            return self._end(
                Outcome(
                    Ending.CRASH,
                    f"the guest made a {native.size}-byte {what} gpa {hex_(native.gpa)}, outside of memory and devices "
                    f"({self.vcpu.place}), and no external abort can answer it: {error.message}",
                    native.index,
                )
            )
        return True

    def _system_event(self) -> bool:
        from pyvmm.uapi.kvm_run import SystemEvent  # imports all structures, which no guest needs before its end

        index, event = self.native.index, self.native.event
        match event:
            case SystemEvent.KVM_SYSTEM_EVENT_SHUTDOWN:
                # A payload stores its exit code before it powers off. Other guests store none, which reads as 0.
                if code := self.mailboxes.notes(index)[abi.NOTE_EXIT_CODE]:
                    return self._end(Outcome(Ending.UNWELL, f"the guest powered off with exit code {code}", index))
                return self._end(Outcome(Ending.POWEROFF, "the guest powered off", index))
            case SystemEvent.KVM_SYSTEM_EVENT_RESET:
                # A protected VM's memory cannot be loaded again, so a reset always ends this machine.
                return self._end(Outcome(Ending.RESET, "the guest asked for a reset", index))
            case SystemEvent.KVM_SYSTEM_EVENT_CRASH:
                return self._end(Outcome(Ending.CRASH, "the guest reported a crash to KVM", index))
            case _:
                return self._end(Outcome(Ending.FAILED, f"KVM_EXIT_SYSTEM_EVENT of unknown type {event}", index))

    def _unexpected(self, stop: int) -> Outcome:
        from pyvmm.uapi.kvm_run import ExitReason

        index, reason = self.native.index, self.native.exit_reason
        where = self.vcpu.place
        if stop == lib.PV_STOP_HYPERCALL:
            number = self.vcpu.run.hypercall.nr
            return Outcome(Ending.FAILED, f"no handler for KVM_EXIT_HYPERCALL {number:#x}", index)
        if reason == ExitReason.KVM_EXIT_ARM_NISV:
            run = self.vcpu.run.arm_nisv
            return Outcome(
                Ending.CRASH,
                f"the guest touched gpa {hex_(run.fault_ipa)} with an instruction that carries no syndrome ({where})",
                index,
                "use single ldr/str without write-back for device registers",
            )
        return Outcome(Ending.FAILED, f"KVM_RUN returned with exit reason {kvm_exit_name(reason)} ({where})", index)


def kvm_exit_name(reason: int) -> str:
    """Name an exit reason as the kernel does."""
    from pyvmm.uapi.kvm_run import ExitReason

    try:
        return ExitReason(reason).name
    except ValueError:
        return f"{reason} (unknown)"
