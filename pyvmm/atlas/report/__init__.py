# SPDX-License-Identifier: Apache-2.0
"""What shows an atlas: pure functions from its data to text, HTML, JUnit XML, and the difference of two."""
