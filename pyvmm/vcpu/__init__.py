# SPDX-License-Identifier: Apache-2.0
"""vCPUs as threads: running, pausing, kicking them, and what a cold exit means."""
