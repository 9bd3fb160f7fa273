# SPDX-License-Identifier: Apache-2.0
"""The kernel's statistics of a VM or a vCPU (KVM_GET_STATS_FD). Names are read once, values at any time."""

from __future__ import annotations

import errno as _errno
import os
from ctypes import sizeof

from pyvmm.kvm.fd import AttributeFd, Fd

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import TypeAlias

Stat: TypeAlias = "int | tuple[int, ...]"


class Stats(Fd):
    """Made by the first ``stats()`` of a VM or a vCPU, and closed with it."""

    kind = "stats"

    def __init__(self, owner: Fd) -> None:
        from pyvmm.uapi.kvm_state import KVM_GET_STATS_FD

        super().__init__(owner.call(KVM_GET_STATS_FD), owner)
        try:
            self._learn()
        except BaseException:
            self.close()
            raise

    def _learn(self) -> None:
        from pyvmm.uapi.kvm_state import kvm_stats_desc, kvm_stats_header

        header = kvm_stats_header.from_buffer_copy(self._read(0, sizeof(kvm_stats_header)))
        stride = sizeof(kvm_stats_desc) + header.name_size
        table = self._read(header.desc_offset, stride * header.num_desc)
        self._data_offset: int = header.data_offset
        self._places: list[tuple[str, int, int]] = []
        for at in range(0, len(table), stride):
            one = kvm_stats_desc.from_buffer_copy(table, at)
            name = table[at + sizeof(kvm_stats_desc) : at + stride].split(b"\0", 1)[0].decode("ascii", "replace")
            self._places.append((name, one.offset // 8, one.size))
        self._bytes = max((8 * (word + count) for _, word, count in self._places), default=0)

    def read(self) -> dict[str, Stat]:
        """Return every statistic by its kernel name; histograms and arrays as tuples."""
        words = memoryview(self._read(self._data_offset, self._bytes)).cast("Q")
        return {
            name: words[word] if count == 1 else tuple(words[word : word + count]) for name, word, count in self._places
        }

    def _read(self, offset: int, size: int) -> bytes:
        try:
            data = os.pread(self.fileno(), size, offset)
        except OSError as error:
            raise self.error("pread", error.errno or _errno.EIO, offset=offset, size=size) from error
        if len(data) != size:
            raise self.error("pread", _errno.ENODATA, offset=offset, size=size)
        return data


class MeasuredFd(AttributeFd):
    """A VM or a vCPU: attributes and statistics."""

    _stats: Stats | None = None

    def stats(self) -> dict[str, Stat]:
        """Return the kernel's statistics by name; histograms and arrays as tuples."""
        if self._stats is None or self._stats.closed:
            self._stats = Stats(self)
        return self._stats.read()
