# SPDX-License-Identifier: Apache-2.0
"""A guest's counters while its vCPUs stand still: they are put back, so that to the guest no time has passed.

A Linux that finds 40 seconds gone reports soft lockups, stalls and timeouts of its devices. The counters are the whole
VM's, whichever vCPU is asked. What the guest took from outside, its wall clock, lags from then on.
"""

from __future__ import annotations

import threading

from pyvmm.errors import KvmError
from pyvmm.log import get_logger
from pyvmm.uapi.kvm_arm64 import KVM_REG_ARM_PTIMER_CNT, KVM_REG_ARM_TIMER_CNT

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Final

    from pyvmm.kvm.vcpu import Vcpu

COUNTERS: Final = (KVM_REG_ARM_TIMER_CNT, KVM_REG_ARM_PTIMER_CNT)
"""The virtual one, and the physical one as the guest sees it."""

log = get_logger("machine")


class GuestClock:
    """Stands while somebody holds it. ``vcpu`` is any of the VM's; ``goes_on`` says why it cannot stand, if so.

    Any thread may call, while no vCPU is in the guest.
    """

    def __init__(self, vcpu: Vcpu, goes_on: str | None = None) -> None:
        self.goes_on = goes_on
        self._vcpu = vcpu
        self._changing = threading.Lock()
        self._holds = 0
        self._stood: dict[int, int] = {}

    def stop(self) -> None:
        """Let the guest's time stand, once every vCPU does; nests."""
        with self._changing:
            self._holds += 1
            if self._holds == 1 and self.goes_on is None:
                try:
                    self._stood = {counter: self._vcpu.get_reg(counter) for counter in COUNTERS}
                except KvmError as error:
                    self.goes_on = error.message

    def rewind(self) -> None:
        """Have the counters say again what they said when the time began to stand; nothing where it does not."""
        with self._changing:
            self._rewind()

    def go(self) -> None:
        """Let time go on, before the first vCPU runs, when each :meth:`stop` has been answered so."""
        with self._changing:
            self._holds -= 1
            if not self._holds:
                self._rewind()
                self._stood = {}

    def _rewind(self) -> None:
        for counter, value in self._stood.items():
            try:
                self._vcpu.set_reg(counter, value)
            except KvmError as error:
                log.info("clock_goes_on", reason=error.message)
