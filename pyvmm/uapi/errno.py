# SPDX-License-Identifier: Apache-2.0
"""Error numbers of asm-generic/errno.h that Python's errno module lacks before 3.14."""

EHWPOISON = 133
