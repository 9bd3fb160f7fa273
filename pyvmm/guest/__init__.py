# SPDX-License-Identifier: Apache-2.0
"""Guests: handles on a running payload (the puppet), and kernels and initramfs by name."""
