# SPDX-License-Identifier: Apache-2.0
"""vCPUs as threads: running, pausing, kicking them, what a cold exit means, and what was counted."""
