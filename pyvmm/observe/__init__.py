# SPDX-License-Identifier: Apache-2.0
"""Observe a run: rates, page maps, timelines, traces, and hypervisor tracing."""
