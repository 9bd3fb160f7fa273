# SPDX-License-Identifier: Apache-2.0
"""The objects behind /dev/kvm, one module for each kind of file descriptor, each a context manager.

::

    with System.open() as system, system.create_vm() as vm, vm.create_vcpu(0) as vcpu:
        ...

Whoever creates an object closes it; closing one also closes what was created from it. May import errors and uapi.
Close, and create, from one thread at a time; every other method may be called from any thread of this process, but
not from a fork of it (the kernel answers EIO).
"""
