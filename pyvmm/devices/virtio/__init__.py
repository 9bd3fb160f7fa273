# SPDX-License-Identifier: Apache-2.0
"""virtio 1.2 devices: each kind of device, their queues, and the transport."""
