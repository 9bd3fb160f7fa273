# SPDX-License-Identifier: Apache-2.0
"""The atlas: test claims about the kernel and guest memory, each by an experiment on this host."""
