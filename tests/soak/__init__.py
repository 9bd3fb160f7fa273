# SPDX-License-Identifier: Apache-2.0
"""Many runs of all kinds of guests, each ended in another way. Then the host is asked what is left of them.

    python -m tests.soak                      1000 runs and 50 kills, in a lab
    python -m tests.soak --runs 100 --kills 0
    python -m tests.soak --seed 7 --only 41   the run 41 of that seed again
    python -m tests.soak --here               on this host, which must run protected guests

The status is 0 if each run ended as it must, and nothing is left.
"""
