# SPDX-License-Identifier: Apache-2.0
"""Runs a pytest in a lab for another pytest, in a separate process. The other pytest has no threads or QEMU of the lab.

    labrun.py FD    stdin has one line of JSON: what to run. The end of stdin tears everything down.

Answers are appended to FD as lines of JSON: ``step`` for things that must be built first, ``title`` once the lab
is up, the reports of the lab's pytest, and ``ended`` with the reason; or ``failed`` if there is no lab.
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
    """Writes whole lines to FD, one at a time, from any thread."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._pending = b""

    def say(self, **what: object) -> None:
        os.write(self._fd, json.dumps(what).encode() + b"\n")

    def take(self, data: bytes) -> None:
        whole, newline, self._pending = (self._pending + data).rpartition(b"\n")
        os.write(self._fd, whole + newline)


def run(asked: dict[str, Any], answers: Answers) -> None:
    """Run the requested tests. Raises PyvmmError if no lab can be had."""
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
                # Its stdout carries only reports; all its other output goes to stderr.
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
    """Run, and report the result."""
    answers = Answers(int(sys.argv[1]))
    asked = json.loads(io.FileIO(0, closefd=False).readline())  # unbuffered: the thread reads the rest
    threading.Thread(target=_leave_with_stdin, daemon=True).start()
    try:
        run(asked, answers)
    except PyvmmError as error:
        answers.say(failed=str(error))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
