# SPDX-License-Identifier: Apache-2.0
"""Guests: handles of a running payload (the puppet), and named kernels and initramfs."""
