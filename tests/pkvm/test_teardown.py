# SPDX-License-Identifier: Apache-2.0
"""After a protected guest its private pages are zeros, its shared ones unchanged, and nothing stays locked."""

from __future__ import annotations

import pytest

from pyvmm.guest.puppet import Puppet
from pyvmm.machine import Machine
from pyvmm.protection import Protection
from tests.pkvm.harness import Footprint, config

pytestmark = pytest.mark.pkvm
FIRST = 0x8080_0000
PAGE = 4096


def test_the_host_gets_private_pages_back_as_zeros_and_shared_ones_unchanged() -> None:
    before = Footprint.now()
    with Machine(config("payload:puppet", Protection.PKVM)) as machine:
        memory = machine.memory
        loaded, untouched, own, returned, shared, written = (FIRST + PAGE * n for n in range(6))
        many = range(FIRST + 64 * PAGE, FIRST + 128 * PAGE, PAGE)
        for gpa in (loaded, untouched):
            memory.write(gpa, b"from the host")
        machine.start()
        guest = Puppet(machine.mailboxes)
        guest.write64(loaded + 2048, 1)
        for gpa in (own, returned, shared, written, *many):
            guest.write64(gpa, 0x5EC_2E7)
        for gpa in (returned, shared, written):
            guest.share(gpa)
        memory.write(written + 8, b"through the share")
        guest.unshare(returned)
        guest.unshare(written)
        assert Footprint.now().locked_kib >= 4 * (len(many) + 5)
        guest.off()
        machine.wait(10)
        machine.close_vm()
        for gpa in (loaded, own, returned, written, *many):
            assert memory.read(gpa, PAGE) == bytes(PAGE), hex(gpa)
        assert memory.read(untouched, 13) == b"from the host"
        assert memory.read(shared, 8) == (0x5EC_2E7).to_bytes(8, "little")
    assert Footprint.now() == before


def test_a_machine_can_be_closed_after_every_step_and_twice() -> None:
    before = Footprint.now()
    machine = Machine(config("payload:puppet", Protection.PKVM, cpus=2))
    machine.close()
    with Machine(config("payload:puppet", Protection.PKVM, cpus=2)) as built:
        built.close()
        built.close()
        built.stop("too late")
    with Machine(config("payload:puppet", Protection.PKVM, cpus=2)) as started:
        started.start()
        started.close()
        started.close()
    assert Footprint.now() == before
