# SPDX-License-Identifier: Apache-2.0
"""The three ways a guest can be kept from its host, as everyone in pyvmm names them."""

from __future__ import annotations

from enum import Enum

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Final


class Protection(Enum):
    """Who enforces that the host cannot touch a guest's private pages."""

    NONE = "none"
    EMULATED = "emulated"
    PKVM = "pkvm"

    @property
    def isolates(self) -> bool:
        """Whether the guest has private pages at all."""
        return self is not Protection.NONE

    @property
    def by_hypervisor(self) -> bool:
        """Whether EL2 keeps them private; otherwise the VMM does so itself."""
        return self is Protection.PKVM


PROTECTIONS: Final = tuple(protection.value for protection in Protection)
"""Their names, as a user types them, in the order in which reports and axes have them."""
