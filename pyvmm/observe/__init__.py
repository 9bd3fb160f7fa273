# SPDX-License-Identifier: Apache-2.0
"""What can be seen of a run: rates, page maps, timelines, traces, and what the hypervisor's tracing tells."""
