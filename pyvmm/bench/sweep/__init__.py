# SPDX-License-Identifier: Apache-2.0
"""Sweeps: a file names many points, any ``concurrent.futures.Executor`` measures them, each result is stored at once.

``plan`` reads the file, ``store`` keeps the results, ``workers`` measure points, ``run`` connects the
three, ``export`` writes results files.
"""
