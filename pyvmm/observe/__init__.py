# SPDX-License-Identifier: Apache-2.0
"""What can be seen of a run: counters, page maps, timelines, and what the kernel's own tracing tells."""
