"""Office files are zip archives of XML: what is in one, and whether it may be unpacked."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Final

from actors.generate_embeddings.passages import refused

_MAIN_PARTS: Final = {"word/document.xml": "docx", "ppt/presentation.xml": "pptx", "xl/workbook.xml": "xlsx"}
_MOST_PARTS: Final = 20_000
#: XML of an honest file shrinks to a tenth or a thirtieth.
_MOST_RATIO: Final = 200
_HARMLESS_BYTES: Final = 10 << 20
_ENCRYPTED: Final = 0x1


def kind_of(path: Path) -> str:
    """docx, pptx or xlsx. Raises Permanent for other archives."""
    names = {part.filename.lower() for part in _parts(path)}
    for name, kind in _MAIN_PARTS.items():
        if name in names:
            return kind
    what = "an OpenDocument file: save it as DOCX, XLSX or PPTX" if "content.xml" in names else "an archive: unpack it"
    raise refused("unsupported_kind", f"The file is {what}, and hand that in.")


def check(path: Path, max_bytes: int) -> None:
    """Before anything is unpacked. Sizes may lie, but no more is ever unpacked than what they say."""
    parts = _parts(path)
    if any(part.flag_bits & _ENCRYPTED for part in parts):
        raise refused("encrypted", "The file has a password: save it without one.")
    total = sum(part.file_size for part in parts)
    bomb = any(
        part.file_size > _HARMLESS_BYTES and part.file_size > _MOST_RATIO * max(1, part.compress_size) for part in parts
    )
    if bomb or total > max_bytes or len(parts) > _MOST_PARTS:
        raise refused(
            "zip_bomb",
            f"Unpacked, the file has {len(parts)} parts and {total} bytes, far more than a document of its size;"
            f" at most {max_bytes} bytes are unpacked (DOCUMENT_UNPACKED_BYTES).",
        )


def _parts(path: Path) -> list[zipfile.ZipInfo]:
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.infolist()
    # What zipfile raises for a list of parts that lies: offsets outside of the file, versions nobody has, names of no encoding.
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise damaged() from error


def damaged() -> Exception:
    return refused("corrupt", "The file is damaged or cut short: open it in its program, save it anew, hand that in.")
