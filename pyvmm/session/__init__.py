# SPDX-License-Identifier: Apache-2.0
"""A run, and everything that watches it."""
