# SPDX-License-Identifier: Apache-2.0
"""The lab's status: images, the project's own kernel, and missing parts, as text or JSON."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Final

from pyvmm.terminal import clean

if TYPE_CHECKING:
    from pyvmm.lab.cache import Image
    from pyvmm.lab.ownkernel import OwnKernel

LIST_COLUMNS: Final = 17


def print_status(*, as_json: bool) -> int:
    """Print the status. Returns the exit status, 0 if the lab can be used or at least built, 5 otherwise."""
    from pyvmm.guest.kernels import OWN
    from pyvmm.lab import kernels
    from pyvmm.lab.cache import Cache
    from pyvmm.lab.image import age_note, usable_image
    from pyvmm.lab.needs import needs
    from pyvmm.lab.ownkernel import Variant, current_kernel, usable_kernel
    from pyvmm.lab.saved import disk_use

    cache = Cache()
    own = {each: usable_kernel(cache, each, thorough=True) for each in Variant}
    known = cache.all_current()
    images = {name: image for name in known if (image := usable_image(cache, kernel=name, thorough=True))}
    missing = [need for need in needs() if need.missing and not (need.building and images)]
    if as_json:
        print(
            json.dumps(
                {
                    "cache": str(cache.directory),
                    "images": {
                        name: {
                            "directory": str(image.directory),
                            "size": image.size,
                            "release": image.manifest.release,
                            "built": image.manifest.built,
                            "mirror": image.manifest.mirror,
                            "packages": image.manifest.packages,
                        }
                        for name, image in images.items()
                    },
                    "kernel": _record(own[Variant.HOST]),
                    "guest_kernel": _record(own[Variant.GUEST]),
                    "saved_boots": {"count": disk_use()[0], "bytes": disk_use()[1]},
                    "missing": [{"what": need.what, "why": need.missing, "package": need.package} for need in missing],
                }
            )
        )
        return 5 if missing else 0
    lines = {"cache": str(cache.directory)}
    for name in dict.fromkeys((kernels.DEFAULT, *known)):
        lines[name] = (
            _describe(images[name], age_note(name, images[name], cache))
            if name in images
            else ("to be built again: of another version, or damaged" if name in known else "none yet")
        )
    for variant, called in {Variant.HOST: kernels.OWN, Variant.GUEST: OWN}.items():
        if (kernel := own[variant]) is not None:
            lines[called] = kernel.told()
        else:
            again = "to be built again: of other options or another compiler, or damaged"
            lines[called] = f"{again if current_kernel(cache, variant) else 'none yet'} (pyvmm lab kernel)"
    count, size = disk_use()
    lines["saved boots"] = f"{count}, {size / 1e6:.0f} MB on disk"
    for need in missing:
        lines[f"missing {need.what}"] = f"{need.missing}{f' (apt install {need.package})' if need.package else ''}"
    for name, value in lines.items():
        print(clean(f"{name:<{LIST_COLUMNS}} {value}"))
    return 5 if missing else 0


def _record(kernel: OwnKernel | None) -> dict[str, object] | None:
    if kernel is None:
        return None
    return {
        "path": str(kernel.path),
        "size": kernel.manifest.size,
        "release": kernel.release,
        "built": kernel.manifest.built,
        "source": kernel.manifest.source,
        "compiler": kernel.manifest.compiler,
        "refused": kernel.manifest.refused,
    }


def _describe(image: Image, note: str | None) -> str:
    manifest = image.manifest
    age = (datetime.now(UTC) - datetime.fromisoformat(manifest.built)).days
    return (
        f"{manifest.release}, {image.size / 1e6:.0f} MB, {age} days old, {len(manifest.packages)} packages of "
        f"{manifest.mirror}, in {image.directory}{f'; {note}' if note else ''}"
    )
