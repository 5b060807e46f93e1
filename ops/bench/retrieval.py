"""How well search finds: recall@10 and nDCG@10 by vectors, by words and by both, over the labelled questions.

    .venv/bin/python ops/bench/retrieval.py

The labels (ops/bench/retrieval_labels.py) were written before the search. Writes ops/bench/results/retrieval.json.
"""

from __future__ import annotations

import json
import math
from statistics import mean
from typing import get_args

import retrieval_labels as labels
from idle import machine
from knowledge import ORGANIZATION, RESULTS, Context, add_document, own_system

from agentflow.knowledge import search, vectors
from agentflow.knowledge.search import Mode
from agentflow.system import System

TOP = 10
#: Fused may be so much below the better one of the two in a language, and not at all on the whole.
TOLERANCE = 0.02


def main() -> None:
    with own_system() as system:
        document = add_document(system, "passages", list(labels.passages().values()))
        made = vectors.embed_missing(Context(system), document, share_done=0.0, share_end=1.0)  # type: ignore[arg-type]
        with system.database.connection() as conn:
            unlike = [id for id, stems in labels.shared_stems(conn).items() if not stems]
        of_each = {mode: {q.id: measured(system, q, mode) for q in labels.questions()} for mode in get_args(Mode)}
    groups = {
        "en": [q.id for q in labels.questions() if q.language == "en"],
        "ru": [q.id for q in labels.questions() if q.language == "ru"],
        "sharing no stem": unlike,
        "all": [q.id for q in labels.questions()],
    }
    figures = {
        group: {
            mode: {
                "recall@10": round(mean(of[id][0] for id in ids), 4),
                "ndcg@10": round(mean(of[id][1] for id in ids), 4),
            }
            for mode, of in of_each.items()
        }
        for group, ids in groups.items()
    }
    result = {
        "machine": machine(),
        "labels sha256": labels.fingerprint(),
        "passages": len(labels.passages()),
        "questions": len(labels.questions()),
        "sharing no stem with an answer": len(unlike),
        "model": made["model"],
        **figures,
    }
    (RESULTS / "retrieval.json").write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n")
    print(json.dumps(result, indent=2, ensure_ascii=False))
    for measure in ("recall@10", "ndcg@10"):
        for group in ("en", "ru", "all"):
            best = max(figures[group][mode][measure] for mode in ("vector", "text"))
            least = best if group == "all" else best - TOLERANCE
            assert figures[group]["hybrid"][measure] >= least, f"{measure} of {group}: both together find less than one"


def measured(system: System, question: labels.Question, mode: Mode) -> tuple[float, float]:
    """Recall and nDCG of the first ten."""
    by_text = {text: id for id, text in labels.passages().items()}
    found = search.search(system, ORGANIZATION, question.text, limit=TOP, mode=mode)
    hits = [rank for rank, hit in enumerate(found.hits) if by_text[hit.text] in question.answers]
    ideal = sum(1 / math.log2(rank + 2) for rank in range(min(TOP, len(question.answers))))
    return len(hits) / len(question.answers), sum(1 / math.log2(rank + 2) for rank in hits) / ideal


if __name__ == "__main__":
    main()
