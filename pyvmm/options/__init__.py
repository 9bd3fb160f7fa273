# SPDX-License-Identifier: Apache-2.0
"""What a command line or a TOML file says about a guest."""
