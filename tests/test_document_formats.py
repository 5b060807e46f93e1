"""Every kind of file, written by another program than the one that reads it (tests/documents/make), and what is refused."""

from __future__ import annotations

import io
import random
import time
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from uuid import uuid4

import pytest

from actors.generate_embeddings import kinds, packages
from actors.generate_embeddings.passages import Passage
from actors.generate_embeddings.readers import reader_of
from agentflow.errors import JobError, Permanent
from agentflow.worker import child
from agentflow.worker.running import Running
from tests.documents_support import FILES

HANDBOOK = [
    (
        "A ticket is bought on the quay or by telephone. Children under seven travel free of charge, i.e. they need no ticket at"
        " all. Dogs pay half.",
        "text",
        {},
    ),
    ("Cabin | 48 | four bags", "row", {"row": 3}),
    ("С ноября по март ходит ледокол. Билеты на него продаются только в кассе порта.", "text", {}),
]
LETTER = "Сообщаем, что с 1 декабря паром отправляется\nна полчаса раньше. Просим не опаздывать."


def passages_of(path: Path, name: str | None = None) -> tuple[str, list[Passage], dict[str, Any]]:
    facts: dict[str, Any] = {}
    kind = kinds.kind_of(path, name=name, content_type=None)
    return kind, list(reader_of(kind)(path, facts)), facts


@pytest.mark.parametrize(
    ("file", "kind", "expected", "facts"),
    [
        ("handbook.docx", "docx", HANDBOOK, {"title": "Handbook of the Northern Ferry", "author": "Anna Petrova"}),
        ("handbook.html", "html", HANDBOOK, {"title": "Handbook of the Northern Ferry", "encoding": "utf-8"}),
        (
            "handbook.md",
            "markdown",
            [
                (HANDBOOK[0][0], "text", {"line": 8}),
                (HANDBOOK[1][0], "row", {"line": 18}),
                (HANDBOOK[2][0], "text", {"line": 26}),
            ],
            {"title": "Handbook of the Northern Ferry"},
        ),
        (
            "slides.pptx",
            "pptx",
            [
                ("Two of them are older than thirty years.", "text", {"slide": 2, "heading": ["Where we stand"]}),
                ("Orion | 2019", "row", {"slide": 3, "heading": ["Что дальше"], "row": 3}),
                (
                    "Say that the yard has confirmed the price.",
                    "text",
                    {"slide": 3, "heading": ["Что дальше"], "part": "notes"},
                ),
            ],
            {"title": "Plans for the winter", "slides": 4},
        ),
        (
            "rules.pdf",
            "pdf",
            [
                (
                    "A night at the pier costs thirty crowns for each metre of length. Fishing boats of the island pay nothing.",
                    "text",
                    {"page": 2, "heading": ["Mooring", "Fees"]},
                ),
                (
                    "Спасательные жилеты хранятся под скамьями. Экипаж обязан провести учебную тревогу в течение первого часа"
                    " после отхода от причала.",
                    "text",
                    {"page": 3, "heading": ["Правила безопасности"]},
                ),
                (
                    "Курить разрешается только на корме.",
                    "text",
                    {"page": 4, "heading": ["Правила безопасности"]},
                ),
            ],
            {"title": "Harbour rules", "author": "Anna Petrova", "pages": 4},
        ),
        (
            "stock.xlsx",
            "xlsx",
            [
                ("Coffee | 3.5 | 5% | 2024-05-17", "row", {"sheet": "Prices", "row": 2}),
                ("Bun with cardamom | 2", "row", {"sheet": "Prices", "row": 3}),
                ("Сахар | полка 9", "row", {"sheet": "Склад", "row": 10}),
            ],
            {"title": "Stock of the kiosk", "sheets": ["Prices", "Склад"]},
        ),
        (
            "crew.csv",
            "csv",
            [
                ("Имя | Должность | Оклад", "row", {"row": 1}),
                ("Сидорова Анна | повар; старшая | 80000", "row", {"row": 3}),
                ("Ли Чен | матрос | 60000", "row", {"row": 4}),
            ],
            {"encoding": "cp1251", "delimiter": ";", "rows": 4},
        ),
        (
            "letter.txt",
            "text",
            [
                ("Уважаемые пассажиры!", "text", {"line": 1}),
                (LETTER, "text", {"line": 3}),
                ("С уважением, дирекция порта", "text", {"line": 8}),
            ],
            {"encoding": "koi8-r"},
        ),
    ],
)
def test_each_kind_is_known_by_its_content_and_read_with_its_places(
    file: str, kind: str, expected: list[tuple[str, str, dict[str, Any]]], facts: dict[str, Any], tmp_path: Path
) -> None:
    nameless = tmp_path / "file"
    nameless.write_bytes((FILES / file).read_bytes())

    found_kind, found, found_facts = passages_of(nameless, name="misleading.bin")

    assert found_kind == kind
    said = [(passage.text, passage.style, dict(passage.place)) for passage in found]
    for passage in expected:
        assert passage in said
    places = [said.index(passage) for passage in expected]
    assert places == sorted(places)
    assert facts.items() <= found_facts.items()
    if kind in ("docx", "html", "markdown"):
        headings = [(p.text, p.level) for p in found if p.style == "heading" and p.text != facts["title"]]
        assert headings == [("Tickets", 1), ("Refunds", 2), ("Расписание", 1), ("Зимой", 2)]
    if kind == "html":
        assert not [text for text, _, _ in said if "Shop" in text or "rights" in text or "hidden" in text]
    if any(style == "row" for _, style, _ in expected[:2]) and kind != "csv":
        assert next(
            p.header for p in found if p.text == expected[1][0] or (p.text == expected[0][0] and p.style == "row")
        )


def test_the_parts_of_a_docx_that_are_no_plain_paragraphs(tmp_path: Path) -> None:
    w = 'xmlns:w="http://schemas.openxmlformats.org/wordprocessingml/2006/main"'
    body = """
    <w:sdt><w:sdtContent><w:p><w:r><w:t>In a content control.</w:t></w:r></w:p></w:sdtContent></w:sdt>
    <w:p><w:ins><w:r><w:t>Inserted</w:t></w:r></w:ins><w:del><w:r><w:delText>deleted</w:delText></w:r></w:del>
    <w:r><w:tab/><w:t>and kept</w:t></w:r></w:p>
    <w:p><w:pPr><w:outlineLvl w:val="2"/></w:pPr><w:r><w:t>By its own level</w:t></w:r></w:p>
    <w:p><w:r><w:pict><w:txbxContent><w:p><w:r><w:t>In a box</w:t></w:r></w:p></w:txbxContent></w:pict></w:r></w:p>"""
    path = rewritten(
        tmp_path, FILES / "handbook.docx", "word/document.xml", f"<w:document {w}><w:body>{body}</w:body></w:document>"
    )

    _, found, _ = passages_of(path)

    said = [(passage.style, passage.level, passage.text) for passage in found]
    assert said[:4] == [
        ("text", 1, "In a content control."),
        ("text", 1, "Inserted and kept"),
        ("heading", 3, "By its own level"),
        ("text", 1, "In a box"),
    ]


@pytest.mark.parametrize(
    ("content", "name", "kind"),
    [
        ("a;b;c\n1;2;3\n4;5;6\n", None, "csv"),
        ("a\tb\n1\t2\n3\t4\n", "data.txt", "csv"),
        ("one, two\nthree, four\nfive, six\n", None, "text"),
        ("one,two\n", "few.csv", "csv"),
        ("# Title\n\nSome *text* and a [link](https://example.com).\n\n- item\n", None, "markdown"),
        ("just words\n", "notes.md", "markdown"),
        ("<!DOCTYPE html><p>Hello", "page.txt", "html"),
        ("<p>A piece</p>", "piece.html", "html"),
        ("5 < 6 and 7 > 2, says he", "a.html", "text"),
        ('{"json": [1, 2]}', "x.json", "text"),
        ("Ünï", None, "text"),
    ],
)
def test_kinds_of_text_are_told_apart(content: str, name: str | None, kind: str, tmp_path: Path) -> None:
    for encoding in ("utf-8", "utf-16"):
        path = tmp_path / encoding
        path.write_bytes(content.encode(encoding))

        assert kinds.kind_of(path, name=name, content_type=None) == kind


def test_the_lines_of_a_pdf_become_paragraphs_again() -> None:
    from actors.generate_embeddings.readers.pdf import _paragraphs

    page = (
        "The first paragraph has lines that are all of about the same\r\nlength, and a word that was hyphen\ufffe\r\nated."
        " It ends in a short line.\r\nThe second begins here, with a line as long as those before it\r\nand ends.\r\n"
        "• one thing\r\n• another thing\r\n"
    )

    assert _paragraphs(page) == [
        "The first paragraph has lines that are all of about the same length, and a word that was hyphenated. It ends in a"
        " short line.",
        "The second begins here, with a line as long as those before it and ends.",
        "• one thing",
        "• another thing",
    ]


# ---- what is refused ----


def rewritten(tmp_path: Path, source: Path, part: str, content: str | bytes) -> Path:
    """A copy of an Office file with another content of one part."""
    path = tmp_path / f"rewritten-{source.name}"
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as new:
        for each in old.infolist():
            if each.filename != part:
                new.writestr(each, old.read(each))
        new.writestr(part, content)
    return path


def in_child(path: Path, **more: Any) -> Any:
    """As the job runs it: in a child process with its bounds."""
    job: Any = SimpleNamespace(id=uuid4(), fence=1)
    arguments = {
        "source": str(path),
        "out": str(path.with_suffix(".out")),
        "kind": None,
        "name": path.name,
        "content_type": None,
        "size": 256,
        "overlap": 32,
        "max_unpacked_bytes": 50 << 20,
        "max_characters": 1_000_000,
        "memory_mb": 300,
        "cpu_s": 300,
        "share_done": 0.0,
        "share_end": 1.0,
        **more,
    }
    return child.run(Running(job, time.monotonic() + 600), "actors.generate_embeddings.child:read", arguments)


def refused(path: Path) -> str | None:
    """The code with which a file is refused in this process; None: it is read."""
    try:
        kind = kinds.kind_of(path, name=path.name, content_type=None)
        if kind in ("docx", "pptx", "xlsx"):
            packages.check(path, 50 << 20)
        list(reader_of(kind)(path, {}))
    except Permanent as error:
        assert len(str(error)) > 15
        return error.code
    return None


def test_what_cannot_be_read_is_refused_by_name(tmp_path: Path) -> None:
    def file(name: str, data: bytes) -> Path:
        path = tmp_path / name
        path.write_bytes(data)
        return path

    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as made:
        made.writestr("a.txt", "x")
    found = {
        "locked.pdf": refused(FILES / "locked.pdf"),
        "locked.docx": refused(FILES / "locked.docx"),
        "scan.pdf": refused(FILES / "scan.pdf"),
        "empty": refused(file("empty.pdf", b"")),
        "blank": refused(file("blank.txt", b" \n\t ")),
        "old.doc": refused(file("old.doc", b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(2000))),
        "picture": refused(file("a.pdf", b"\x89PNG\r\n\x1a\n" + bytes(100))),
        "film": refused(file("a.txt", b"\0\0\0\x20ftypisom" + bytes(100))),
        "rtf": refused(file("a.doc", b"{\\rtf1 hello}")),
        "noise": refused(file("a.txt", random.Random(1).randbytes(5000))),
        "archive": refused(file("a.docx", archive.getvalue())),
        "cut archive": refused(file("b.docx", (FILES / "handbook.docx").read_bytes()[:5000])),
    }

    assert found == {
        "locked.pdf": "encrypted",
        "locked.docx": "encrypted",
        "scan.pdf": "scanned",
        "empty": "empty",
        "blank": "empty",
        "old.doc": "unsupported_kind",
        "picture": "unsupported_kind",
        "film": "unsupported_kind",
        "rtf": "unsupported_kind",
        "noise": "unsupported_kind",
        "archive": "unsupported_kind",
        "cut archive": "corrupt",
    }


def test_an_archive_that_unpacks_to_far_more_is_refused_before_it_is_unpacked(tmp_path: Path) -> None:
    zeros = bytes(1 << 20)
    path = tmp_path / "bomb.xlsx"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as made:
        made.writestr("xl/workbook.xml", "<workbook/>")
        with made.open("xl/worksheets/sheet1.xml", "w") as part:
            for _ in range(20):
                part.write(zeros)

    assert path.stat().st_size < 100_000
    assert refused(path) == "zip_bomb"


@pytest.mark.parametrize(
    ("name", "change", "code"),
    [
        ("handbook.docx", b"<w:document", "corrupt"),
        ("rules.pdf", None, "corrupt"),
        (
            "handbook.docx",
            b'<!DOCTYPE a [<!ENTITY a "aaaaaaaaaa">' + b"".join(
                b'<!ENTITY %c "%s">' % (97 + n, b"&%c;" % (96 + n) * 10) for n in range(1, 10)
            ) + b']><w:document xmlns:w="http://schemas.openxmlformats.org/wordprocessingml/2006/main"><w:body><w:p><w:r><w:t>&j;'
            b"</w:t></w:r></w:p></w:body></w:document>",
            None,
        ),
    ],
    ids=["half an XML", "half a PDF", "entities within entities"],
)  # fmt: skip
def test_damage_ends_in_a_refusal_and_not_in_a_crash(
    name: str, change: bytes | None, code: str | None, tmp_path: Path
) -> None:
    path = tmp_path / name
    if change is None:
        path.write_bytes((FILES / name).read_bytes()[:700])
    else:
        path = rewritten(tmp_path, FILES / name, "word/document.xml", change)

    with pytest.raises(JobError) as caught:
        in_child(path)

    assert isinstance(caught.value, Permanent)
    assert caught.value.code in ((code,) if code else ("corrupt", "no_text", "too_much_memory"))


def test_too_much_text_memory_or_time_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "many.csv"
    path.write_bytes(b"name;number\n" + b"thing;1\n" * 200_000)

    codes = []
    for bounds in (
        {"max_characters": 1000},
        {"memory_mb": 64, "max_characters": 1 << 40},
        {"cpu_s": 1, "max_characters": 1 << 40},
    ):
        with pytest.raises(Permanent) as caught:
            in_child(path, **bounds)
        codes.append(caught.value.code)

    assert codes == ["too_long", "too_much_memory", "too_slow"]


@pytest.mark.long
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(
    "name", ["handbook.docx", "slides.pptx", "stock.xlsx", "rules.pdf", "handbook.html", "crew.csv"]
)
def test_a_file_with_any_bytes_changed_is_read_or_refused(name: str, tmp_path: Path) -> None:
    chance = random.Random(name)
    data = (FILES / name).read_bytes()
    for number in range(25):
        damaged = bytearray(data)
        for _ in range(chance.randint(1, 40)):
            damaged[chance.randrange(len(damaged))] = chance.randrange(256)
        path = tmp_path / f"{number}-{name}"
        path.write_bytes(damaged[: chance.randint(len(damaged) // 2, len(damaged))])
        try:
            in_child(path)
        except Permanent as error:
            assert error.code
