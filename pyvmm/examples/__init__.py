# SPDX-License-Identifier: Apache-2.0
"""Examples, a whole file each, and a test runs each: a device (``dice``) and scripts to start as ``python -m``."""
