#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# The lab's pyvmm: that of the workstation, which PYTHONPATH leads to.
exec python3 -P -m pyvmm "$@"
