# SPDX-License-Identifier: Apache-2.0
"""What every report shares: text made harmless, words, style."""
