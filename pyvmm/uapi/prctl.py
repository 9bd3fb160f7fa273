# SPDX-License-Identifier: Apache-2.0
"""Constants of linux/prctl.h."""

PR_SET_PDEATHSIG = 1
PR_SET_PTRACER = 0x59616D61
