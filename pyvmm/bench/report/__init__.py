# SPDX-License-Identifier: Apache-2.0
"""Reports of a benchmark's results: pure functions from a run to text, HTML, and figures."""
