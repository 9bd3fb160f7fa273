# SPDX-License-Identifier: Apache-2.0
"""Constants of linux/prctl.h."""

PR_SET_PDEATHSIG = 1
PR_SET_NAME = 15
PR_SET_NO_NEW_PRIVS = 38
PR_SET_PTRACER = 0x59616D61
