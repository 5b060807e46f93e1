"""The child process's way in: a file becomes text and chunks, within bounds of memory, time and size."""

from __future__ import annotations

import json
import resource
import signal
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final, NoReturn

from actors.generate_embeddings import chunks, kinds, language, packages
from actors.generate_embeddings.passages import Passage, refused
from actors.generate_embeddings.readers import reader_of
from agentflow.errors import JobError

_REPORT_EVERY: Final = 100
#: Reading is the longer part of it.
_READ_SHARE: Final = 0.8
#: What a reader in the middle of a C call gets beyond its time before the kernel kills it.
_GRACE_CPU_S: Final = 20

Report = Callable[[float, str | None], None]


def read(
    *,
    source: str,
    out: str,
    kind: str | None,
    name: str | None,
    content_type: str | None,
    size: int,
    overlap: int,
    max_unpacked_bytes: int,
    max_characters: int,
    memory_mb: int,
    cpu_s: int,
    share_done: float,
    share_end: float,
    report: Report,
) -> dict[str, Any]:
    """Read the file `source`, of this kind or of whichever it is; write `{"text", "chunks"}` as JSON to `out`.

    Returns kind, language and facts. Raises Permanent for what cannot be read, with what would help.
    """
    _bound(memory_mb, cpu_s)
    path = Path(source)
    facts: dict[str, Any] = {}

    def scaled(fraction: float, stage: str | None) -> None:
        report(share_done + (share_end - share_done) * fraction, stage)

    try:
        kind = kind or kinds.kind_of(path, name=name, content_type=content_type)
        if kind in ("docx", "pptx", "xlsx"):
            packages.check(path, max_unpacked_bytes)
        passages = list(_within(reader_of(kind)(path, facts), facts, max_characters, scaled))
    except (JobError, OSError):
        raise
    except MemoryError:
        raise refused(
            "too_much_memory",
            f"Reading the file takes more than {memory_mb} MB of memory: split it, or raise DOCUMENT_MEMORY_MB.",
        ) from None
    except (
        Exception
    ) as error:  # readers raise whatever a damaged file leads them into: KeyError, struct.error, RecursionError
        damaged = packages.damaged()
        raise refused("corrupt", f"{damaged} ({type(error).__name__})") from error
    if not passages:
        raise refused("no_text", "The file has no text.")
    text, found = chunks.cut(passages, size=size, overlap=overlap)
    scaled(1.0, "extract")
    Path(out).write_text(json.dumps({"text": text, "chunks": [asdict(chunk) for chunk in found]}), encoding="utf-8")
    spoken = language.most((chunk.language, len(chunk.text)) for chunk in found)
    return {"kind": kind, "language": spoken, "facts": {**facts, "characters": len(text), "words": len(text.split())}}


def _within(
    passages: Iterator[Passage], facts: dict[str, Any], max_characters: int, report: Report
) -> Iterator[Passage]:
    characters = 0
    for number, passage in enumerate(passages, 1):
        characters += len(passage.text)
        if characters > max_characters:
            raise refused(
                "too_long",
                f"The file has more than {max_characters} characters of text: split it, or raise DOCUMENT_MAX_CHARACTERS.",
            )
        yield passage
        if number % _REPORT_EVERY == 0:
            pages = facts.get("pages") or facts.get("slides")
            at = passage.place.get("page") or passage.place.get("slide")
            report(_READ_SHARE * (at / pages if pages and at else characters / max_characters), "extract")


def _bound(memory_mb: int, cpu_s: int) -> None:
    def too_slow(*_: Any) -> NoReturn:
        raise refused(
            "too_slow",
            f"Reading the file takes more than {cpu_s} s: split it, or raise DOCUMENT_CPU_SECONDS.",
        )

    # Of data, not of addresses: libraries are mapped far beyond what they use.
    resource.setrlimit(resource.RLIMIT_DATA, (memory_mb << 20, memory_mb << 20))
    signal.signal(signal.SIGXCPU, too_slow)
    resource.setrlimit(resource.RLIMIT_CPU, (cpu_s, cpu_s + _GRACE_CPU_S))
