# SPDX-License-Identifier: Apache-2.0
"""The objects of /dev/kvm: one module for each kind of file descriptor, each a context manager.

::

    with System.open() as system, system.create_vm() as vm, vm.create_vcpu(0) as vcpu:
        ...

The creator of an object closes it. Closing one also closes the objects created from it. May import errors and uapi.
Close, and create, from one thread at a time; any thread of this process may call every other method. A forked process
may not (the kernel answers EIO).
"""
