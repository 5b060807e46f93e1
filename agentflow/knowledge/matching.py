"""Whether two names mean the same, as far as the names alone say it, and which names are worth comparing."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from difflib import SequenceMatcher
from functools import lru_cache
from typing import Final, Literal

from agentflow.knowledge.names import Name, Word, are_forms, parse, sound_of

#: same: one thing, spelled in two ways. weak: the one may be short for the other, unless others fit it as well. unsure: somebody
#: has to look. unlike: nothing speaks for it. different: something speaks against it, such as another number.
Likeness = Literal["same", "weak", "unsure", "unlike", "different"]
_BEST_FIRST: Final[tuple[Likeness, ...]] = ("same", "weak", "unsure", "different", "unlike")

_Relation = Literal["equal", "initial", "near", "none"]
_CLOSENESS: Final = {"equal": 3, "near": 2, "initial": 1, "none": 0}
#: From this share of common letters on, words of two alphabets may be one word.
_ALIKE: Final = 0.75

_parsed: Final = lru_cache(maxsize=5000)(parse)  # names come again and again; texts do not

_BANDS: Final = 24
_ROWS: Final = 2
_PRIME: Final = (1 << 61) - 1
_random = random.Random(1)  # the same in every process: the keys are stored
_PERMUTATIONS: Final = [(_random.randrange(1, _PRIME), _random.randrange(_PRIME)) for _ in range(_BANDS * _ROWS)]


@lru_cache(maxsize=10_000)
def compare(type_: str, one: str, other: str) -> Likeness:
    """Symmetric: the order of the two does not matter."""
    a, b = _parsed(type_, one), _parsed(type_, other)
    if "sole" in a.families & b.families:  # whoever trades under his own name
        a, b = (parse("person", name.without_form) for name in (a, b))
    return _people(a, b) if a.type == "person" else _things(a, b)


# ---- people ----


def _people(a: Name, b: Name) -> Likeness:
    if a.numbers and b.numbers and a.numbers != b.numbers:
        return "different"
    found = [_with_surnames(*one, *other) for one in _surnames(a) for other in _surnames(b)]
    return min(found, key=_BEST_FIRST.index, default="unlike")


def _surnames(name: Name) -> Iterator[tuple[Word, tuple[Word, ...]]]:
    """The ways to read it: the surname stands last or first, and is no initial."""
    words = name.words
    if words and not words[-1].is_initial:
        yield words[-1], words[:-1]
    if len(words) > 1 and not words[0].is_initial:
        yield words[0], words[1:]


def _with_surnames(one: Word, ones: tuple[Word, ...], other: Word, others: tuple[Word, ...]) -> Likeness:
    surname = _relation(one, other)
    if surname == "none":
        return "unlike"
    if not ones or not others:
        return "unsure" if surname == "equal" and (ones or others) else "same" if surname == "equal" else "unsure"
    relations = [_relation(*pair) for pair in zip(ones, others, strict=False)]
    if "none" in relations:
        return "different" if surname == "equal" else "unlike"
    if surname == "near" or "near" in relations:
        # Александра Волкова may be a woman, or the genitive of a man; a patronymic tells.
        words = ((one, other), *zip(ones, others, strict=False))
        declined = len(ones) == len(others) and all(are_forms(*pair) for pair in words)
        return "same" if declined and any(word.is_patronymic for word in ones) else "unsure"
    longer = max(ones, others, key=len)
    extra = longer[len(relations) :]
    if not extra and "initial" not in relations:
        return "same"
    shorter = min(ones, others, key=len)
    if extra and any(mine.is_initial and not theirs.is_initial for mine, theirs in zip(longer, shorter, strict=False)):
        return "unsure"  # J. A. Smith and John Smith: each says something that the other does not
    # A second name that only one of the two has is another person's as often as not, but for patronymics and initials.
    return "weak" if all(word.is_patronymic or word.is_initial for word in extra) else "unsure"


# ---- everything else ----


def _things(a: Name, b: Name) -> Likeness:
    if a.numbers != b.numbers:
        return "different"
    crosses = any(word.is_cyrillic for word in a.words) != any(word.is_cyrillic for word in b.words)
    if a.plain == b.plain or (crosses and a.sound == b.sound) or _is_declined(a, b):
        return "same" if not (a.families and b.families) or a.families & b.families else "unsure"
    if a.type == "product" and a.numbers and _has_maker_before(a, b):
        return "weak"
    return "unsure" if _may_be_same(a, b, crosses) else "unlike"


def _is_declined(a: Name, b: Name) -> bool:
    """Of one word alone it is not sure: Пушкин and Пушкино are two towns."""
    pairs = zip(a.words, b.words, strict=False)
    return len(a.words) == len(b.words) > 1 and all(are_forms(one, other) for one, other in pairs)


def _has_maker_before(a: Name, b: Name) -> bool:
    """Apple iPhone 15 Pro and iPhone 15 Pro. A word behind is another model."""
    shorter, longer = sorted(([word.plain for word in name.words] for name in (a, b)), key=len)
    return len(longer) == len(shorter) + 1 and longer[1:] == shorter != []


def _may_be_same(a: Name, b: Name, crosses: bool) -> bool:
    shorter, longer = sorted((a.words, b.words), key=len)
    if not shorter:
        return False
    relations = _paired(shorter, longer)
    if len(shorter) == len(longer):
        strange = relations.count("none")
        # Another order, a declined form, a letter more; between two alphabets one word of three may be translated.
        if strange == 0 or (crosses and strange == 1 and len(shorter) > 2):
            return True
    elif all(relation == "equal" for relation in relations):
        return True  # a word more
    return _distance_is_one(a.plain, b.plain) or _abbreviates(shorter, longer) or _abbreviates(longer, shorter)


def _paired(shorter: tuple[Word, ...], longer: tuple[Word, ...]) -> list[_Relation]:
    """How each word of the shorter is related to the word of the longer that suits it best; each is taken once."""
    left = list(longer)
    relations = []
    for word in shorter:
        best = max(left, key=lambda each: _CLOSENESS[_relation(word, each)])
        relations.append(_relation(word, best))
        left.remove(best)
    return relations


def _abbreviates(short: tuple[Word, ...], long: tuple[Word, ...]) -> bool:
    """Whether each word of the one is a word of the other, or the first letters of several that follow each other."""
    at, abbreviated = 0, False
    for word in short:
        if at < len(long) and word.sound == long[at].sound:
            at += 1
            continue
        run = long[at : at + len(word.plain)]
        if len(run) < len(word.plain) or [each.plain[0] for each in run] != list(word.plain):
            return False
        at += len(run)
        abbreviated = True
    return abbreviated and at == len(long) and len(long) > 1


# ---- words ----


def _relation(one: Word, other: Word) -> _Relation:
    if one.is_initial or other.is_initial:
        short, long = sorted((one, other), key=lambda word: len(word.plain))
        if one.is_initial and other.is_initial:
            return "equal" if one.sound == other.sound else "none"
        return "initial" if long.sound.startswith(short.sound) else "none"
    if one.plain == other.plain:
        return "equal"
    if one.is_cyrillic != other.is_cyrillic:
        if one.sound == other.sound:
            return "equal"
        alike = _share_alike(one.sound, other.sound) >= _ALIKE
        return "near" if alike or one.consonants == other.consonants else "none"
    if one.sound == other.sound or are_forms(one, other) or _distance_is_one(one.plain, other.plain):
        return "near"
    return "none"


def _share_alike(one: str, other: str) -> float:
    first, second = sorted((one, other))  # difflib's ratio depends on the order
    return SequenceMatcher(None, first, second, autojunk=False).ratio()


def _distance_is_one(one: str, other: str) -> bool:
    """One letter more, less, another, or two that changed places; not in short words, which differ so all the time."""
    short, long = sorted((one, other), key=len)
    if len(short) < 4 or len(long) < 5 or len(long) - len(short) > 1:
        return False
    at = next((n for n, letter in enumerate(short) if letter != long[n]), len(short))
    if len(long) > len(short):
        return short[at:] == long[at + 1 :]
    swapped = short[at : at + 2] == long[at : at + 2][::-1]
    return short[at + 1 :] == long[at + 1 :] or (swapped and short[at + 2 :] == long[at + 2 :])


def occurs(type_: str, name: str, text: str) -> bool:
    """Whether a text calls something by this name, or at least by half of its words, in whatever form; all numbers have to be
    there."""
    wanted, there = _parsed(type_, name), parse(type_, text)
    if not set(wanted.numbers) <= set(there.numbers):
        return False
    words = [word for word in wanted.words if not word.is_initial] or list(wanted.words)
    found = sum(any(_relation(word, each) in ("equal", "near") for each in there.words) for word in words)
    return found * 2 >= len(words) and (found > 0 or bool(wanted.numbers))


# ---- which to compare ----


def near_keys(organization_id: int, type_: str, name: str) -> list[int]:
    """Two names are near when they have a key in common; signed 64-bit numbers, of one organization and type.

    Bands of a MinHash over the trigrams (A. Broder, 1997; LSH: Indyk and Motwani, 1998): names that share 40 % of their
    trigrams meet with 98 %, those that share 10 % with 21 %. Beside them what trigrams cannot see: initials, vowels that
    were written otherwise.
    """
    parsed = parse(type_, name)
    words = parsed.words
    signs = [f"sound {parsed.sound}", "consonants " + " ".join(sorted(word.consonants for word in words))]
    if type_ == "person":
        signs += [
            f"surname {sound} {other.sound[:1]}"
            for word in words
            for sound in {word.consonants, sound_of(word.stem)}
            for other in words
            if other is not word and not word.is_initial
        ]
    elif len(words) > 1:
        signs.append(f"sound {parsed.initials}")
    signs += [f"band {number} {band}" for number, band in enumerate(_bands(words))]
    prefix = f"{organization_id} {type_} "
    return sorted({_hash(prefix + sign) - (1 << 63) for sign in signs})


def _bands(words: tuple[Word, ...]) -> list[str]:
    padded = [f" {word.sound} " for word in words]
    shingles = {_hash(word[n : n + 3]) % _PRIME for word in padded for n in range(len(word) - 2)}
    if not shingles:
        return []
    least = [min((a * shingle + b) % _PRIME for shingle in shingles) for a, b in _PERMUTATIONS]
    return [" ".join(map(str, least[n : n + _ROWS])) for n in range(0, len(least), _ROWS)]


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest())
