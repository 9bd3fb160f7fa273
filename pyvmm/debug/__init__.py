# SPDX-License-Identifier: Apache-2.0
"""Debug a guest with GDB's remote serial protocol, over KVM's guest debugging."""
