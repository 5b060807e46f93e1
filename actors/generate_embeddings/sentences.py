"""Where sentences end, in Russian and English: a full stop after an abbreviation, an initial or a number is none."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Final

_END: Final = re.compile(r"(?:[.!?…]+[\"'»”’)\]]*|\n)\s+|(?<=[。！？])")
_LAST_WORD: Final = re.compile(r"(\w[\w.\-]*)$")

#: Never the end of a sentence: something follows that belongs to them.
_OPEN: Final = frozenset(
    (  # noqa: SIM905 - a list for people
        "mr mrs ms messrs dr prof st vs fig figs no nos vol pp ed eds cf approx dept gen col sgt capt rev hon e.g i.e al"
        " т.е т.к т.н т см ср рис табл стр гл ул пл просп пер им проф акад доц д-р тов гр напр св ст п пп н.э и.о"
        " англ лат нем фр тел обл р-н корп кв"
    ).split()
)
#: The end only where a capital letter follows: "in 2020 г. Компания", "5 руб. Доставка".
_CLOSED: Final = frozenset(
    (  # noqa: SIM905 - a list for people
        "etc inc ltd co corp jr sr a.m p.m u.s u.k jan feb mar apr jun jul aug sep sept oct nov dec"
        " г гг в вв руб коп тыс млн млрд др т.д т.п пр чел шт мин сек ч кг см мм км"
    ).split()
)


def spans(text: str) -> Iterator[tuple[int, int]]:
    """[start, end) of each sentence, without the white space after it. Together they hold everything else."""
    start = 0
    for match in _END.finditer(text):
        if match.end() < len(text) and _ends(
            text[start : match.start() + 1].rstrip(), match.group(), text[match.end() :]
        ):
            yield start, match.start() + len(match.group().rstrip())
            start = match.end()
    end = len(text.rstrip())
    if start < end:
        yield start, end


def _ends(before: str, mark: str, after: str) -> bool:
    if "\n" in mark and not mark.strip():
        return True
    following = after.lstrip("\"'«“‘([—–- ")[:1]
    if following.islower():
        return False
    if not mark.startswith(".") or mark.startswith(".."):
        return True
    found = _LAST_WORD.search(before.rstrip("."))
    if found is None:
        return True
    word = found.group(1)
    lower = word.lower()
    if lower in _CLOSED:
        # "г. Москва" names a town, "в 2020 г. Москва" ends a sentence.
        return following.isupper() and (lower not in ("г", "в") or before[: found.start()].rstrip()[-1:].isdigit())
    if lower in _OPEN:
        return False
    is_initial = len(word) == 1 and word.isalpha()  # also "д. 5", "с. 12"
    is_number_of_list = word.isdigit() and found.start() == 0
    return not (is_initial or is_number_of_list)
