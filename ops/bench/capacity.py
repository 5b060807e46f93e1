"""Writes the tables of ops/capacity.md: what was measured, times the plans' sizes and prices, for a stated mix of jobs.

    .venv/bin/python ops/bench/capacity.py            rewrites the tables
    .venv/bin/python ops/bench/capacity.py --check    exit status 1 where one differs from its figures

Measured: ops/bench/results. Plans and prices, each with where it was read and when: ops/bench/plans.json. Loads, kinds of jobs,
their mixes, and all that is assumed: ops/bench/kinds.json. Run it after any of them has changed.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Final

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

from ops.bench.sizing.figures import Figures  # noqa: E402
from ops.bench.sizing.tables import TABLES  # noqa: E402

DOCUMENT = ROOT / "ops/capacity.md"
_PART: Final = re.compile(r"<!-- (\w+): [^>]*capacity\.py[^>]* -->\n(.*?)<!-- end of \1 -->", re.DOTALL)


def parts(text: str) -> dict[str, str]:
    """Each table that stands in a document, by its name."""
    return dict(_PART.findall(text))


def rewritten(text: str, figures: Figures) -> str:
    """With each table as its figures are. Raises KeyError for a name that is no table's."""

    def anew(found: re.Match[str]) -> str:
        name, whole = found[1], found[0]
        begin = whole[: whole.index("\n") + 1]
        return f"{begin}\n{TABLES[name](figures)}\n<!-- end of {name} -->"

    return _PART.sub(anew, text)


def differing(text: str, figures: Figures) -> Iterator[str]:
    """Names of tables that are not as their figures are, or are missing."""
    written = parts(text)
    for name, made in TABLES.items():
        if written.get(name) != f"\n{made(figures)}\n":
            yield name


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing")
    options = parser.parse_args()
    figures = Figures()
    text = DOCUMENT.read_text()
    names = list(differing(text, figures))
    if not options.check:
        DOCUMENT.write_text(rewritten(text, figures))
    print(f"{'differ' if options.check else 'written'}: {', '.join(names) or 'none'}")
    return 1 if options.check and names else 0


if __name__ == "__main__":
    sys.exit(main())
