# SPDX-License-Identifier: Apache-2.0
"""Accesses of a host to guest pages without the VMM: the system calls of experiments, through libc."""
