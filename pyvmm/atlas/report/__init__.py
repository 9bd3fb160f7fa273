# SPDX-License-Identifier: Apache-2.0
"""Reports of an atlas: pure functions that convert its data to text, HTML, JUnit XML, or a diff of two."""
