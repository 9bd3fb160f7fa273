# SPDX-License-Identifier: Apache-2.0
"""The kernel's user interface as data: structures, ioctl numbers and constants, one module a kernel header.

Names are the kernel's. Nothing here opens, calls or allocates, and nothing outside pyvmm is imported but ctypes and
enum; anyone may import it. tests/abi compares every number with the real headers, for arm64 and x86.
"""
