"""Cursors and what else callers carry for us: they come back as they were, and what others make up is refused."""

from __future__ import annotations

import base64
from typing import Any
from uuid import UUID, uuid4

import pytest
from hypothesis import given
from hypothesis import strategies as st

from web.cursors import cursor_of, packed, read_cursor, unpacked
from web.problems import Refused

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(), lambda inner: st.lists(inner, max_size=4), max_leaves=8
)


@given(json_values)
def test_what_was_packed_comes_back_and_fits_into_a_url(value: Any) -> None:
    text = packed(value)

    assert unpacked(text) == value
    assert set(text) <= set("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_")


@pytest.mark.parametrize("value", ["", "a", "ab", "abc"])
def test_whatever_its_length(value: str) -> None:
    assert unpacked(packed(value)) == value


def test_a_job_of_a_cursor_is_the_one_that_was_shown_last() -> None:
    for last in (UUID(int=0), UUID(int=(1 << 128) - 1), uuid4()):
        assert read_cursor(cursor_of(last)) == last


@pytest.mark.parametrize(
    "made_up",
    ["", "x", "!!", "MQ", "WzEsMl0x", "W zFd", "[1]", "\u00e9", "\ud800", "W" * 100_000, b"[" * 100_000],
    ids=repr,
)
def test_what_was_made_up_is_refused(made_up: str | bytes) -> None:
    text = made_up if isinstance(made_up, str) else base64.urlsafe_b64encode(made_up).decode()
    with pytest.raises(Refused) as refused:
        read_cursor(text)
    assert refused.value.status == 422
    if made_up != "MQ":
        with pytest.raises(ValueError):
            unpacked(text)
