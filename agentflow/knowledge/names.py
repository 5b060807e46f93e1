"""Names of people and things, taken apart: words, initials, numbers, legal forms, and how they sound in Latin letters."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final


def _listed(words: str) -> frozenset[str]:
    return frozenset(words.split())


#: Legal forms by family: of two names with forms of different families it is not sure that they mean one company.
_LEGAL_FORMS: Final[Mapping[str, str]] = {
    form: family
    for family, forms in {
        "limited": "ооо llc ltd limited gmbh sarl srl bv pte pty ug oy ab as",
        "stock": "ао пао оао зао нао inc incorporated corp corporation plc ag aktiengesellschaft sa nv spa se kk pjsc jsc"
        " ojsc cjsc co company",
        "sole": "ип",
        "state": "фгуп гуп муп фгбу фгбоу гбу мбу нко ано",
    }.items()
    for form in forms.split()
}
_LONG_FORMS: Final[Mapping[str, str]] = {
    "общество с ограниченной ответственностью": "ооо",
    "публичное акционерное общество": "пао",
    "открытое акционерное общество": "оао",
    "закрытое акционерное общество": "зао",
    "акционерное общество": "ао",
    "индивидуальный предприниматель": "ип",
    "limited liability company": "llc",
}
_TITLES: Final = _listed("dr mr mrs ms prof professor sir madam jr sr phd господин госпожа проф доктор")
_PLACE_WORDS: Final = _listed("г гор город city town")
_STOP_WORDS: Final = _listed("the and of и for de")
_SAINT: Final = re.compile(r"\bst\b\.?(?=\s)")
_DOTTED: Final = re.compile(r"\b(?:[^\W\d_]\.\s?){2,}")
_APOSTROPHES: Final = re.compile(r"['’ʼ`´]")
_WORDS: Final = re.compile(r"[^\W_]+")
_ROMAN: Final = re.compile(r"(?=[ivx]{2,})x{0,2}(?:ix|iv|v?i{0,3})")
_PATRONYMIC: Final = re.compile(r"(?:[ое]вич|[кмь]ич|vich)(?:а|у|ем|е)?$|(?:[ое]вн|иничн)(?:а|ы|е|у|ой|ою)$|[oe]vna$")
#: Endings of Russian declension. Not -ов and -ев: they end more surnames than plurals.
_ENDINGS: Final = _listed(
    "ами ями ого его ому ему ыми ими ой ей ом ем ым им ую юю ая яя ою ею ах ях ий ый ых их а я у ю е ы и о й ь"
)
_LEAST_STEM: Final = 3
_LETTERS: Final = str.maketrans({"ø": "o", "ł": "l", "æ": "ae", "œ": "oe", "đ": "d", "ı": "i", "ё": "е", "&": " and "})
_CYRILLIC: Final = dict(
    zip(
        "абвгдежзийклмнопрстуфхцчшщъыьэюяіїєґ",
        re.split(" ", "a b v g d e zh z i y k l m n o p r s t u f kh ts ch sh shch  y  e yu ya i yi ye g"),
        strict=True,
    )
)
#: Letters of the two alphabets that look alike, for numbers such as 1С.
_LOOK_ALIKE: Final = str.maketrans("авекмнорстух", "abekmhopctyx")
#: Ways to write one sound, and letters that romanizations disagree about.
_SOUNDS: Final = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        ("dzh", "j"),
        ("x", "ks"),
        ("ph", "f"),
        ("ck", "k"),
        ("kh", "h"),
        ("qu", "kv"),
        ("tz", "ts"),
        ("w", "v"),
        ("c(?!h)", "k"),
        ("y", "i"),
        ("ie|io", "e"),
        ("([aou])e", r"\1"),
        (r"(.)\1+", r"\1"),
    )
)


@dataclass(frozen=True, slots=True)
class Word:
    """One word of a name: as it is spelled (folded), and as it sounds."""

    plain: str
    sound: str

    @property
    def is_initial(self) -> bool:
        return len(self.plain) == 1

    @property
    def is_cyrillic(self) -> bool:
        return "а" <= self.plain[0] <= "я"

    @property
    def is_patronymic(self) -> bool:
        return _PATRONYMIC.search(self.plain) is not None

    @property
    def stem(self) -> str:
        """Without the longest ending of Russian declension."""
        if self.is_cyrillic:
            for length in (3, 2, 1):
                if len(self.plain) - length >= _LEAST_STEM and self.plain[-length:] in _ENDINGS:
                    return self.plain[:-length]
        return self.plain

    @property
    def consonants(self) -> str:
        return re.sub("[aeiou]", "", self.sound) or self.sound


@dataclass(frozen=True, slots=True)
class Name:
    """`words` without titles, legal forms and words like "city"; `numbers` are words with a digit and Roman numerals."""

    type: str
    without_form: str
    words: tuple[Word, ...]
    numbers: tuple[str, ...]
    families: frozenset[str]

    @property
    def plain(self) -> str:
        return "".join(word.plain for word in self.words)

    @property
    def sound(self) -> str:
        return "".join(word.sound for word in self.words)

    @property
    def initials(self) -> str:
        """How an abbreviation of it sounds."""
        return sound_of("".join(word.plain[0] for word in self.words))


def key_of(name: str) -> str:
    """The same for spellings that differ in case, ё, quotes, dots and spaces alone: such names are one without a question."""
    folded = unicodedata.normalize("NFKC", name).casefold().replace("ё", "е")
    return " ".join(_WORDS.findall(_APOSTROPHES.sub("", folded.replace("&", " and "))))


def parse(type_: str, name: str) -> Name:
    text = _folded(name)
    families: set[str] = set()
    if type_ == "organization":
        for long, short in _LONG_FORMS.items():
            text = text.replace(long, short)
    spelled = " ".join(word for word in _WORDS.findall(text) if word not in _LEGAL_FORMS)
    if type_ != "person":
        text = _DOTTED.sub(lambda match: re.sub(r"[.\s]", "", match[0]) + " ", text)
        text = _SAINT.sub("saint", text)
    words = _WORDS.findall(text)
    kept = [word for word in words if not _is_dropped(type_, word)] or words  # there is a band called The The
    if type_ == "organization":
        families = {_LEGAL_FORMS[word] for word in words if word in _LEGAL_FORMS}
    numbers = [word for number, word in enumerate(kept) if _is_number(word, number)]
    return Name(
        type_,
        spelled,
        tuple(Word(word, sound_of(word)) for word in kept if word not in numbers),
        tuple(word.translate(_LOOK_ALIKE) for word in numbers),
        frozenset(families),
    )


def sound_of(word: str) -> str:
    sound = "".join(_CYRILLIC.get(letter, letter) for letter in word)
    for pattern, replacement in _SOUNDS:
        sound = pattern.sub(replacement, sound)
    return sound


def are_forms(one: Word, other: Word) -> bool:
    """Whether both may be forms of one Russian word: the same but for endings of declension."""
    if not (one.is_cyrillic and other.is_cyrillic):
        return False
    pairs = zip(one.plain, other.plain, strict=False)
    common = next((at for at, (a, b) in enumerate(pairs) if a != b), min(len(one.plain), len(other.plain)))
    return any(
        {one.plain[at:], other.plain[at:]} <= _ENDINGS | {""} for at in range(max(_LEAST_STEM, common - 2), common + 1)
    )


def _folded(name: str) -> str:
    folded = unicodedata.normalize("NFKC", name).casefold().translate(_LETTERS)
    # Marks go from Latin letters alone: й is a letter of its own.
    return _APOSTROPHES.sub("", "".join(_bare(letter) for letter in folded))


def _bare(letter: str) -> str:
    base = unicodedata.normalize("NFD", letter)[0]
    return base if base.isascii() else letter


def _is_dropped(type_: str, word: str) -> bool:
    match type_:
        case "person":
            return word in _TITLES
        case "organization":
            return word in _LEGAL_FORMS or word in _STOP_WORDS
        case "place":
            return word in _PLACE_WORDS or word in _STOP_WORDS
    return word in _STOP_WORDS


def _is_number(word: str, position: int) -> bool:
    return any(letter.isdigit() for letter in word) or (position > 0 and _ROMAN.fullmatch(word) is not None)
