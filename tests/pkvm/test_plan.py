# SPDX-License-Identifier: Apache-2.0
"""A machine on this host makes exactly the ioctls of its plan, one by one."""

from __future__ import annotations

from typing import Any

import pytest

from pyvmm.devices.kinds.rng import Rng
from pyvmm.kvm.stand_in import Recording
from pyvmm.machine import Machine
from pyvmm.machine.gic import host_gic
from pyvmm.machine.plan import Plan, calls
from pyvmm.memory.choices import ConversionPolicy
from pyvmm.protection import Protection
from pyvmm.vcpu.outcome import Ending
from tests.pkvm.harness import config

pytestmark = pytest.mark.pkvm


@pytest.mark.parametrize(
    ("protection", "more"),
    [
        (Protection.NONE, {"cpus": 2}),
        (Protection.PKVM, {"cpus": 4, "devices": (Rng(), Rng())}),
        (Protection.EMULATED, {"backing": "private", "conversion": ConversionPolicy.COPY}),
    ],
    ids=lambda value: value.value if isinstance(value, Protection) else "",
)
def test_a_machine_makes_the_kvm_calls_of_its_plan(protection: Protection, more: dict[str, Any]) -> None:
    settings = config("payload:hello", protection, **more)
    with Plan(settings, gic=host_gic() or 3) as plan:
        planned = list(calls(plan.machine, plan.calls))
    recording = Recording()
    with Machine(settings, kernel=recording) as machine:
        made = tuple(recording.calls)
        assert list(calls(machine, made)) == planned
        assert machine.run().ending is Ending.POWEROFF
        # The run itself makes no more calls in Python: the native loop makes KVM_RUN and its companions.
        assert recording.calls == list(made)
