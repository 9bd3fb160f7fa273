# SPDX-License-Identifier: Apache-2.0
"""A run with all that watches it."""
