# SPDX-License-Identifier: Apache-2.0
"""Measures what a fault, an exit, a share and a conversion cost: cases, clocks, statistics, reports, sweeps."""
