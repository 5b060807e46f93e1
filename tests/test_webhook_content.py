"""Bodies of webhooks as values, what Kommo's name, and templates of payloads."""

from __future__ import annotations

from typing import Any

import pytest

from actors.handle_webhook import kommo
from agentflow.webhooks import content, mapping, places
from tests.webhook_support import FORM


@pytest.mark.parametrize(
    ("form", "expected"),
    [
        (
            "leads%5Bstatus%5D%5B0%5D%5Bid%5D=25399013&leads%5Bstatus%5D%5B0%5D%5Bstatus_id%5D=142",
            {("leads", 25399013)},
        ),
        ("contacts[add][0][id]=1&contacts[add][0][type]=contact", {("contacts", 1)}),
        ("contacts[add][0][id]=1&contacts[add][0][type]=company", {("companies", 1)}),
        (
            "contacts[add][0][id]=1&contacts[add][0][type]=company&contacts[add][0][type][x]=y",
            {("companies", 1)},
        ),
        ("companies[delete][0][id]=2", {("companies", 2)}),
        ("task[update][0][id]=3&task[update][0][element_id]=9", {("tasks", 3)}),
        (
            "leads[note][0][note][id]=8&leads[note][0][note][element_type]=2&leads[note][0][note][element_id]=77"
            "&leads[note][0][note][type]=3&leads[note][0][note][type][message_uuid]=u",
            {("leads", 77)},
        ),
        ("contacts[note][0][note][element_type]=3&contacts[note][0][note][element_id]=4", {("companies", 4)}),
        (
            "message[add][0][id]=m&message[add][0][contact_id]=11&message[add][0][entity_type]=lead"
            "&message[add][0][entity_id]=12",
            {("contacts", 11), ("leads", 12)},
        ),
        ("unsorted[delete][0][action]=accept&unsorted[delete][0][accept_result][leads][0]=21", {("leads", 21)}),
        (
            "leads[update][0][id]=5&leads[update][10][id]=6&leads[update][2][id]=7",
            {("leads", 5), ("leads", 6), ("leads", 7)},
        ),
        ("leads[add][0][id]=-5&leads[add][1][id]=9999999999999999999999&leads[add][2][id]=x&leads=1", set()),
    ],
)
def test_what_kommo_names(form: str, expected: set[tuple[str, int]]) -> None:
    parsed = content.parse(form.encode(), FORM["Content-Type"])

    assert set(kommo.entities_of(parsed)) == expected


@pytest.mark.parametrize(
    ("pairs", "expected"),
    [
        ([("a", "1"), ("b", "")], {"a": "1", "b": ""}),
        ([("a[b][0]", "1"), ("a[b][1]", "2")], {"a": {"b": {"0": "1", "1": "2"}}}),
        ([("a[]", "1"), ("a[]", "2")], {"a": {"0": "1", "1": "2"}}),
        ([("a[t]", "3"), ("a[t][u]", "x")], {"a": {"t": {"_value": "3", "u": "x"}}}),
        ([("a[t][u]", "x"), ("a[t]", "3")], {"a": {"t": {"u": "x", "_value": "3"}}}),
        (
            [("a[b", "1"), ("a]b", "2"), ("[x]", "3"), ("a[b]c", "4")],
            {"a[b": "1", "a]b": "2", "_": {"x": "3"}, "a[b]c": "4"},
        ),
        ([("a" + "[b]" * 40, "1")], {"a" + "[b]" * 40: "1"}),
    ],
)
def test_keys_with_brackets_are_objects_in_objects(pairs: list[tuple[str, str]], expected: Any) -> None:
    assert content.nested(pairs) == expected


def test_a_place_is_a_pointer_a_header_or_of_the_event() -> None:
    body = {"a": [{"b/c": 1, "~": 2}], "null": None, "": 3}
    found = [
        places.read(place, body, {"x-id": "h"}, {"type": "t"})
        for place in ("/a/0/b~1c", "/a/0/~0", "/null", "/", "header:X-Id", "event:type")
    ]

    assert found == [1, 2, None, 3, "h", "t"]
    for nowhere in ("/a/1", "/a/00", "/a/-", "/a/0/b/c", "/b", "header:X-Other", "event:id"):
        assert places.read(nowhere, body, {}, {}) is places.MISSING


def test_a_template_is_filled_at_any_depth() -> None:
    template = {"a": [{"$from": "/x"}, 1, {"b": {"$from": "/none", "default": [2]}}], "c": "constant"}

    assert mapping.fill(template, lambda place: "found" if place == "/x" else places.MISSING) == {
        "a": ["found", 1, {"b": [2]}],
        "c": "constant",
    }
    with pytest.raises(mapping.Unmappable, match="has nothing at /x"):
        mapping.fill(template, lambda _: places.MISSING)
    with pytest.raises(mapping.Unmappable, match="nothing else"):
        mapping.fill({"a": {"$from": "/x", "b": 1}}, lambda _: 1)
