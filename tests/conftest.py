# SPDX-License-Identifier: Apache-2.0
"""Prepares a run of the tests: which tier runs where (see tests/labtier.py), and what signals do."""

from __future__ import annotations

import os
import signal

import pytest

from tests.labtier import Reporter, Tiers


def pytest_configure(config: pytest.Config) -> None:
    # A shell has its background jobs ignore SIGINT, and nohup SIGHUP, and programs that tests start would inherit that.
    # They do not inherit what Python handles. This process stays deaf to both, as it was started.
    for ignored in (signal.SIGINT, signal.SIGHUP):
        if signal.getsignal(ignored) is signal.SIG_IGN:
            signal.signal(ignored, lambda _number, _frame: None)
    config.pluginmanager.register(Tiers(config), "pyvmm-tiers")
    if number := os.environ.get("PYVMM_REPORTS_FD"):
        config.pluginmanager.register(Reporter(config, int(number)), "pyvmm-reporter")
