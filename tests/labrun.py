# SPDX-License-Identifier: Apache-2.0
"""Runs a pytest in a lab for another one, in a process of its own: that one has neither threads nor a QEMU of it.

    labrun.py FD    what to run is one line of JSON on stdin, at whose end everything is torn down

What comes back is appended to FD, a line of JSON each: ``step`` of what has to be built first, ``title`` once the lab
is there, the reports of the lab's pytest as they come, and ``ended`` with the reason; or ``failed``: there is no lab.
"""

from __future__ import annotations

import io
import json
import os
import sys
import threading
from typing import Any

from pyvmm.errors import PyvmmError


class Answers:
    """Where the lines go; a line at a time, however they come."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._pending = b""

    def say(self, **what: object) -> None:
        os.write(self._fd, json.dumps(what).encode() + b"\n")

    def take(self, data: bytes) -> None:
        whole, newline, self._pending = (self._pending + data).rpartition(b"\n")
        os.write(self._fd, whole + newline)


def run(asked: dict[str, Any], answers: Answers) -> None:
    """Do what is asked. Raises PyvmmError where no lab can be had."""
    from pyvmm.lab import Lab, build_image
    from pyvmm.lab.ownkernel import build_kernels
    from pyvmm.lab.peers import prepare

    def progress(what: str, _share: float) -> None:
        answers.say(step=what)

    image = build_image(progress=progress)
    if os.environ.get("CI"):
        build_kernels(progress=progress)
    shown = prepare(asked["shown"], progress=progress)
    said = bytearray()
    lab = Lab(image=image, arguments=shown.paths)
    try:
        with lab:
            answers.say(title=f"{image.manifest.release} under QEMU")
            status = lab.run(
                # Reports are what its stdout carries; everything else it says goes to stderr.
                ["/bin/sh", "-c", 'exec "$@" 3>&1 1>&2', "sh", *asked["command"]],
                stdout=answers.take,
                stderr=said.extend,
                env={"PYVMM_REPORTS_FD": "3", "COLUMNS": "120", **shown.environment, **asked["environment"]},
            )
        answers.say(ended=f"the lab's pytest ended with status {status} before this test; it said:\n{_last(said)}")
    except PyvmmError as error:
        answers.say(ended=str(error))


def _last(said: bytearray) -> str:
    return bytes(said[-3000:]).decode(errors="replace")


def _leave_with_stdin() -> None:
    while os.read(0, 1 << 16):
        pass
    os._exit(1)  # QEMU is told to end with the thread that started it


def main() -> int:
    """Run, and say what came of it."""
    answers = Answers(int(sys.argv[1]))
    asked = json.loads(io.FileIO(0, closefd=False).readline())  # unbuffered: the rest is the thread's
    threading.Thread(target=_leave_with_stdin, daemon=True).start()
    try:
        run(asked, answers)
    except PyvmmError as error:
        answers.say(failed=str(error))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
