# SPDX-License-Identifier: Apache-2.0
"""Examples of what others may add to pyvmm. Each is a whole file, and a test runs it."""
