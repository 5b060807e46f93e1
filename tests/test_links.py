from __future__ import annotations

from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

from agentflow.links import LinkExpired, LinkInvalid, Links

SECRET = bytes(range(32))
NOW = 1_800_000_000.0


def opened(link: str) -> tuple[str, dict[str, Any]]:
    """What the web layer reads from a link: the key and the query."""
    parts = urlsplit(link)
    return unquote(parts.path).removeprefix("/artefacts/"), {
        k: v[0] for k, v in parse_qs(parts.query, keep_blank_values=True).items()
    }


@pytest.mark.parametrize("key", ["a/sheet.png", "a b/ü&?=%41.png", "x" * 100])
@pytest.mark.parametrize("filename", [None, "", "sheet.png", "Übersicht & mehr.png"])
def test_a_fresh_link_is_accepted(key: str, filename: str | None) -> None:
    link = Links(SECRET).sign(key, filename=filename, now=NOW)

    found, query = opened(link)
    assert found == key
    Links(SECRET).verify(found, **query, now=NOW + 899)


def test_a_link_is_a_path_with_expiry_and_signature() -> None:
    link = Links(SECRET).sign("a/b.png", lifetime_s=60, now=NOW)

    path, _, query = link.partition("?")
    assert path == "/artefacts/a/b.png"
    assert query.startswith("expires=1800000060&signature=")
    assert link.isascii()


def test_a_link_ends_with_its_lifetime() -> None:
    key, query = opened(Links(SECRET).sign("a", lifetime_s=60, now=NOW))

    Links(SECRET).verify(key, **query, now=NOW + 59.9)
    with pytest.raises(LinkExpired):
        Links(SECRET).verify(key, **query, now=NOW + 60)


def test_the_clock_of_this_machine_is_the_default() -> None:
    key, query = opened(Links(SECRET).sign("a"))
    Links(SECRET).verify(key, **query)

    key, query = opened(Links(SECRET).sign("a", lifetime_s=-1))
    with pytest.raises(LinkExpired):
        Links(SECRET).verify(key, **query)


@pytest.mark.parametrize(
    "change",
    [
        {"key": "a/c"},
        {"expires": "1800000901"},
        {"expires": "01800000900"},
        {"expires": " 1800000900"},
        {"expires": "1800000900.0"},
        {"expires": "١٨٠٠٠٠٠٩٠٠"},
        {"expires": ""},
        {"expires": "9" * 5000},
        {"signature": ""},
        {"signature": "x"},
        {"signature": "ü"},
        {"signature": "\udcff"},
        {"filename": "virus.exe"},
        {"filename": None},
        {"key": "../b"},
        {"key": "/a/b"},
    ],
)
def test_a_changed_link_is_refused(change: dict[str, str | None]) -> None:
    key, query = opened(Links(SECRET).sign("a/b", filename="b.png", now=NOW))

    with pytest.raises(LinkInvalid):
        Links(SECRET).verify(**{"key": key, **query, **change}, now=NOW)


def test_a_wrong_expiry_that_is_signed_is_still_refused() -> None:
    links = Links(SECRET)

    with pytest.raises(LinkInvalid):
        links.verify("a", "soon", links._signature("a", "soon", None), now=NOW)


def test_a_forged_link_that_is_also_old_is_not_called_expired() -> None:
    key, query = opened(Links(b"another secret, as long").sign("a", now=NOW))

    with pytest.raises(LinkInvalid):
        Links(SECRET).verify(key, **query, now=NOW + 10_000)


def test_parts_cannot_be_moved_between_key_and_filename() -> None:
    links = Links(SECRET)

    assert links._signature("ab", "1", "c") != links._signature("a", "1", "bc")
    assert links._signature("a", "1", None) != links._signature("a", "1", "")


def test_a_key_that_leaves_the_folder_is_not_signed() -> None:
    with pytest.raises(ValueError, match="key"):
        Links(SECRET).sign("../secret")


def test_a_signed_key_that_leaves_the_folder_is_still_refused() -> None:
    links = Links(SECRET)

    with pytest.raises(LinkInvalid):
        links.verify("../secret", "1800000900", links._signature("../secret", "1800000900", None), now=NOW)


def test_a_short_secret_is_refused() -> None:
    with pytest.raises(ValueError, match="16"):
        Links(b"short")
