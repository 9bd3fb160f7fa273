# SPDX-License-Identifier: Apache-2.0
"""What the guest talks to. Devices know offsets only: where they sit, the machine decides."""
