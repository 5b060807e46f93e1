"""How fast vectors are made and searched: 10,000 chunks by the local model, then searches among 100,000.

    .venv/bin/python ops/bench/vectors.py [--made 10000] [--searched 100000]

The first 10,000 chunks (about 100 tokens each, sentences of the labelled passages in random order) get real vectors through
`embed_missing`; the others get vectors around those, since it is the search that is measured then. Searches are whole:
the question's vector, the index, the words, the fusion, the marks. Writes ops/bench/results/vectors.json.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import time
from pathlib import Path
from statistics import mean, quantiles

import numpy as np
import psutil
import retrieval_labels as labels
from idle import machine
from knowledge import ORGANIZATION, RESULTS, Context, add_document, key_of, own_system

from agentflow.knowledge import embedding_models, search, vector_index, vectors
from agentflow.knowledge.embedding import Refused
from agentflow.knowledge.encoder import as_text
from agentflow.knowledge.search import Filters
from agentflow.system import System

WORDS = 70
SEARCHES = 300


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--made", type=int, default=10_000, help="chunks that get real vectors, in thousands")
    parser.add_argument("--searched", type=int, default=100_000, help="chunks in all that are searched")
    options = parser.parse_args()
    chance = random.Random(7)
    figures: dict[str, object] = {"machine": machine()}
    with own_system() as system:
        keep(figures, making(system, chance, options.made))
        around(system, chance, options.searched - options.made)
        began = time.perf_counter()
        with system.database.connection() as conn:
            model = embedding_models.of_state(conn, "active")
        assert model is not None
        vector_index.ensure(system, ORGANIZATION, model)
        keep(figures, {"chunks searched": options.searched, "index s": round(time.perf_counter() - began, 1)})
        found = searching(system, chance)
        keep(figures, found)
    assert found["search p95 ms"] < 50
    assert found["recall@10 of the index against exact"] >= 0.98


def keep(figures: dict[str, object], more: dict[str, float]) -> None:
    figures.update(more)
    (RESULTS / "vectors.json").write_text(json.dumps(figures, indent=2) + "\n")
    for name, value in more.items():
        print(f"{name:40} {value}", flush=True)


def texts(count: int, chance: random.Random) -> list[str]:
    """Sentences of one language in random order, of about WORDS words; no two alike."""
    of_language: list[list[str]] = [
        [s for id, t in labels.passages().items() if id.startswith(tongue) for s in re.split(r"(?<=[.!?])\s+", t)]
        for tongue in ("en", "ru")
    ]
    made: dict[str, None] = {}
    while len(made) < count:
        sentences = chance.choice(of_language)
        text = ""
        while len(text.split()) < WORDS:
            text += chance.choice(sentences) + " "
        made[text.strip()] = None
    return list(made)


def making(system: System, chance: random.Random, count: int) -> dict[str, float]:
    documents = [add_document(system, f"real {n}", texts(1000, chance)) for n in range(count // 1000)]
    context = Context(system)
    vectors.embed_missing(context, add_document(system, "first", ["hello"]), share_done=0, share_end=1)  # type: ignore[arg-type]
    child = psutil.Process(system.embeddings.encoder_pid)
    before = child.cpu_times()
    began = time.perf_counter()
    made = sum(
        vectors.embed_missing(context, document, share_done=0, share_end=1)["vectors"]  # type: ignore[arg-type]
        for document in documents
    )
    seconds = time.perf_counter() - began
    after = child.cpu_times()
    assert made == count
    peak_kb = re.search(r"VmHWM:\s+(\d+)", Path(f"/proc/{child.pid}/status").read_text())
    assert peak_kb is not None
    used = after.user + after.system - before.user - before.system
    peak_mb = round(int(peak_kb.group(1)) / 1024)
    assert peak_mb < 400 and used / count * 10_000 < 600
    return {
        "chunks made": count,
        "minutes": round(seconds / 60, 2),
        "minutes for 10,000": round(seconds / count * 10_000 / 60, 2),
        "CPU seconds of the encoder for 10,000": round(used / count * 10_000, 1),
        "most memory of the encoder MB": peak_mb,
    }


def around(system: System, chance: random.Random, count: int) -> None:
    """The other chunks: words like the first, vectors near theirs."""
    with system.database.connection() as conn:
        model = embedding_models.of_state(conn, "active")
        assert model is not None
        rows = conn.execute(
            "select vector::text from agentflow.vectors where organization_id = %s and model_id = %s", (1, model.id)
        ).fetchall()
    known = np.array([json.loads(row[0]) for row in rows], dtype=np.float32)
    noise = np.random.default_rng(7)
    for n in range(count // 1000):
        fresh = texts(1000, chance)
        add_document(system, f"around {n}", fresh)
        near = known[noise.integers(0, len(known), 1000)] + noise.normal(0, 0.03, (1000, model.dimensions))
        near /= np.linalg.norm(near, axis=1, keepdims=True)
        with system.database.transaction() as conn:
            vector_index.find_types(conn)
            conn.execute(
                "insert into agentflow.vectors (organization_id, model_id, chunk_key, vector)"
                " select %s, %s, n.key, n.vector::halfvec from unnest(%s::bytea[], %s::text[]) n(key, vector)",
                (ORGANIZATION, model.id, [key_of(text) for text in fresh], [as_text(row) for row in near.tolist()]),
            )
    with system.database.connection() as conn:
        conn.execute("analyze agentflow.chunks, agentflow.vectors, agentflow.documents")


def searching(system: System, chance: random.Random) -> dict[str, float]:
    questions = [question.text for question in labels.questions()]
    questions += [" ".join(chance.sample(text.split(), 6)) for text in texts(SEARCHES - len(questions), chance)]
    with system.database.connection() as conn:
        model = embedding_models.of_state(conn, "active")
        assert model is not None
        assert vector_index.exists(conn, ORGANIZATION, model.id)
    chance.shuffle(questions)
    for question in questions[:20]:
        search.search(system, ORGANIZATION, question)
    took = []
    for question in questions:
        began = time.perf_counter()
        assert search.search(system, ORGANIZATION, question).hits
        took.append((time.perf_counter() - began) * 1000)
    recalls = [recall(system, model, question) for question in questions[:100]]
    return {
        "searches": len(took),
        "search p50 ms": round(quantiles(took, n=100)[49], 1),
        "search p95 ms": round(quantiles(took, n=100)[94], 1),
        "recall@10 of the index against exact": round(mean(recalls), 4),
    }


def recall(system: System, model: embedding_models.EmbeddingModel, question: str) -> float:
    vector = system.embeddings.question(Context(system), model, question)
    assert not isinstance(vector, Refused)
    with system.database.transaction() as conn:
        by_index = list(search._nearest(conn, ORGANIZATION, model, vector, Filters()).items())[:10]
    with system.database.transaction() as conn:
        vector_index.find_types(conn)
        given = {"organization": ORGANIZATION, "vector": vector, "most": 10}
        query = search._nearest_query(ORGANIZATION, model, Filters(), by_index=False)
        exact = search._read(conn, query, given)
    furthest = max(exact.values()) + 1e-6  # of two at the same distance, either will do
    return sum(distance <= furthest for _, distance in by_index) / 10


if __name__ == "__main__":
    main()
