# SPDX-License-Identifier: Apache-2.0
"""What a host can do to a guest's page behind the VMM's back: the system calls that experiments make, through libc."""
