# SPDX-License-Identifier: Apache-2.0
"""A device inside the kernel (KVM_CREATE_DEVICE): its file descriptor. Made by Vm.create_device."""

from __future__ import annotations

from pyvmm.kvm.fd import AttributeFd

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pyvmm.kvm.fd import Fd
    from pyvmm.uapi.kvm import DeviceType


class KvmDevice(AttributeFd):
    """An in-kernel device, driven by attributes (Documentation/virt/kvm/devices).

    Closing it does not remove it: it stays in its VM.
    """

    kind = "device"

    def __init__(self, fd: int, owner: Fd, type: DeviceType) -> None:
        super().__init__(fd, owner)
        self.type = type
        self.label = f"{type.name.removeprefix('KVM_DEV_TYPE_')}={fd}"
