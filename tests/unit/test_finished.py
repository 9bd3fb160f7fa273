# SPDX-License-Identifier: Apache-2.0
"""The runner of programs in tests: how one ended, and where one stood that did not end."""

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


def test_a_program_that_ends_is_told_as_it_ended() -> None:
    done = finished("-c", "import sys; print('out'); print('err', file=sys.stderr); sys.exit(3)")
    assert (done.returncode, done.stdout, done.stderr) == (3, "out\n", "err\n")


def test_one_that_does_not_end_tells_where_every_thread_stands() -> None:
    with pytest.raises(pytest.fail.Exception) as caught:
        finished("-c", STUCK, patience=3)
    said = str(caught.value)
    assert "has not ended after 3 s" in said
    assert said.count("): S, ") == 2
    assert "stdout: begun" in said
    assert "in waits_for_nobody" in said
