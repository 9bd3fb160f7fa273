# SPDX-License-Identifier: Apache-2.0
"""virtio 1.2 devices: what each kind does, the queues they are asked through, and the transport the guest sees."""
