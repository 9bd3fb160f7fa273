# SPDX-License-Identifier: Apache-2.0
"""``python -m tests.fuzz TARGET SECONDS``: fuzz, and keep new or failing inputs in the corpus.

``python -m tests.fuzz TARGET FILE`` tries the inputs of a file, such as one that a failure left.
"""

from __future__ import annotations

import secrets
import sys
from pathlib import Path

from tests.fuzz import TARGETS
from tests.fuzz.fuzzer import Failed, corpus, packed


def main(target: str, what: str) -> int:
    run = TARGETS[target]
    seed = secrets.randbits(32)
    try:
        if Path(what).exists():
            print(f"{target}: {run(target, Path(what), 0, seed)}")
        else:
            print(f"{target}, seed {seed}: {run(target, corpus(target), float(what), seed, corpus(target))}")
    except Failed as error:
        if not Path(what).exists():
            with corpus(target).open("ab") as file:
                file.write(packed(error.input))
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    if len(sys.argv) != 3 or sys.argv[1] not in TARGETS:
        sys.exit(f"usage: python -m tests.fuzz {{{','.join(TARGETS)}}} SECONDS|FILE")
    sys.exit(main(*sys.argv[1:]))
