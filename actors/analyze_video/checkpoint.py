"""What an analysis knows half-way, as one file, so that another process can go on from there.

The file is a ZIP of `state.json` and of the arrays and bytes that stand in it by number. Nothing in it is executed.
"""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
from pathlib import Path
from typing import Any, Final

import av
import numpy as np

#: Changed whenever states are no longer understood: an old one is then passed over.
VERSION: Final = 1
_ENDS_BYTES: Final = 1 << 16
_MAX_BYTES: Final = 256 << 20


def identity(source: Path, **options: Any) -> dict[str, Any]:
    """What a state must agree in with the analysis that takes it up: the file, the options, the versions."""
    size = source.stat().st_size
    with source.open("rb") as file:
        digest = hashlib.sha256(file.read(_ENDS_BYTES))
        file.seek(max(0, size - _ENDS_BYTES))
        digest.update(file.read(_ENDS_BYTES))
    return {"version": VERSION, "av": av.__version__, "size": size, "ends": digest.hexdigest(), "options": options}


def save(path: Path, state: dict[str, Any]) -> None:
    """`state` holds JSON values, arrays and bytes."""
    blobs: list[tuple[str, bytes]] = []

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(each) for key, each in value.items()}
        if isinstance(value, list | tuple):
            return [plain(each) for each in value]
        if isinstance(value, bytes | bytearray):
            blobs.append((f"{len(blobs)}.bin", bytes(value)))
            return {"$blob": len(blobs) - 1}
        if isinstance(value, np.ndarray):
            buffer = io.BytesIO()
            np.save(buffer, value, allow_pickle=False)
            blobs.append((f"{len(blobs)}.npy", buffer.getvalue()))
            return {"$array": len(blobs) - 1}
        return value.item() if isinstance(value, np.generic) else value

    text = json.dumps(plain(state))
    partial = path.with_suffix(".part")
    with zipfile.ZipFile(partial, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as file:
        file.writestr("state.json", text)
        for name, data in blobs:
            # JPEGs do not get smaller.
            file.writestr(name, data, zipfile.ZIP_STORED if name.endswith(".bin") else zipfile.ZIP_DEFLATED)
    partial.rename(path)


def load(path: Path, expected: dict[str, Any]) -> dict[str, Any] | None:
    """The state, or None if it is damaged, or of another file, version or option."""
    try:
        with zipfile.ZipFile(path) as file:
            if sum(each.file_size for each in file.infolist()) > _MAX_BYTES:
                return None

            def whole(value: Any) -> Any:
                if isinstance(value, list):
                    return [whole(each) for each in value]
                if not isinstance(value, dict):
                    return value
                if "$blob" in value:
                    return file.read(f"{value['$blob']}.bin")
                if "$array" in value:
                    return np.load(io.BytesIO(file.read(f"{value['$array']}.npy")), allow_pickle=False)
                return {key: whole(each) for key, each in value.items()}

            state: dict[str, Any] = whole(json.loads(file.read("state.json")))
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None
    return state if state.get("identity") == expected else None
