# SPDX-License-Identifier: Apache-2.0
"""The atlas: what the kernel really does with guest memory, claim by claim, each one an experiment on this host."""
