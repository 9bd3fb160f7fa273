"""``python -m tests.fuzz TARGET SECONDS``: fuzz, and keep in the corpus what was found, or what failed."""

from __future__ import annotations

import secrets
import sys

from tests.fuzz.fuzzer import TARGETS, Failed, add, run


def main(target: str, seconds: str) -> int:
    seed = secrets.randbits(32)
    try:
        print(f"{target}, seed {seed}: {run(target, float(seconds), seed, keep=True)}")
    except Failed as error:
        add(target, error.input)
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    if len(sys.argv) != 3 or sys.argv[1] not in TARGETS:
        sys.exit(f"usage: python -m tests.fuzz {{{','.join(TARGETS)}}} SECONDS")
    sys.exit(main(*sys.argv[1:]))
