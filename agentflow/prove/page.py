"""The report as one page that needs nothing else: the figures, and a time line drawn as SVG."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Any, Final

from agentflow.prove import plan

_WIDTH, _LEFT, _RIGHT = 1120, 170, 16
_PLOT_TOP, _PLOT_HEIGHT, _ROW = 18, 170, 18
_SMOOTH_S: Final = 3

_LANE_NAMES: Final = {
    "worker": "workers",
    "rabbitmq": "RabbitMQ",
    "redis": "Redis",
    "postgres": "Postgres",
    "web": "web, scheduler, disk",
}
_WRONG: Final = {
    "lost": "accepted and lost",
    "stuck": "never came to an end",
    "recorded_twice": "recorded twice",
    "effects_not_applied_once": "effects not applied once",
    "stale_deliveries": "deliveries of a stale attempt after its successor finished",
    "attempts_spent_on_waiting": "attempts spent on waiting or deploys",
    "broken_rules": "other rules broken",
    "unexpected_errors": "unexpected errors in the logs",
    "protocol_errors": "protocol errors at the broker",
    "slow_recoveries": "recoveries slower than promised",
}
_VERDICTS: Final = {
    "ok": ("Nothing was lost", "good"),
    "wrong": ("Something is wrong", "bad"),
    "weak": ("Nothing wrong, but the run was too weak to mean anything", "weak"),
}

_STYLE: Final = """
:root { color-scheme: light dark; --ground: #fbfbfa; --card: #ffffff; --ink: #1d2125; --soft: #68707a; --line: #e3e5e8;
  --accent: #2f6fde; --fill: #2f6fde26; --good: #1a7f4b; --bad: #c5303a; --weak: #a86a00;
  --worker: #d2542f; --rabbitmq: #d48a13; --redis: #b03a6a; --postgres: #35749d; --web: #6b5bb5; }
@media (prefers-color-scheme: dark) { :root { --ground: #14171a; --card: #1c2024; --ink: #e8eaed; --soft: #98a1ab;
  --line: #2f353b; --accent: #6ba1ff; --fill: #6ba1ff2b; --good: #4cc38a; --bad: #ff7a80; --weak: #f0b45a;
  --worker: #f0825f; --rabbitmq: #eeb04a; --redis: #e079a4; --postgres: #6fb0dc; --web: #a394ec; } }
* { box-sizing: border-box }
body { margin: 0; background: var(--ground); color: var(--ink); font: 15px/1.5 system-ui, -apple-system, "Segoe UI", sans-serif }
main { max-width: 1180px; margin: 0 auto; padding: 32px 24px 64px }
h1 { font-size: 26px; line-height: 1.25; margin: 0 0 4px } h2 { font-size: 16px; margin: 32px 0 10px }
p { margin: 0 0 8px; color: var(--soft) } .good { color: var(--good) } .bad { color: var(--bad) } .weak { color: var(--weak) }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 10px; margin: 20px 0 }
.tile, .card { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 12px 14px }
.tile b { display: block; font-size: 22px; font-variant-numeric: tabular-nums; line-height: 1.2 }
.tile span { color: var(--soft); font-size: 13px } .card { overflow-x: auto }
table { border-collapse: collapse; width: 100%; font-size: 14px } th { text-align: left; color: var(--soft); font-weight: 500 }
td, th { padding: 5px 14px 5px 0; border-bottom: 1px solid var(--line); vertical-align: top }
tr:last-child td { border-bottom: 0 } td.n, th.n { text-align: right; font-variant-numeric: tabular-nums }
.two { display: grid; grid-template-columns: repeat(auto-fit, minmax(380px, 1fr)); gap: 16px } svg { display: block }
svg text { font: 12px system-ui, sans-serif; fill: var(--soft) } svg .name { fill: var(--ink) }
code { font: 13px ui-monospace, monospace }
"""


def page(report: Mapping[str, Any]) -> str:
    words, mood = _VERDICTS[report["verdict"]]
    return "\n".join(
        [
            '<!doctype html><html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>agentflow prove: {escape(words)}</title><style>{_STYLE}</style></head><body><main>",
            f'<h1 class="{mood}">{escape(words)}</h1>',
            f"<p>{escape(_about(report))}</p>",
            *(f'<p class="weak">Too weak: {escape(reason)}</p>' for reason in report["weak"]),
            _tiles(report),
            "<h2>Time line</h2>",
            f'<div class="card">{timeline(report)}</div>',
            '<div class="two"><section><h2>What must not be</h2>',
            f'<div class="card">{_wrong(report)}</div></section>',
            "<section><h2>Slowest recovery by kind of fault</h2>",
            f'<div class="card">{_recoveries(report)}</div></section></div>',
            *_details(report),
            "</main></body></html>\n",
        ]
    )


def _about(report: Mapping[str, Any]) -> str:
    return (
        f"agentflow prove {report['version']}, {report['began'].replace('T', ' ')[:16]} UTC: {report['minutes']:g} minutes with"
        f" seed {report['seed']} on the {report['tier']} tier, a lease of {report['lease_s']:g} s; {report['machine']}."
    )


def _tiles(report: Mapping[str, Any]) -> str:
    figures = [
        (f"{report['accepted']:,}", "jobs accepted"),
        (f"{report['finished']['succeeded']:,}", "jobs succeeded"),
        (f"{report['jobs_per_minute']:,}", "jobs a minute"),
        (f"{sum(report['faults'].values()):,}", f"faults of {len(report['faults'])} kinds"),
        (f"{report['claims']:,}", "claims"),
        (f"{report['events']:,}", "changes checked"),
    ]
    return (
        '<div class="tiles">'
        + "".join(f'<div class="tile"><b>{n}</b><span>{what}</span></div>' for n, what in figures)
        + "</div>"
    )


# ---- the picture ----


def timeline(report: Mapping[str, Any]) -> str:
    """Throughput above, and below a row for each lane: how long a part was away (solid), and until the first success (pale)."""
    rates: Sequence[int] = report["throughput_per_s"]
    history: Sequence[Mapping[str, Any]] = report["history"]
    end = max([len(rates), report["minutes"] * 60, *(fault["back"] for fault in history), 1])
    lanes = [lane for lane, kinds in plan.LANES.items() if any(fault["kind"] in kinds for fault in history)]
    bottom = _PLOT_TOP + _PLOT_HEIGHT
    height = bottom + 30 + len(lanes) * (_ROW + 8) + 4

    def x(second: float) -> float:
        return float(_LEFT + second / end * (_WIDTH - _LEFT - _RIGHT))

    parts = [
        f'<svg viewBox="0 0 {_WIDTH} {height}" width="100%" role="img" aria-label="Jobs finished per second, and the faults">',
        *_axes(rates, end, x, bottom, height),
        _curve(_smooth(rates), x, bottom),
    ]
    for n, lane in enumerate(lanes):
        top = bottom + 30 + n * (_ROW + 8)
        parts.append(f'<text class="name" x="{_LEFT - 12}" y="{top + 13}" text-anchor="end">{_LANE_NAMES[lane]}</text>')
        parts.append(
            f'<line x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{top + _ROW / 2}" y2="{top + _ROW / 2}" stroke="var(--line)"/>'
        )
        parts += [_bar(fault, lane, x, top) for fault in history if fault["kind"] in plan.LANES[lane]]
    return "".join([*parts, "</svg>"])


def _axes(rates: Sequence[int], end: float, x: Any, bottom: int, height: int) -> Iterator[str]:
    most = max([*_smooth(rates), 1])
    for share in (0, 0.5, 1):
        y = bottom - share * _PLOT_HEIGHT
        yield f'<line x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y}" y2="{y}" stroke="var(--line)"/>'
        yield f'<text x="{_LEFT - 12}" y="{y + 4}" text-anchor="end">{share * most:.0f}{"/s" if share == 1 else ""}</text>'
    step = next((s for s in (5, 10, 20, 30, 60, 120, 300, 600) if end / s <= 14), 1200)
    for second in range(0, int(end) + 1, step):
        yield f'<line x1="{x(second):.1f}" x2="{x(second):.1f}" y1="{bottom}" y2="{height}" stroke="var(--line)"/>'
        yield f'<text x="{x(second):.1f}" y="{bottom + 17}" text-anchor="middle">{second // 60}:{second % 60:02}</text>'


def _smooth(rates: Sequence[int]) -> list[float]:
    return [sum(rates[max(0, n - _SMOOTH_S + 1) : n + 1]) / min(n + 1, _SMOOTH_S) for n in range(len(rates))]


def _curve(rates: Sequence[float], x: Any, bottom: int) -> str:
    if not rates:
        return ""
    most = max([*rates, 1])
    line = " ".join(f"{x(n):.1f},{bottom - rate / most * _PLOT_HEIGHT:.1f}" for n, rate in enumerate(rates))
    return (
        f'<polygon points="{x(0):.1f},{bottom} {line} {x(len(rates) - 1):.1f},{bottom}" fill="var(--fill)"/>'
        f'<polyline points="{line}" fill="none" stroke="var(--accent)" stroke-width="1.6" stroke-linejoin="round"/>'
    )


def _bar(fault: Mapping[str, Any], lane: str, x: Any, top: float) -> str:
    left, right = x(fault["began"]), max(x(fault["back"]), x(fault["began"]) + 3)
    well = x(fault["back"] + (fault["recovered_s"] or 0))
    said = f"{fault['kind'].replace('_', ' ')} at {fault['began']:.1f} s, away {fault['down_s']:.1f} s"
    if fault["recovered_s"] is not None:
        said += f", first success {fault['recovered_s']:.2f} s after"
    if fault["rerun_s"] is not None:
        said += f", its jobs ran again after {fault['rerun_s']:.2f} s"
    pale = f'<rect x="{right:.1f}" y="{top + 5}" width="{max(0.0, well - right):.1f}" height="{_ROW - 10}" fill="var(--{lane})" opacity=".3"/>'
    solid = f'<rect x="{left:.1f}" y="{top + 2}" width="{right - left:.1f}" height="{_ROW - 4}" rx="2" fill="var(--{lane})"/>'
    return f"<g><title>{escape(said)}</title>{pale}{solid}</g>"


# ---- tables ----


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    def row(cells: Sequence[str], tag: str) -> str:
        numbers = ("" if n == 0 else ' class="n"' for n in range(len(cells)))
        return "<tr>" + "".join(f"<{tag}{n}>{cell}</{tag}>" for cell, n in zip(cells, numbers, strict=True)) + "</tr>"

    return "<table>" + row(head, "th") + "".join(row(cells, "td") for cells in rows) + "</table>"


def _wrong(report: Mapping[str, Any]) -> str:
    rows = [
        (escape(_WRONG.get(name, name)), f'<span class="{"bad" if n else "good"}">{n:,}</span>')
        for name, n in report["wrong"].items()
    ]
    return _table(("", "count"), rows)


def _recoveries(report: Mapping[str, Any]) -> str:
    def seconds(value: float | None) -> str:
        return "" if value is None else f"{value:.2f} s"

    rows = [
        (
            escape(kind.replace("_", " ")),
            str(count),
            seconds(report["slowest_recovery_s"].get(kind, {}).get("recovered_s")),
            seconds(report["slowest_recovery_s"].get(kind, {}).get("taken_s")),
            seconds(report["slowest_recovery_s"].get(kind, {}).get("rerun_s")),
        )
        for kind, count in report["faults"].items()
    ]
    return _table(("fault", "times", "first success", "its jobs taken", "they ran again"), rows)


def _details(report: Mapping[str, Any]) -> Iterator[str]:
    for rule, found in report["violations"].items():
        yield f'<h2 class="bad">{escape(rule)}: {found["count"]:,}</h2><div class="card">'
        rows = [(f"<code>{example['job'] or ''}</code>", escape(example["said"])) for example in found["examples"]]
        yield "<table>" + "".join(f"<tr><td>{job}</td><td>{said}</td></tr>" for job, said in rows) + "</table></div>"
    for name, title in (
        ("unexpected_errors", "Unexpected errors"),
        ("protocol_errors", "Protocol errors at the broker"),
    ):
        if report[name]:
            lines = (
                [f"{n} × {text}" for text, n in report[name].items()]
                if isinstance(report[name], dict)
                else report[name]
            )
            listed = "".join(f"<tr><td>{escape(line)}</td></tr>" for line in lines)
            yield f'<h2 class="bad">{title}</h2><div class="card"><table>{listed}</table></div>'
    if report["faults_not_to_be_had"]:
        yield "<h2>Faults that were not to be had here</h2>"
        for kind, why in report["faults_not_to_be_had"].items():
            yield f"<p>{escape(kind.replace('_', ' '))}: {escape(why)}</p>"
