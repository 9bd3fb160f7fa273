# SPDX-License-Identifier: Apache-2.0
"""What a process with a guest may ask of the kernel, as data, and how it gives up the rest."""
