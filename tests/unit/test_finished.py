# SPDX-License-Identifier: Apache-2.0
"""The runner of programs in tests: it reports how a program ended, or where it hung."""

from __future__ import annotations

import pytest

from tests.finished import finished

STUCK = """
import threading

def waits_for_nobody():
    threading.Event().wait()

print("begun", flush=True)
threading.Thread(target=waits_for_nobody).start()
"""


def test_the_runner_returns_how_a_program_ended() -> None:
    done = finished("-c", "import sys; print('out'); print('err', file=sys.stderr); sys.exit(3)")
    assert (done.returncode, done.stdout, done.stderr) == (3, "out\n", "err\n")


def test_the_runner_reports_where_every_thread_of_a_hung_program_is() -> None:
    with pytest.raises(pytest.fail.Exception) as caught:
        finished("-c", STUCK, patience=3)
    said = str(caught.value)
    assert "has not ended after 3 s" in said
    assert said.count("): S, ") == 2
    assert "stdout: begun" in said
    assert "in waits_for_nobody" in said
