# SPDX-License-Identifier: Apache-2.0
"""Examples, a whole file each, and a test runs each.

``dice`` is a device, ``upper`` a virtio device. ``hole``, ``share_log`` and ``fault_latency`` are scripts to start as
``python -m``. ``lab.ipynb`` is a notebook that starts a lab.
"""
