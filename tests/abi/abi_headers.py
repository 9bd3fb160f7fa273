# SPDX-License-Identifier: Apache-2.0
"""The kernel's headers from the newest linux-libc-dev of Debian (trixie-backports), for both architectures.

The lab's apt wrapper fetches them, without privileges. They are kept unpacked in the user's cache by version, and
checked again after a day. Offline, the newest version in the cache is used.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import time
from functools import lru_cache
from pathlib import Path

from pyvmm.lab.apt import CANONICAL_MIRROR, Apt, AptError, machine_mirror
from pyvmm.lab.cache import Cache, cache_directory
from pyvmm.lab.kernels import BACKPORTS

DAY = 86400.0


class NoHeaders(Exception):
    """No headers are available: there is no network and nothing cached, or no apt."""


@lru_cache
def root() -> Path:
    """Return the directory that the package is unpacked in. Raises :class:`NoHeaders` if it cannot be had."""
    store = cache_directory().parent / "uapi"
    kept = max(store.glob("*/usr/include"), key=_confirmed, default=None)
    if kept and time.time() - _confirmed(kept) < DAY:
        return kept.parents[1]
    failure: Exception | None = None
    for mirror in dict.fromkeys((machine_mirror(), CANONICAL_MIRROR)):
        try:
            return _newest(store, mirror)
        except (AptError, OSError) as error:
            failure = error
    if kept:
        return kept.parents[1]
    raise NoHeaders(f"no kernel headers: {failure}".splitlines()[0])


def _confirmed(include: Path) -> float:
    """Return when these headers were last found to be the newest."""
    return include.parents[1].stat().st_mtime


def _newest(store: Path, mirror: str) -> Path:
    cache = Cache(store)  # not the lab's lock, which a build of a lab holds for minutes
    with cache.lock(lambda: None):
        apt = Apt(cache.apt, mirror)
        apt.prepare()
        age = apt.newest_age()
        if age is None or age > DAY:
            apt.update(lambda _what, _part: None)
        name, version = next(p for p in apt.resolve("linux-libc-dev", suite=BACKPORTS) if p[0] == "linux-libc-dev")
        directory = store / re.sub(r"[^\w.+-]", "_", version)
        if not directory.exists():
            package = apt.locate([(name, version)])
            apt.download(package, lambda _what, _part: None)
            scratch = store / f"partial.{os.getpid()}"
            try:
                scratch.mkdir(parents=True)
                subprocess.run(["dpkg-deb", "-x", apt.archives / package[0].file, scratch], check=True)
                scratch.rename(directory)
            finally:
                shutil.rmtree(scratch, ignore_errors=True)
    os.utime(directory)
    return directory


def include_flags(machine: str) -> list[str]:
    """Return compiler options that use only these headers, for ``machine`` (``uname -m``)."""
    include = root() / "usr/include"
    return ["-nostdinc", "-isystem", str(include / f"{machine}-linux-gnu"), "-isystem", str(include)]
