# SPDX-License-Identifier: Apache-2.0
"""The protections of a guest from its host, and their names."""

from __future__ import annotations

from enum import Enum

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Final


class Protection(Enum):
    """The enforcer of a guest's private pages against the host."""

    NONE = "none"
    EMULATED = "emulated"
    PKVM = "pkvm"

    @property
    def isolates(self) -> bool:
        """Whether the guest has private pages at all."""
        return self is not Protection.NONE

    @property
    def by_hypervisor(self) -> bool:
        """Whether EL2 keeps them private; otherwise the VMM does."""
        return self is Protection.PKVM


PROTECTIONS: Final = tuple(protection.value for protection in Protection)
"""Their names for the user, in the order of reports and axes."""
