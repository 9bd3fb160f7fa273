# SPDX-License-Identifier: Apache-2.0
"""vCPUs as threads: run, pause and kick them, handle cold exits, and read their counters."""
