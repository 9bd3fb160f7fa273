"""Guests: handles on a running payload (the puppet), and kernels and initramfs by name."""
