"""Texts into chunks: exact offsets, bounds, sections, tables, sentences, and that little moves when little is changed."""

from __future__ import annotations

import itertools
import random
import string

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.generate_embeddings import chunks, language, sentences, tokens
from actors.generate_embeddings.passages import Passage, is_header, row

SIZE, OVERLAP = 64, 16

words = st.text(alphabet=string.ascii_letters + "абвгдежзЯЮ" + string.digits + ".,!?;-名前é", min_size=1, max_size=30)
paragraphs = st.lists(words, min_size=1, max_size=60).map(" ".join)
long_words = st.text(alphabet="abcЖ名1", min_size=100, max_size=900)
places = st.sampled_from([{}, {"page": 1}, {"page": 2}, {"slide": 3}, {"part": "notes", "start_s": 1.5, "end_s": 2.0}])
passages = st.lists(
    st.one_of(
        st.builds(Passage, paragraphs, place=places, tight=st.booleans()),
        st.builds(Passage, long_words, place=places),
        st.builds(Passage, words, st.just("heading"), st.integers(1, 3), places),
        st.builds(
            Passage,
            st.lists(words, min_size=2, max_size=40).map(row),
            st.just("row"),
            place=st.integers(1, 9).map(lambda number: {"row": number}),
            header=st.sampled_from([None, "Name | Price", "word | " * 60]),
        ),
    ),
    max_size=14,
)


@settings(max_examples=50, deadline=None)
@given(passages, st.integers(32, 120), st.integers(0, 16))
def test_each_chunk_is_a_piece_of_the_text_to_the_letter_and_within_bounds(
    given_passages: list[Passage], size: int, overlap: int
) -> None:
    text, found = chunks.cut(given_passages, size=size, overlap=overlap)
    again = chunks.cut(given_passages, size=size, overlap=overlap)

    assert (text, found) == again
    assert [chunk.position for chunk in found] == list(range(len(found)))
    covered = 0
    for chunk in found:
        assert text[chunk.start : chunk.end] == chunk.text
        assert chunk.text.strip() == chunk.text != ""
        assert 0 < chunk.tokens == tokens.count(chunk.text) <= size
        assert chunk.key == chunks.key_of(chunk.text)
        assert not text[covered : chunk.start].strip()  # nothing is left out
        assert chunk.end > covered  # each brings something new
        if chunk.start < covered:
            assert tokens.count(text[chunk.start : covered]) <= overlap
        covered = chunk.end
    assert not text[covered:].strip()
    kept = "".join(text.split())
    assert all("".join(each.text.split()) in kept for each in given_passages if each.style != "row")


def test_a_chunk_keeps_to_its_page_and_its_heading() -> None:
    body = "A sentence of seven words stands here. " * 12
    _text, found = chunks.cut(
        [
            Passage("Part", "heading", 1, {"page": 1}),
            Passage("First", "heading", 2, {"page": 1}),
            Passage(body, place={"page": 1}),
            Passage("Second", "heading", 2, {"page": 1}),
            Passage("Short.", place={"page": 1}),
            Passage(body, place={"page": 2}),
            Passage("Other", "heading", 1, {"page": 2}),
        ],
        size=SIZE,
        overlap=OVERLAP,
    )

    places = [(chunk.place["page"], chunk.place["heading"]) for chunk in found]
    assert found[0].text.startswith("Part\n\nFirst\n\nA sentence")
    assert sorted(set(map(str, places)), key=list(map(str, places)).index) == [
        "(1, ['Part', 'First'])",
        "(1, ['Part', 'Second'])",
        "(2, ['Part', 'Second'])",
        "(2, ['Other'])",
    ]
    assert next(chunk.text for chunk in found if chunk.text.startswith("Second")) == "Second\n\nShort."
    assert all(chunk.text.endswith(".") for chunk in found[:-1])


def test_the_next_chunk_repeats_whole_sentences_of_the_one_before() -> None:
    body = " ".join(f"Sentence {number} says a little about nothing." for number in range(40))

    _, found = chunks.cut([Passage(body)], size=SIZE, overlap=OVERLAP)

    assert len(found) > 4
    for one, two in itertools.pairwise(found):
        repeated = two.text[: one.end - two.start]
        assert one.start < two.start < one.end
        assert repeated.startswith("Sentence") and repeated.endswith(".") and one.text.endswith(repeated)


def test_each_chunk_of_a_table_begins_with_its_header() -> None:
    header = "Name | Price"
    table = [Passage(header, "row", place={"row": 1})] + [
        Passage(f"thing {number} | {number}", "row", place={"row": number}, header=header) for number in range(2, 80)
    ]

    text, found = chunks.cut([Passage("Before the table."), *table], size=SIZE, overlap=OVERLAP)

    assert len(found) > 5
    assert all(chunk.text.startswith(f"{header}\nthing ") for chunk in found[1:])
    rows = [(chunk.place["row"], chunk.place["row_end"]) for chunk in found]
    assert rows[0][0] == 1 and rows[-1][1] == 79
    assert all(one[1] + 1 == two[0] for one, two in itertools.pairwise(rows))
    assert text.count("thing 40 |") == 1


@pytest.mark.parametrize("seed", [0, 1, *(pytest.param(n, marks=pytest.mark.long) for n in range(2, 8))])
def test_an_insertion_moves_few_cuts(seed: int) -> None:
    """Paragraphs of one length: chunks that were filled one after the other would all be others from there on."""
    chance = random.Random(seed)
    vocabulary = ["".join(chance.choices(string.ascii_lowercase, k=3)) for _ in range(500)]

    body = [Passage(" ".join(chance.choices(vocabulary, k=10)) + ".") for _ in range(300)]
    changed = [*body[:40], Passage("one more has been put in between all the others now."), *body[40:]]

    before = {chunk.key for chunk in chunks.cut(body, size=SIZE, overlap=0)[1]}
    after = {chunk.key for chunk in chunks.cut(changed, size=SIZE, overlap=0)[1]}

    assert len(before) > 60
    assert len(after - before) <= 12


def test_a_key_depends_on_the_words_and_the_chunker_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    one = chunks.key_of("Cafe\u0301  is\nopen")

    assert one == chunks.key_of("Caf\u00e9 is open")
    assert one != chunks.key_of("Café is Open")
    monkeypatch.setattr(chunks, "CHUNKER", "other")
    assert one != chunks.key_of("Café is open")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("He came. She left! Did they? Yes…", ["He came.", "She left!", "Did they?", "Yes…"]),
        ("Mr. Holm met Dr. A. B. Smith at 5 p.m. Then they ate.", ["Mr. Holm met Dr. A. B. Smith at 5 p.m.", "Then they ate."]),
        ("Prices, e.g. Fig. 3, are in vol. 2 of it.", ["Prices, e.g. Fig. 3, are in vol. 2 of it."]),
        ("В 2024 г. Компания выросла, т. е. Стала больше.", ["В 2024 г.", "Компания выросла, т. е. Стала больше."]),
        ("Офис в г. Москва, ул. Мира, д. 5. Цена 5 тыс. руб. Звоните.",
         ["Офис в г. Москва, ул. Мира, д. 5.", "Цена 5 тыс. руб.", "Звоните."]),
        ("А. С. Пушкин родился в Москве. «Правда?» — спросил он.", ["А. С. Пушкин родился в Москве.", "«Правда?» — спросил он."]),
        ("Version 3.11 is out.Now.\nNext line", ["Version 3.11 is out.Now.", "Next line"]),
        ("今日は。明日も。", ["今日は。", "明日も。"]),
    ],
)  # fmt: skip
def test_sentences_end_where_they_do(text: str, expected: list[str]) -> None:
    assert [text[start:end] for start, end in sentences.spans(text)] == expected


def test_tokens_of_a_text_are_those_of_its_words() -> None:
    text = "Стоимость билета — 1200 руб., it's the price of 名前 and naïve_words."

    assert tokens.count(text) == sum(map(tokens.count, text.split()))
    assert tokens.count("") == tokens.count(" \n") == 0
    assert tokens.count("international") == 3
    assert tokens.count("名前") == 2


def test_languages_are_told_apart_and_short_texts_are_not_guessed() -> None:
    assert language.of("Паром отходит от причала в восемь часов утра.") == "ru"
    assert language.of("The ferry leaves the pier at eight in the morning.") == "en"
    assert language.of("12 | 48 | ok") is None
    assert language.most([("ru", 10), ("en", 30), (None, 99)]) == "en"
    assert language.most([(None, 5)]) is None


def test_a_row_names_columns_if_all_its_cells_are_words() -> None:
    assert is_header(["Name", "Price", ""])
    assert not is_header(["Name", "12"])
    assert not is_header(["Name", "", "Price"])
    assert not is_header(["Name"])
    assert row(["a", " b \n c", "", ""]) == "a | b c"
