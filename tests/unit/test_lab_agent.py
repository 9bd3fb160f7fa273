# SPDX-License-Identifier: Apache-2.0
"""The lab's agent: the calls that it makes before pyvmm's tree is there."""

from __future__ import annotations

import errno
import os
import struct
import termios

import pytest

from pyvmm.lab import agent


def test_an_ioctl_hands_its_argument_to_the_kernel() -> None:
    ours, theirs = os.openpty()
    try:
        agent.ioctl(ours, termios.TIOCSWINSZ, struct.pack("4H", 33, 77, 0, 0))
        assert termios.tcgetwinsize(theirs) == (33, 77)
    finally:
        os.close(ours)
        os.close(theirs)


def test_a_refused_ioctl_raises_the_kernels_error() -> None:
    with open("/dev/null", "rb") as file, pytest.raises(OSError, match=os.strerror(errno.ENOTTY)):
        agent.ioctl(file.fileno(), agent.RNDRESEEDCRNG)
