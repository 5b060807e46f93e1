"""The labelled questions that retrieval is measured with: 200 passages and 60 questions, half of each Russian.

    .venv/bin/python ops/bench/retrieval_labels.py

prints the set's hash, and for each question the word stems that it shares with its answers. The passages were written for this
project before the search was; more than half of the questions share no stem with what answers them.
"""

from __future__ import annotations

import hashlib
import sys
from dataclasses import dataclass
from pathlib import Path

import psycopg

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from agentflow import embedded

FOLDER = Path(__file__).resolve().parent / "retrieval"
FILES = ("passages-en.tsv", "passages-ru.tsv", "questions.tsv")


@dataclass(frozen=True)
class Question:
    id: str
    text: str
    answers: frozenset[str]

    @property
    def language(self) -> str:
        return self.id.partition("-")[0]


def passages() -> dict[str, str]:
    """Text by id."""
    lines = [line for name in FILES[:2] for line in (FOLDER / name).read_text(encoding="utf-8").splitlines()]
    return dict(line.split("\t") for line in lines)


def questions() -> list[Question]:
    lines = (FOLDER / FILES[2]).read_text(encoding="utf-8").splitlines()
    return [
        Question(id, text, frozenset(answers.split(","))) for id, answers, text in (line.split("\t") for line in lines)
    ]


def fingerprint() -> str:
    return hashlib.sha256(b"".join((FOLDER / name).read_bytes() for name in FILES)).hexdigest()


def shared_stems(conn: psycopg.Connection) -> dict[str, set[str]]:
    """By question: the Snowball stems, stop words left out, that it has in common with any of its answers."""
    # Postgres' Russian configuration stems words of Latin letters as English.
    ids = {**passages(), **{question.id: question.text for question in questions()}}
    stems = {
        id: set(row[0])
        for id, text in ids.items()
        if (row := conn.execute("select tsvector_to_array(to_tsvector('russian', %s))", (text,)).fetchone())
    }
    return {q.id: set().union(*(stems[q.id] & stems[answer] for answer in q.answers)) for q in questions()}


def main() -> None:
    print(f"sha256 {fingerprint()}")
    joined = embedded.join(Path(sys.argv[1]) if len(sys.argv) > 1 else embedded.default_home())
    try:
        with psycopg.connect(joined.database_url, autocommit=True) as conn:
            shared = shared_stems(conn)
    finally:
        joined.leave()
    for id, stems in shared.items():
        print(f"{id:8} {', '.join(sorted(stems)) or '-'}")
    unlike = [id for id, stems in shared.items() if not stems]
    assert len(passages()) == 200 and len(shared) == 60
    assert all(question.answers <= passages().keys() for question in questions())
    for language in ("en", "ru"):
        of_it = [id for id in unlike if id.startswith(language)]
        print(f"{language}: {len(of_it)} of 30 share no stem with an answer")
        assert len(of_it) >= 15


if __name__ == "__main__":
    main()
