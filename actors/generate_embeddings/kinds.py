"""What kind of file this is: by its content; its name and declared type only decide between kinds of plain text."""

from __future__ import annotations

import csv
import re
from pathlib import Path, PurePosixPath
from typing import Final

from actors.generate_embeddings import encodings, packages
from actors.generate_embeddings.passages import refused

_HEAD_BYTES: Final = 64 << 10
_SAVE_AS: Final = "save it as PDF, DOCX, PPTX, XLSX, HTML, Markdown, TXT or CSV"
_OTHERS: Final = (
    (b"\x89PNG", "a picture"),
    (b"\xff\xd8\xff", "a picture"),
    (b"GIF8", "a picture"),
    (b"RIFF", "sound, a film or a picture"),
    (b"ID3", "sound"),
    (b"\x1a\x45\xdf\xa3", "a film: hand it in at /api/videos/analyze with index=true"),
    (b"\x1f\x8b", "a compressed archive"),
    (b"7z\xbc\xaf", "an archive"),
    (b"Rar!", "an archive"),
    (b"{\\rtf", "RTF"),
    (b"%!PS", "PostScript"),
)
_OLE: Final = b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1"
_HTML: Final = re.compile(r"\s*(<\?xml[^>]*>\s*|<!--.*?-->\s*)*<(!doctype\s+html|html|head|body)\b", re.I | re.S)
_TAG: Final = re.compile(r"<(p|div|h[1-6]|table|ul|ol|a|br|span)\b[^>]*>", re.I)
#: Headings between blank lines: comments of a program have none around them.
_HEADINGS: Final = re.compile(r"(?:\A|\n\n)#{1,6} +\S[^\n]*\n(?=\n)")
_MARKDOWN: Final = tuple(
    re.compile(pattern, re.M)
    for pattern in (
        r"^ {0,3}#{1,6} +\S",
        r"^ {0,3}(```|~~~)",
        r"^\s*\|?\s*:?-{3,}:?\s*\|[\s|:-]*$",
        r"\[[^\]\n]+\]\([^)\s]+\)",
        r"^\s*[-*+] +\S",
        r"\*\*[^*\n]+\*\*",
        r"^> ",
    )
)
#: A comma is in every sentence: it takes more columns to make a table.
_DELIMITERS: Final = {"\t": 2, ";": 2, "|": 2, ",": 3}
_FEWEST_ROWS: Final = 3


def kind_of(path: Path, *, name: str | None, content_type: str | None) -> str:
    """pdf, docx, pptx, xlsx, html, markdown, text or csv. Raises Permanent for everything else."""
    with path.open("rb") as file:
        head = file.read(_HEAD_BYTES)
    if not head.strip():
        raise refused("empty", "The file is empty.")
    if b"%PDF-" in head[:1024]:
        return "pdf"
    if head.startswith(b"PK\x03\x04"):
        return packages.kind_of(path)
    if head.startswith(_OLE):
        raise _old_office(path)
    for beginning, what in _OTHERS:
        if head.startswith(beginning):
            raise refused("unsupported_kind", f"The file is {what}. It has no text that can be read here; {_SAVE_AS}.")
    if head[4:8] == b"ftyp":
        raise refused("unsupported_kind", "The file is a film: hand it in at /api/videos/analyze with index=true.")
    text, _ = encodings.decode(head, cut_off=len(head) == _HEAD_BYTES)
    return _kind_of_text(text, _suffix(name), (content_type or "").lower())


def _old_office(path: Path) -> Exception:
    """OLE holds Word, Excel and PowerPoint as they were before 2007, and newer ones that have a password."""
    if "EncryptedPackage".encode("utf-16-le") in path.read_bytes():
        return refused("encrypted", "The file has a password: save it without one.")
    return refused("unsupported_kind", "The file is of Office 97–2003, or a message: save it as DOCX, XLSX or PPTX.")


def _kind_of_text(text: str, suffix: str, content_type: str) -> str:
    if _HTML.match(text) or ((suffix in (".html", ".htm") or "html" in content_type) and _TAG.search(text)):
        return "html"
    if suffix in (".md", ".markdown") or "markdown" in content_type:
        return "markdown"
    if suffix in (".csv", ".tsv") or "csv" in content_type or "tab-separated" in content_type:
        return "csv"
    if len(_HEADINGS.findall(text)) > 1:
        return "markdown"
    found = sum(pattern.search(text) is not None for pattern in _MARKDOWN)
    if found > 1 and any(pattern.search(text) for pattern in _MARKDOWN[:4]):
        return "markdown"
    return "csv" if delimiter_of(text, strict=True) else "text"


def delimiter_of(text: str, *, strict: bool = False) -> str | None:
    """What separates the cells of a table. `strict`: None unless all of it looks like a table."""
    whole = text[: text.rfind("\n") + 1] or text  # the last line may be cut off
    best: tuple[float, int, str] | None = None
    for delimiter, fewest in _DELIMITERS.items():
        rows = [
            row for _, row in zip(range(200), csv.reader(whole.splitlines(), delimiter=delimiter), strict=False) if row
        ]
        widths = [len(row) for row in rows]
        if not rows or max(widths) < 2:
            continue
        width = max(set(widths), key=lambda each: (widths.count(each), each))
        agreeing = widths.count(width) / len(widths)
        if strict and (width < fewest or len(rows) < _FEWEST_ROWS or agreeing < 1):
            continue
        if width > 1 and (best is None or (agreeing, width) > best[:2]):
            best = (agreeing, width, delimiter)
    return best[2] if best else None


def _suffix(name: str | None) -> str:
    return PurePosixPath(name or "").suffix.lower()
