# SPDX-License-Identifier: Apache-2.0
"""The guest's devices. They know only offsets: the machine decides their addresses."""
