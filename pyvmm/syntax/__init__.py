# SPDX-License-Identifier: Apache-2.0
"""How an option is declared, and what its text means; below everything that has options to declare."""
