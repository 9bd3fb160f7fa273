# SPDX-License-Identifier: Apache-2.0
"""A guest under a script, and the host's side of what happens to its memory."""
