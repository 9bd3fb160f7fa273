# SPDX-License-Identifier: Apache-2.0
"""Hatchling's build hook: build the extension into every wheel and every editable install.

The manual page and the completion scripts come with both (native/shared_data.py).

``PYVMM_TARGET=aarch64`` cross-builds a wheel for that machine.
"""

from __future__ import annotations

import os
import platform
import sys
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from native import build, shared_data


class NativeHook(BuildHookInterface[Any]):
    """Build the extension before a wheel is packed, and set the wheel's platform tag."""

    PLUGIN_NAME = "custom"

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Build for PYVMM_TARGET, or for this host. ``version`` is "editable" for an install in place."""
        if self.target_name != "wheel":
            return
        machine = os.environ.get("PYVMM_TARGET") or platform.machine()
        try:
            extension = self._build(machine, editable=version == "editable", build_data=build_data)
        except build.BuildError as error:
            sys.exit(f"pyvmm's native loop cannot be built: {error}")
        scratch = Path(self._scratch.name)
        for path in shared_data.write_shared_data(scratch):
            build_data["shared_data"][str(scratch / path)] = path
        build_data["pure_python"] = False
        build_data["tag"] = f"cp311-abi3-{build.platform_tag(extension, machine)}"

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:  # noqa: ARG002
        """Delete the files that were cross-built only for this wheel."""
        if self.target_name == "wheel":  # a source archive contains no built files
            self._scratch.cleanup()

    def _build(self, machine: str, *, editable: bool, build_data: dict[str, Any]) -> Path:
        """Build what the wheel carries, and return the extension of ``machine``."""
        self._scratch = tempfile.TemporaryDirectory(prefix="pyvmm-wheel-")
        if machine not in build.MACHINES:
            raise build.BuildError(f"{machine} is not one of {', '.join(build.MACHINES)}")
        if machine != platform.machine():
            if editable:
                raise build.BuildError(f"an editable install runs here, not on {machine}: unset PYVMM_TARGET")
            # Not in place: the extension there is this host's.
            extension = Path(self._scratch.name) / build.EXTENSION
            build.build(machine, extension)
            build_data["force_include"][str(extension)] = f"pyvmm/{build.EXTENSION}"
            return extension
        built = build.build_in_place()
        if build.FOR_LAB not in built and machine != "aarch64":
            self.app.display_warning(build.WITHOUT_LAB)
        for path in built:
            build_data["artifacts"].append(f"/{path.relative_to(build.ROOT)}")
        return build.IN_PLACE
