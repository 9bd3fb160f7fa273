# SPDX-License-Identifier: Apache-2.0
"""Declare options and parse their values. Every package that declares options imports this one."""
