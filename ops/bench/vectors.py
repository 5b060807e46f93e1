"""How fast vectors are made and searched: 10,000 chunks by the local model, then searches among 100,000.

    .venv/bin/python ops/bench/vectors.py [--made 10000] [--searched 100000] [--home FOLDER]

A chunk is about 100 tokens: sentences of a few labelled passages, and among them invented words, of which some are in every
tenth chunk and most in a handful, as names and terms are. The first 10,000 get real vectors through `embed_missing`. The others
get vectors between two of those and a little beside, since it is the search that is measured then; how far they stand from
their nearest is printed for both kinds. Searches are whole: the question's vector, the index, the words, the fusion, the marks;
each question is asked in several rounds, and its best counts, because other programs run on the machine at the same time.
With a folder to keep the database in, a second run only searches. Writes ops/bench/results/vectors.json.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import re
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
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
from agentflow.knowledge.words import NO_FILTERS
from agentflow.system import System

WORDS = 62
SEARCHES = 100
ROUNDS = 3
COMPARED = 25
#: How far a vector that is not real stands beside the line between two that are.
ASIDE = 0.3
PASSAGES_IN_A_CHUNK = 3
INVENTED = 30_000
SYLLABLES = {
    "en": ["bra", "ten", "lo", "mir", "vask", "do", "ul", "pre", "sin", "gar", "fe", "nock", "tri", "sal", "bo", "wen"],
    "ru": ["бра", "тен", "ло", "мир", "васк", "до", "уль", "пре", "син", "гар", "фе", "нок", "три", "сал", "бо", "вен"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--made", type=int, default=10_000, help="chunks that get real vectors, in thousands")
    parser.add_argument("--searched", type=int, default=100_000, help="chunks in all that are searched")
    parser.add_argument("--home", type=Path, help="where the database is kept for the next run")
    options = parser.parse_args()
    with own_system(options.home) as system:
        if not chunks(system):
            keep({"machine": machine()}, afresh=True)
            keep(making(system, random.Random(7), options.made))
        if (there := chunks(system)) < options.searched:
            around(system, range(there // 1000, options.searched // 1000))
            began = time.perf_counter()
            vector_index.ensure(system, ORGANIZATION, active(system))
            keep({"chunks searched": options.searched, "index s": round(time.perf_counter() - began, 1)})
        found = searching(system, random.Random(8))
        keep(found)
    assert float(found["search p95 ms"]) < 50
    assert float(found["recall@10 of the index against exact"]) >= 0.98


def keep(more: Mapping[str, object], *, afresh: bool = False) -> None:
    path = RESULTS / "vectors.json"
    figures = {} if afresh else json.loads(path.read_text())
    path.write_text(json.dumps({**figures, **more}, indent=2) + "\n")
    for name, value in more.items():
        print(f"{name:40} {value}", flush=True)


def chunks(system: System) -> int:
    with system.database.connection() as conn:
        row = conn.execute("select count(*) from agentflow.chunks").fetchone()
    return int(row[0]) if row is not None else 0


def active(system: System) -> embedding_models.EmbeddingModel:
    with system.database.connection() as conn:
        model = embedding_models.of_state(conn, "active")
    assert model is not None
    return model


def texts(count: int, chance: random.Random) -> list[str]:
    """Chunks of one language each, of about WORDS words; no two alike."""
    passages = {
        tongue: [re.split(r"(?<=[.!?])\s+", t) for id, t in labels.passages().items() if id.startswith(tongue)]
        for tongue in ("en", "ru")
    }
    invention = random.Random(9)  # the same words whenever texts are made
    invented = {
        tongue: list({"".join(invention.choices(of, k=4)): None for _ in range(INVENTED)})
        for tongue, of in SYLLABLES.items()
    }
    made: dict[str, None] = {}
    while len(made) < count:
        tongue = chance.choice(("en", "ru"))
        sentences = [s for passage in chance.sample(passages[tongue], PASSAGES_IN_A_CHUNK) for s in passage]
        words: list[str] = []
        while len(words) < WORDS:
            words += chance.choice(sentences).split()
        for at in range(3, len(words), 6):  # every rank as often as its number is small, as Zipf found
            rank = int(len(invented[tongue]) ** chance.random()) - 1
            words.insert(at, invented[tongue][rank])
        made[" ".join(words)] = None
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


def around(system: System, thousands: range) -> None:
    """The other chunks: words like the first, vectors between two of theirs."""
    model = active(system)
    with system.database.connection() as conn:
        rows = conn.execute(
            "select vector::text from agentflow.vectors where organization_id = %s and model_id = %s",
            (ORGANIZATION, model.id),
        ).fetchall()
    known = np.array([json.loads(row[0]) for row in rows], dtype=np.float32)

    def add(n: int) -> None:
        fresh = texts(1000, random.Random(f"chunks {n}"))
        near = between(known, 1000, np.random.default_rng(n))
        add_document(system, f"around {n}", fresh)
        with system.database.transaction() as conn:
            vector_index.find_types(conn)
            conn.execute(
                "insert into agentflow.vectors (organization_id, model_id, chunk_key, vector)"
                " select %s, %s, n.key, n.vector::halfvec from unnest(%s::bytea[], %s::text[]) n(key, vector)",
                (ORGANIZATION, model.id, [key_of(text) for text in fresh], [as_text(row) for row in near.tolist()]),
            )

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(add, thousands))
    with system.database.connection() as conn:
        conn.execute("analyze agentflow.chunks, agentflow.vectors, agentflow.documents")
    some = known[:2000]
    keep(
        {
            "median distance to the nearest of as many, real vectors": nearest(some),
            "median distance to the nearest of as many, others": nearest(
                between(known, len(some), np.random.default_rng(0))
            ),
        }
    )


def between(known: np.ndarray, count: int, numbers: np.random.Generator) -> np.ndarray:
    one, other = known[numbers.integers(0, len(known), count)], known[numbers.integers(0, len(known), count)]
    share = numbers.uniform(0.5, 1.0, (count, 1))
    aside = numbers.normal(0, ASIDE / math.sqrt(known.shape[1]), one.shape)
    made = share * one + (1 - share) * other + aside
    return np.asarray(made / np.linalg.norm(made, axis=1, keepdims=True))


def nearest(vectors: np.ndarray) -> float:
    likeness = vectors @ vectors.T
    np.fill_diagonal(likeness, -1)
    return round(float(np.median(1 - likeness.max(axis=1))), 3)


def searching(system: System, chance: random.Random) -> dict[str, float | str]:
    model = active(system)
    with system.database.connection() as conn:
        assert vector_index.exists(conn, ORGANIZATION, model.id)
    questions = [question.text for question in labels.questions()]
    questions += [" ".join(chance.sample(text.split(), 6)) for text in texts(SEARCHES - len(questions), chance)]
    chance.shuffle(questions)
    took(system, questions[0], [])
    assert system.embeddings.encoder_pid is not None
    pids = [system.embeddings.encoder_pid, *backends(system)]
    rounds = [[took(system, question, pids) for question in questions] for _ in range(ROUNDS)]
    best = [min(wall for wall, _ in of) for of in zip(*rounds, strict=True)]
    busy = [min(cpu for _, cpu in of) for of in zip(*rounds, strict=True)]
    recalls = [recall(system, model, question) for question in questions[:COMPARED]]
    return {
        "shared_buffers of Postgres": shared_buffers(system),
        "load while searching": round(os.getloadavg()[0], 1),
        "searches": len(questions) * ROUNDS,
        "search p50 ms": percentile(best, 50),
        "search p95 ms": percentile(best, 95),
        "search p95 ms of the best round": min(percentile([wall for wall, _ in of], 95) for of in rounds),
        "CPU of a search p50 ms": percentile(busy, 50),
        "CPU of a search p95 ms": percentile(busy, 95),
        "recall@10 of the index against exact": round(mean(recalls), 4),
    }


def percentile(values: Sequence[float], which: int) -> float:
    return round(quantiles(values, n=100)[which - 1], 1)


def took(system: System, question: str, pids: Sequence[int]) -> tuple[float, float]:
    """Milliseconds on the clock, and on a processor: of this process and those, which is what others' load adds nothing to."""
    began, used = time.perf_counter(), time.process_time() + sum(map(cpu_s, pids))
    assert search.search(system, ORGANIZATION, question).hits
    wall, busy = time.perf_counter() - began, time.process_time() + sum(map(cpu_s, pids)) - used
    return wall * 1000, busy * 1000


def cpu_s(pid: int) -> float:
    return int(Path(f"/proc/{pid}/schedstat").read_text().split()[0]) / 1e9


def shared_buffers(system: System) -> str:
    with system.database.connection() as conn:
        row = conn.execute("show shared_buffers").fetchone()
    return str(row[0]) if row is not None else ""


def backends(system: System) -> list[int]:
    with system.database.connection() as conn:
        rows = conn.execute(
            "select pid from pg_stat_activity where backend_type = 'client backend' and datname = current_database()"
        ).fetchall()
    return [row[0] for row in rows]


def recall(system: System, model: embedding_models.EmbeddingModel, question: str) -> float:
    vector = system.embeddings.question(Context(system), model, question)
    assert not isinstance(vector, Refused)
    with system.database.transaction() as conn:
        by_index = list(search._nearest(conn, ORGANIZATION, model, vector, NO_FILTERS).items())[:10]
    with system.database.transaction() as conn:
        vector_index.find_types(conn)
        given = {"organization": ORGANIZATION, "vector": vector, "most": 10}
        query = search._nearest_query(ORGANIZATION, model, NO_FILTERS, by_index=False)
        exact = search._read(conn, query, given)
    furthest = max(exact.values()) + 1e-6  # of two at the same distance, either will do
    return sum(distance <= furthest for _, distance in by_index) / 10


if __name__ == "__main__":
    main()
