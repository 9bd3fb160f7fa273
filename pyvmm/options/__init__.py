# SPDX-License-Identifier: Apache-2.0
"""The options of a guest, on a command line or in a TOML file."""
