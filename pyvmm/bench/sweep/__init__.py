# SPDX-License-Identifier: Apache-2.0
"""Sweeps: many points named by a file, measured by any ``concurrent.futures.Executor``, kept as they arrive.

``plan`` reads the file, ``store`` keeps what is known, ``workers`` are where points are measured, ``run`` brings the
three together, ``export`` writes results files.
"""
