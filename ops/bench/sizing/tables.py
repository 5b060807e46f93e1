"""The tables of ops/capacity.md, each made of figures alone."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

from agentflow.worker.threads import regular
from ops.bench.sizing.figures import DAY_S, Figures
from ops.bench.sizing.installation import (
    RESULT_S,
    ROLES,
    SCHEDULER,
    WEB,
    WORKER,
    Bought,
    carries,
    cheapest,
    disk,
    fitting,
    instances,
    need,
    railway,
    redis_connections,
    total,
)

PLATFORMS: Final = ("Render", "Heroku", "Fly")
MONTH: Final = 30
#: Of one Redis, and jobs a second of one database: ops/decisions.md.
REDIS_COMMANDS, DATABASE_JOBS = 50_000, 5_000


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def kinds_table(figures: Figures) -> str:
    rows = []
    for kind in figures.kinds.values():
        row = [kind.title, seconds(kind.waits_s), seconds(kind.computes_s)]
        for threads in (25, figures.threads):
            rate, ended_by = carries(figures, kind, threads)
            row.append(f"{amount(figures.a_day(rate))} ({amount(rate)}/s at the peak; {ended_by})")
        at_once = f"{fitting(figures, kind, 512)}, {kind.memory_mb:.0f} MB each" if kind.memory_mb else "–"
        rows.append([*row, at_once, kind.source])
    many = figures.threads
    head = [
        "a job",
        "waits, s",
        "computes, s",
        "25 threads, a day",
        f"{many} threads, a day",
        "at once by memory",
        "from",
    ]
    return table(head, rows)


def job_table(figures: Figures) -> str:
    drain = "a drain of jobs that do nothing, `compare.json`"
    paced = f"{figures.of('footprint.json', 'rung by RabbitMQ/jobs a second')} jobs a second, `footprint.json`"
    small, large = figures.compared("drain", "postgres_cpu_us") / 1000, 1000 * figures.postgres_s
    result = figures.of("footprint.json", "kept/bytes of a result in Redis")
    rows = [
        ["a worker's processor", f"{1000 * figures.worker_s:.2f} ms", drain],
        ["Postgres' processor, small tables", f"{small:.2f} ms", drain],
        [
            "the same with ten million ended jobs and a million that wait",
            f"{large:.2f} ms",
            f"× {figures.growth:.1f}: `scale.json`",
        ],
        ["RabbitMQ's processor", f"{figures.compared('drain', 'rabbitmq_cpu_us') / 1000:.3f} ms", drain],
        ["Redis' processor, where RabbitMQ rings", f"{figures.compared('drain', 'redis_cpu_us') / 1000:.3f} ms", drain],
        ["commits", f"{figures.asked('rung by RabbitMQ', 'commits'):.1f}", paced],
        ["WAL, payload of 200 bytes", f"{figures.asked('rung by RabbitMQ', 'WAL bytes'):,.0f} bytes", paced],
        ["messages of RabbitMQ", f"{figures.asked('rung by RabbitMQ', 'messages of RabbitMQ'):.1f}", paced],
        ["commands to Redis, where RabbitMQ rings", f"{figures.asked('rung by RabbitMQ', 'commands to Redis'):.1f}", paced],
        ["commands to Redis, where it rings", f"{figures.asked('rung by Redis', 'commands to Redis'):.1f}", paced],
        [
            "rows and indexes while it is kept, payload of 200 bytes",
            f"{figures.of('footprint.json', 'kept/bytes of a job'):,} bytes, {figures.index_bytes:,.0f} of them indexes",
            "`footprint.json`",
        ],
        ["its slim row, after retention", f"{figures.deleted_bytes:,.0f} bytes", "`footprint.json`"],
        ["its result in Redis, for ten minutes", f"{result:,} bytes", "`footprint.json`"],
    ]  # fmt: skip
    return table(["one job", "takes", "measured in"], rows)


def computes_table(figures: Figures) -> str:
    rows = []
    for name in ("film", "text"):
        kind = figures.kinds[name]
        row = [kind.title, f"{amount(kind.computes_s)} s of a core ({kind.source})"]
        rows.append([*row, *(amount(figures.peak(a_day) * kind.computes_s) for a_day in figures.loads)])
    head = ["kind", "measured", *(f"cores at the peak of {a_day:,} a day" for a_day in figures.loads)]
    return table(head, rows)


def short_table(figures: Figures) -> str:
    peak = figures.peak(max(figures.loads))

    def row(what: str, rate: float, more: str, on: str = "") -> list[str]:
        return [what, f"{amount(rate)}/s{more}", f"{amount(peak)}/s: {math.ceil(peak / rate)}{on}"]

    p99 = figures.compared("http", "p99_ms_at_16")
    hooks, beside = (figures.of("webhooks.json", name) for name in ("latency", "latency_beside_the_worker"))
    rows = [
        row(
            "jobs of 20 ms, 16 threads, one worker beside its servers on two cores",
            figures.of("fairness.json", "fair/jobs_per_s"),
            " (`fairness.json`)",
        ),
        row(
            "jobs that do nothing, two workers with 8 slots each beside all servers on two cores",
            figures.compared("drain", "jobs_per_s"),
            " (`compare.json`)",
        ),
        row(
            "single jobs handed in over HTTP, one web process",
            figures.compared("http", "per_s_at_16"),
            f" with p99 {p99:.0f} ms (`compare.json`)",
        ),
        row(
            "jobs handed in by batches of 1,000 over HTTP, one web process",
            figures.compared("http", "batch_jobs_per_s"),
            " (`compare.json`)",
        ),
        row(
            "webhooks in, one web process",
            hooks["per_s"],
            f" with p99 {hooks['p99_ms']:.0f} ms; {beside['p99_ms']:.0f} ms with a busy worker on the same cores"
            " (`webhooks.json`)",
            ", on cores of its own",
        ),
    ]
    upload = figures.of("upload.json", "MB per second"), figures.of("upload.json", "growth MB")
    rows.append(
        ["uploads, one web process", f"{upload[0]} MB/s and {upload[1]:.0f} MB more memory (`upload.json`)", ""]
    )
    return table(["what", "one instance carries", f"a peak of {max(figures.loads):,} a day"], rows)


def slots_table(figures: Figures) -> str:
    rows = []
    for threads, found in figures.of("footprint.json", "slots").items():
        connections = (f"{found[f'{server}_connections']:.0f}" for server in ("postgres", "redis", "rabbitmq"))
        rows.append([threads, f"{found['slots']}", f"{found['pss_mb']:.0f}", *connections])
    return table(["threads", "jobs that wait", "MB", "connections to Postgres", "to Redis", "to RabbitMQ"], rows)


def needs_table(figures: Figures) -> str:
    rows: list[list[str]] = []
    for title, mix in figures.assumed["mixes"].items():
        for a_day in figures.loads:
            wanted = need(figures, a_day, mix)
            plan = {"plan": "", "usd": 0, "mb": 512, "vcpu": 1.0}
            counts = [instances(figures, wanted, [plan], role)[0].count for role in ("web", "workers", "heavy workers")]
            row = [title, f"{a_day:,}", amount(wanted.peak), amount(wanted.slots), *map(str, counts), "1"]
            row += [
                amount(wanted.postgres_cores),
                amount(wanted.postgres_gb),
                amount(wanted.disk_gb),
                amount(wanted.redis_mb),
            ]
            rows.append(row)
    head = ["mix", "a day", "jobs/s at the peak", "slots", "web", "workers", "heavy workers", "scheduler"]
    return table([*head, "Postgres, cores", "memory for indexes, GB", "disk, GB", "results in Redis, MB"], rows)


def instances_table(figures: Figures) -> str:
    rows = [
        [f"{plan['platform']} {plan['plan']}", f"{plan['usd']:,}", f"{plan['mb']:,}", cores(plan), read_in(plan)]
        for plan in figures.plans["instances"]
    ]
    rate = figures.plans["by use"]["Railway"]
    rows.append(["Railway, by use", f"{rate['vcpu']} a vCPU, {rate['gb']} a GB", "–", "–", read_in(rate)])
    return table(["plan", "USD a month", "MB", "vCPU", "read in"], rows)


def postgres_table(figures: Figures) -> str:
    rows = []
    for plan in figures.plans["postgres"]:
        workers = (plan["connections"] - WEB - SCHEDULER) // WORKER
        row = [
            f"{plan['platform']} {plan['plan']}",
            f"{plan['usd']:,}",
            cores(plan),
            ("~" if plan.get("gb guessed") else "") + f"{plan['gb']:g}",
            f"{plan['connections']:,}" + (" by its pooler" if plan.get("pooled") else ""),
            amount(figures.busy * plan["vcpu"] / figures.postgres_s),
            f"{max(0, workers):,}",
        ]
        if "disk GB" in plan:
            row += [
                f"{plan['disk GB']:,} GB",
                *(amount(days(figures, plan["disk GB"], a_day)) for a_day in figures.loads),
            ]
        else:
            row += [f"{plan['usd a GB']:.2f} a GB", *["–"] * len(figures.loads)]
        rows.append([*row, read_in(plan)])
    head = ["plan", "USD", "vCPU", "GB", "connections", "jobs/s", "workers", "disk"]
    return table([*head, *(f"days at {a_day:,}" for a_day in figures.loads), "read in"], rows)


def days(figures: Figures, gb: float, a_day: float) -> float:
    """For which ended jobs may be kept: four fifths of the disk, less what flight records take."""
    room = 0.8 * gb * 1e9 - a_day * figures.deleted_bytes * figures.assumed["days of flight records"]
    return max(0.0, room / (a_day * figures.kept_bytes))


def disk_table(figures: Figures) -> str:
    rows = []
    for a_day in figures.loads:
        gb = [
            a_day * each / 1e9
            for each in (figures.kept_bytes, figures.index_bytes, figures.deleted_bytes, figures.wal_bytes)
        ]
        flight_days = figures.assumed["days of flight records"]
        wanted = disk(figures, a_day)
        row = [gb[0], gb[1], gb[2] * flight_days, gb[3], wanted]
        rows.append([f"{a_day:,}", *map(amount, row), f"{0.3 * wanted:,.0f}"])
    head = ["a day", "a day's ended jobs, GB", "of it indexes", "flight records of 90 days, GB", "WAL a day, GB"]
    return table([*head, "disk with a fifth free, GB", "USD a month at 0.30 a GB"], rows)


def redis_table(figures: Figures) -> str:
    each = redis_connections(figures)
    rows = []
    for plan in figures.plans["redis"]:
        connections = plan.get("connections")
        rate = plan["mb"] * 1e6 * figures.busy / RESULT_S / figures.result_bytes
        row = [f"{plan['platform']} {plan['plan']}", f"{plan['usd']:,}", f"{plan['mb']:,}"]
        row += ["–", "–"] if connections is None else [f"{connections:,}", f"{int(connections // each):,}"]
        rows.append([*row, amount(rate), amount(figures.a_day(rate)), read_in(plan)])
    head = ["plan", "USD", "MB", "connections", "processes, where it is the broker", "jobs/s by its memory", "a day"]
    return table([*head, "read in"], rows)


def commands_table(figures: Figures) -> str:
    price = figures.plans["by use"]["Upstash"]["100,000 commands"]
    rows = []
    for a_day in figures.loads:
        row = [f"{a_day:,}"]
        for tier in ("rung by RabbitMQ", "rung by Redis"):
            commands = MONTH * (
                a_day * figures.asked(tier, "commands to Redis") + DAY_S * figures.idle(tier, "commands to Redis")
            )
            rate = figures.peak(a_day) * figures.asked(tier, "commands to Redis")
            row += [amount(rate), f"{commands / 1e6:,.0f}", f"{commands / 1e5 * price:,.0f}"]
        messages = MONTH * a_day * figures.asked("rung by RabbitMQ", "messages of RabbitMQ")
        rows.append([*row, f"{messages / 1e6:,.1f}"])
    head = ["a day", "RabbitMQ rings: commands/s at the peak", "million a month", "USD by the command"]
    head += [
        "Redis rings: commands/s",
        "million a month",
        "USD by the command",
        "messages of RabbitMQ, million a month",
    ]
    return table(head, rows)


def rabbitmq_table(figures: Figures) -> str:
    rows = []
    messages = figures.asked("rung by RabbitMQ", "messages of RabbitMQ")
    for plan in figures.plans["rabbitmq"]:
        monthly = plan.get("messages a month")
        connections = plan.get("connections")
        rows.append(
            [
                f"CloudAMQP {plan['plan']}",
                f"{plan['usd']:,}",
                str(connections or "–"),
                f"{(connections - 2) // 2}" if connections else "–",  # two of each worker; web and scheduler have one
                f"{monthly:,}" if monthly else "–",
                f"{monthly / messages / MONTH:,.0f}" if monthly else "–",
                read_in(plan),
            ]
        )
    return table(["plan", "USD", "connections", "workers", "messages a month", "jobs a day", "read in"], rows)


def costs_table(figures: Figures) -> str:
    """Of the first mix in full, a platform after the other; sums of all mixes at the end."""
    first = next(iter(figures.assumed["mixes"]))
    wanted = [need(figures, a_day, figures.assumed["mixes"][first]) for a_day in figures.loads]
    loads = [f"{a_day:,} a day" for a_day in figures.loads]
    parts = []
    for platform in PLATFORMS:
        ways = [cheapest(figures, each, platform) for each in wanted]
        roles = [*ROLES, "pooler", "Postgres", "Redis"]
        rows = [[role, *(bought(way, role) for way in ways)] for role in roles]
        rows = [row for row in rows if set(row[1:]) != {"–"}]
        rows.append(["**sum**", *(f"**{total(way):,.0f}**" if way else "no plan is large enough" for way in ways)])
        parts.append(table([platform, *loads], rows))
    used = [railway(figures, each) for each in wanted]
    rows = [
        [part.split(",")[0], *(f"{list(each)[n].split(', ', 1)[1]}: {list(each.values())[n]:,.0f}" for each in used)]
        for n, part in enumerate(used[0])
    ]
    rows.append(["**sum**", *(f"**{railway_sum(figures, each):,.0f}**" for each in used)])
    parts.append(table(["Railway, by use", *loads], rows))
    return "\n".join(parts)


def railway_sum(figures: Figures, used: Mapping[str, float]) -> float:
    return max(float(figures.plans["by use"]["Railway"]["at least"]), sum(used.values()))


def bought(way: list[Bought] | None, role: str) -> str:
    found = next((each for each in way or () if each.role == role), None)
    return str(found) if found and found.count else "–"


def sums_table(figures: Figures) -> str:
    rows = []
    for title, mix in figures.assumed["mixes"].items():
        for platform in (*PLATFORMS, "Railway"):
            row = [title, platform]
            for a_day in figures.loads:
                wanted = need(figures, a_day, mix)
                if platform == "Railway":
                    row.append(f"{railway_sum(figures, railway(figures, wanted)):,.0f}")
                else:
                    way = cheapest(figures, wanted, platform)
                    row.append(f"{total(way):,.0f}" if way else "–")
            rows.append(row)
    return table(["mix", "platform", *(f"{a_day:,} a day" for a_day in figures.loads)], rows)


def ends_table(figures: Figures) -> str:
    """At how many jobs a day of each mix a thing is used up."""
    mixes = list(figures.assumed["mixes"].values())
    one = [need(figures, figures.a_day(1.0), mix) for mix in mixes]  # at one job a second

    def by(amount_: float, used: Iterable[float]) -> list[float]:
        return [amount_ / each if each else math.inf for each in used]

    slots = [each.slots for each in one]
    heavy = [each.heavy_cores for each in one]
    small, large = 2 * regular(25), 2 * regular(figures.threads)
    workers = (100 - WEB - SCHEDULER) // WORKER
    redis = figures.asked("rung by Redis", "commands to Redis")
    rabbitmq = figures.compared("drain", "rabbitmq_cpu_us") / 1e6
    same = [1.0] * len(mixes)
    things: list[tuple[str, list[float]]] = [
        ("two workers of 25 threads, as render.yaml has: slots", by(small, slots)),
        (f"the same with {figures.threads} threads", by(large, slots)),
        ("films and texts in them: two halves of a vCPU", by(figures.busy, heavy)),
        ("one web process on half a vCPU", by(figures.web_per_vcpu / 2, same)),
        (f"100 connections to Postgres: {workers} workers of {figures.threads} threads", by(workers * large / 2, slots)),
        ("one vCPU of Postgres", by(figures.busy / figures.postgres_s, same)),
        ("four vCPUs of Postgres", by(4 * figures.busy / figures.postgres_s, same)),
        ("one Redis that rings, by commands", by(REDIS_COMMANDS / redis, same)),
        ("one core of RabbitMQ", by(figures.busy / rabbitmq, same)),
        ("one database, by what was decided", by(DATABASE_JOBS, same)),
    ]  # fmt: skip
    rows = [
        [thing, *(f"{amount(figures.a_day(rate))}" if rate < math.inf else "–" for rate in rates)]
        for thing, rates in things
    ]
    return table(["used up", *figures.assumed["mixes"]], rows)


def sources_table(figures: Figures) -> str:
    sources = figures.plans["sources"]
    return table(["named", "what", "read"], [[name, said["what"], said["read"]] for name, said in sources.items()])


def missing_list(figures: Figures) -> str:
    return "".join(f"- {each}\n" for each in figures.plans["not found"])


def read_in(plan: Mapping[str, Any]) -> str:
    return "; ".join(dict.fromkeys(plan[name] for name in plan if name.endswith("source")))


def cores(plan: Mapping[str, Any]) -> str:
    return ("~" if plan.get("guessed") else "") + f"{plan['vcpu']:g}" + (", shared" if plan.get("shared") else "")


def seconds(value: float) -> str:
    return "–" if not value else f"{value:.2g}" if value < 10 else f"{value:.1f}"


def amount(value: float) -> str:
    """Two or three figures; from a thousand on rounded down to what they say."""
    if value >= 100:
        return f"{int(float(f'{value:.3g}')):,}"
    return f"{value:.0f}" if value >= 20 else f"{value:.1f}" if value >= 1 else f"{value:.2g}"


TABLES = {
    "job": job_table,
    "computes": computes_table,
    "short": short_table,
    "kinds": kinds_table,
    "slots": slots_table,
    "needs": needs_table,
    "instances": instances_table,
    "postgres": postgres_table,
    "disk": disk_table,
    "redis": redis_table,
    "commands": commands_table,
    "rabbitmq": rabbitmq_table,
    "costs": costs_table,
    "sums": sums_table,
    "ends": ends_table,
    "sources": sources_table,
    "missing": missing_list,
}
