# SPDX-License-Identifier: Apache-2.0
"""A debugger's way into a guest: GDB's remote serial protocol, over KVM's guest debugging."""
