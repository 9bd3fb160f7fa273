# SPDX-License-Identifier: Apache-2.0
"""Where each tier of tests runs: see tests/labtier.py."""

from __future__ import annotations

import os

import pytest

from tests.labtier import Reporter, Tiers


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Tiers(config), "pyvmm-tiers")
    if number := os.environ.get("PYVMM_REPORTS_FD"):
        config.pluginmanager.register(Reporter(config, int(number)), "pyvmm-reporter")
