"""HTML: the main part of a page, without what is the same on all pages of its site."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from selectolax.lexbor import LexborHTMLParser, LexborNode

from actors.generate_embeddings import encodings
from actors.generate_embeddings.passages import Passage, is_header, lines, one_line, row

_UNSEEN: Final = "script,style,noscript,template,svg,iframe,object,head,select,button,[hidden],[aria-hidden=true]"
_AROUND: Final = "nav,aside,form,body>header,body>footer,[role=navigation],[role=banner],[role=contentinfo]"
_BLOCKS: Final = frozenset(
    (  # noqa: SIM905 - a list for people
        "address article aside blockquote body center dd details dialog div dl dt fieldset figcaption figure footer form h1 h2"
        " h3 h4 h5 h6 header hgroup hr html li main nav ol p pre section summary table ul"
    ).split()
)
_HEADING: Final = re.compile(r"h([1-6])")
#: Where the rest of a page has more text than this share, it is no frame around the main part.
_MAIN_SHARE: Final = 0.3


def read(path: Path, facts: dict[str, Any]) -> Iterator[Passage]:
    text, facts["encoding"] = encodings.decode(path.read_bytes(), declares=True)
    tree = LexborHTMLParser(text)
    title = tree.css_first("title")
    if title is not None and (said := one_line(title.text())):
        facts["title"] = said
    for node in tree.css(_UNSEEN):
        node.decompose()
    body = tree.body
    if body is None:
        return
    whole = len(body.text())
    main = tree.css("main,[role=main],article")
    if len(main) == 1 and len(main[0].text()) >= whole * _MAIN_SHARE:
        body = main[0]
    else:
        for node in tree.css(_AROUND):
            if len(node.text()) < whole * _MAIN_SHARE:
                node.decompose()
    yield from _blocks(body)


def _blocks(node: LexborNode) -> Iterator[Passage]:
    """Depth first; text outside of any paragraph is gathered until the next block begins."""
    inline: list[str] = []
    child = node.child
    while child is not None:
        tag = child.tag or ""
        if tag in _BLOCKS:
            yield from _gathered(inline, node)
            yield from _block(child, tag)
        elif tag == "br":
            inline.append(" ")
        elif tag == "-text":
            inline.append(child.text(deep=False))
        elif tag == "img":
            inline.append(child.attributes.get("alt") or "")
        elif not tag.startswith(("-", "!", "_")) and any(each.tag in _BLOCKS for each in child.traverse()):
            yield from _gathered(inline, node)
            yield from _blocks(child)
        elif not tag.startswith(("-", "!", "_")):
            inline.append(_inline(child))
        child = child.next
    yield from _gathered(inline, node)


def _block(node: LexborNode, tag: str) -> Iterator[Passage]:
    if heading := _HEADING.fullmatch(tag):
        yield Passage(one_line(_inline(node)), "heading", int(heading.group(1)))
    elif tag == "table":
        yield from _table(node)
    elif tag == "pre":
        yield Passage(lines(node.text()))
    else:
        yield from _blocks(node)


def _gathered(inline: list[str], node: LexborNode) -> Iterator[Passage]:
    if text := one_line("".join(inline)):
        yield Passage(text, tight=node.tag in ("li", "dd"))
    inline.clear()


def _inline(node: LexborNode) -> str:
    pieces = []
    for each in node.traverse(include_text=True):
        if each.tag == "-text":
            pieces.append(each.text(deep=False))
        elif each.tag == "br":
            pieces.append(" ")
    return "".join(pieces)


def _table(table: LexborNode) -> Iterator[Passage]:
    """A table that only lays out the page, which has others inside, is gone into like any block."""
    if table.css("table table, h1, h2, h3"):
        for cell in table.css("td,th"):
            yield from _blocks(cell)
        return
    caption = table.css_first("caption")
    if caption is not None and (text := one_line(_inline(caption))):
        yield Passage(text)
    header: str | None = None
    for number, each in enumerate(table.css("tr"), 1):
        nodes = each.css("td,th")
        cells = [_inline(cell) for cell in nodes]
        text = row(cells)
        if not text:
            continue
        yield Passage(text, "row", place={"row": number}, header=header)
        if header is None and (all(cell.tag == "th" for cell in nodes) or number == 1) and is_header(cells):
            header = text
