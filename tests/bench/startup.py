# SPDX-License-Identifier: Apache-2.0
"""How long ``import pyvmm`` and parsing a command line take beyond bare Python: python tests/bench/startup.py

Takes the least of many starts, so that what else the machine does is not counted. Exit status 1 above 80 ms.
"""

from __future__ import annotations

import subprocess
import sys
import time

ROUNDS = 30
LIMIT_MS = 80.0
WORDS = ["run", "--protection", "pkvm", "-m", "256M", "payload:hello"]
CASES = {
    "bare Python": "pass",
    "import pyvmm": "import pyvmm",
    "and parse a command line": f"from pyvmm.cli import make_parser; make_parser({WORDS}).parse_args({WORDS})",
}


def start_ms(code: str) -> float:
    """Return the milliseconds from starting an interpreter to its end."""
    begin = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], check=True)
    return 1e3 * (time.perf_counter() - begin)


def main() -> int:
    """Measure, print, judge."""
    best = dict.fromkeys(CASES, float("inf"))
    for _ in range(ROUNDS):
        for name, code in CASES.items():
            best[name] = min(best[name], start_ms(code))
    bare = best["bare Python"]
    for name, least in best.items():
        print(f"{name:<26}{least:8.1f} ms {least - bare:+8.1f}")
    worst = max(best.values()) - bare
    print(f"{worst:.1f} ms beyond bare Python; {LIMIT_MS:.0f} are allowed")
    return 0 if worst <= LIMIT_MS else 1


if __name__ == "__main__":
    sys.exit(main())
