"""Bytes as text: by their mark, as UTF-8, as what they say of themselves, or as what they look like."""

from __future__ import annotations

import codecs
import re
import unicodedata
from typing import Final

from actors.generate_embeddings.passages import refused

_MARKS: Final = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),  # before UTF-16, whose mark it begins with
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_DECLARED: Final = re.compile(rb"""(?:charset|encoding)\s*=\s*["']?\s*([A-Za-z0-9_.:-]+)""", re.I)
#: Longer samples take seconds and tell no more.
_SAMPLE_BYTES: Final = 64 << 10
_CONTROLS: Final = frozenset(map(chr, range(32))) - set("\t\n\r\f\x1b")


def decode(data: bytes, *, declares: bool = False, cut_off: bool = False) -> tuple[str, str]:
    """The text, and the name of its encoding. `declares`: HTML may name its own; `cut_off`: the last character may be
    half of one. Raises Permanent for what is no text."""
    for mark, name in _MARKS:
        if data.startswith(mark):
            return _checked(data.decode(name, "replace")), name
    try:
        decoder = codecs.getincrementaldecoder("utf-8")()
        return _checked(decoder.decode(data, final=not cut_off)), "utf-8"
    except UnicodeDecodeError:
        pass
    declared = _DECLARED.search(data[:2048]) if declares else None
    for guess in (declared.group(1).decode() if declared else None, _looks_like(data)):
        try:
            if guess is not None:
                return _checked(data.decode(guess, "replace")), codecs.lookup(guess).name
        except LookupError:
            continue
    raise _no_text()


def _looks_like(data: bytes) -> str | None:
    import chardet

    found = chardet.detect(data[:_SAMPLE_BYTES])["encoding"]
    return str(found) if found else None


def _checked(text: str) -> str:
    sample = text[:_SAMPLE_BYTES]
    strange = sum(character in _CONTROLS or character == "\ufffd" for character in sample)
    unassigned = sum(unicodedata.category(character) in ("Cn", "Co") for character in sample[:4096])
    if strange * 100 > len(sample) or unassigned * 20 > len(sample[:4096]):
        raise _no_text()
    return text


def _no_text() -> Exception:
    return refused(
        "unsupported_kind",
        "The file is neither text nor of a kind that is known: PDF, DOCX, PPTX, XLSX, HTML, Markdown, TXT and CSV are read.",
    )
