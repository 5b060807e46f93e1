"""What is known of the machine that a process runs on: whether its platform throws the disk away, and what survives that.

Render, Heroku, Railway and Fly start each release, and often each restart, on a fresh file system; only a disk or volume that
was mounted stays (docs.render.com/disks, fly.io/docs/volumes/overview; Railway's volumes; Heroku has none).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Final, NamedTuple

#: What each platform sets in all of its processes.
_MARKS: Final = {
    "Render": "RENDER",
    "Heroku": "DYNO",
    "Railway": "RAILWAY_PROJECT_ID",
    "Fly": "FLY_MACHINE_ID",
}
_MOUNTS: Final = Path("/proc/self/mountinfo")
#: Layers over an image, and memory: gone with the process, or at the latest with the machine.
_FLEETING: Final = {"overlay", "aufs", "fuse-overlayfs", "squashfs", "tmpfs", "ramfs", "devtmpfs"}
#: Where container engines keep what a Dockerfile's VOLUME asks for when nobody gives one: it ends with the container.
_SCRATCH: Final = ("/containerd/", "/containers/", "/docker/volumes/", "kubernetes.io~empty-dir")


def ephemeral_platform(environ: Mapping[str, str]) -> str | None:
    """The platform whose disk is thrown away, or None on a machine that keeps its own."""
    return next((name for name, mark in _MARKS.items() if environ.get(mark)), None)


def survives(folder: Path, platform: str, environ: Mapping[str, str], mounts: Path = _MOUNTS) -> bool:
    """Whether `folder`, which need not exist yet, lies on a disk that the platform keeps."""
    folder = Path(os.path.realpath(folder))
    if platform == "Heroku":
        return False
    if platform == "Railway":  # it says where the service's volume is
        volume = environ.get("RAILWAY_VOLUME_MOUNT_PATH")
        return bool(volume) and folder.is_relative_to(os.path.realpath(str(volume)))
    mount = _mount_of(folder, mounts)
    return (
        mount is not None
        and mount.point != Path("/")
        and mount.kind not in _FLEETING
        and not any(part in mount.root for part in _SCRATCH)
    )


class _Mount(NamedTuple):
    point: Path
    root: str  # the folder of the mounted file system that is seen there
    kind: str


def _mount_of(folder: Path, mounts: Path) -> _Mount | None:
    """The mount that `folder` is on. Of several at the same place the last one is seen. See proc_pid_mountinfo(5)."""
    found: _Mount | None = None
    try:
        lines = mounts.read_text().splitlines()
    except OSError:  # not Linux: none of the platforms
        return None
    for line in lines:
        before, _, after = line.partition(" - ")
        root, point = (field.replace(r"\040", " ") for field in before.split()[3:5])
        mount = _Mount(Path(point), root, after.split()[0])
        if folder.is_relative_to(mount.point) and (found is None or len(mount.point.parts) >= len(found.point.parts)):
            found = mount
    return found
