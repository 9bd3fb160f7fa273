# SPDX-License-Identifier: Apache-2.0
"""Run a Python program to its end. If it does not end, report where each of its threads is."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
from pathlib import Path

import pytest

PATIENCE = 120.0
"""Seconds that a program has."""
LAST = 10.0
"""Seconds that it has to tell where it stands."""


def finished(*words: str, patience: float = PATIENCE) -> subprocess.CompletedProcess[str]:
    """Run ``python WORDS…`` without input and return its status and output.

    The test fails where it has not ended after ``patience`` seconds, with what the kernel and Python say of each of its
    threads: whether it waits, and for what, or has been at work all the time.
    """
    command = [sys.executable, "-X", "faulthandler", *words]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe, text=True) as process:
        try:
            out, err = process.communicate(timeout=patience)
        except subprocess.TimeoutExpired:
            threads = _threads(process.pid)
            process.send_signal(signal.SIGABRT)  # faulthandler dumps the Python stack of every thread
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.communicate(timeout=LAST)
            process.kill()
            out, err = process.communicate()
            pytest.fail(f"{command} has not ended after {patience:g} s\n{threads}\nstdout: {out}\nstderr: {err}")
    return subprocess.CompletedProcess(command, process.returncode, out, err)


def _threads(pid: int) -> str:
    """Describe each thread: its state, its CPU time, its system call, and where in the kernel it waits."""
    lines = []
    for task in sorted(Path(f"/proc/{pid}/task").iterdir()):
        name, _, fields = (task / "stat").read_text().partition(" (")[2].rpartition(") ")
        state, user, system = (fields.split()[number] for number in (0, 11, 12))
        line = f"thread {task.name} ({name}): {state}, {user} + {system} ticks of CPU"
        for file in ("syscall", "stack"):
            with contextlib.suppress(OSError):  # only for root on some kernels
                line += f"\n  {file}: " + " ".join((task / file).read_text().split())
        lines.append(line)
    return "\n".join(lines)
