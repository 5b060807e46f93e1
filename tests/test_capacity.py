"""The tables of ops/capacity.md are what was measured, times the plans and the mix that are stated."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ops.bench import capacity, footprint
from ops.bench.sizing import installation, tables
from ops.bench.sizing.figures import BENCH, Figures

RUN = "run: .venv/bin/python ops/bench/capacity.py"
OVERVIEW = """
#{ queue_messages_published => [], messages }
#{[{protocol,amqp091}] =>
      #{channels_opened_total => 4,messages_received_total => 1200,messages_received_confirm_total => 7,consumers => 2},
  [{protocol,stream}] => #{messages_received_total => 34}}
"""


@pytest.fixture
def figures() -> Figures:
    return Figures()


@pytest.fixture
def bench(tmp_path: Path) -> Path:
    """A copy of what is counted with, to be changed."""
    shutil.copytree(BENCH / "results", tmp_path / "results")
    for name in ("kinds.json", "plans.json"):
        shutil.copy(BENCH / name, tmp_path)
    return tmp_path


def change(path: Path, how: Callable[[Any], None]) -> None:
    held = json.loads(path.read_text())
    how(held)
    path.write_text(json.dumps(held))


def rounds_times(name: str, times: float) -> Callable[[Any], None]:
    def how(held: Any) -> None:
        for each in held["cells"]["drain"]["agentflow"]:
            each[name] *= times

    return how


# ---- the document ----


def test_the_tables_are_as_their_figures(figures: Figures) -> None:
    assert not list(capacity.differing(capacity.DOCUMENT.read_text(), figures)), RUN


def test_every_marked_part_is_a_table_of_the_programs_and_written_anew_it_is_the_same(figures: Figures) -> None:
    text = capacity.DOCUMENT.read_text()

    assert set(capacity.parts(text)) == set(tables.TABLES)
    assert text.count("<!-- end of ") == len(tables.TABLES)
    assert capacity.rewritten(text, figures) == text, RUN


def test_a_measurement_of_its_own_changes_the_tables_that_count_with_it(bench: Path) -> None:
    change(bench / "results/compare.json", rounds_times("postgres_cpu_us", 100.0))

    assert set(capacity.differing(capacity.DOCUMENT.read_text(), Figures(bench))) >= {
        "job",
        "postgres",
        "needs",
        "ends",
    }


def test_a_measurement_that_failed_or_is_missing_is_named(bench: Path) -> None:
    def failed(held: Any) -> None:
        held["cells"]["drain"]["agentflow"] = [{"failed": "it has ended"}]
        del held["cells"]["http"]

    change(bench / "results/compare.json", failed)

    with pytest.raises(KeyError, match=r"compare\.json has no workers_cpu_us of drain"):
        _ = Figures(bench).worker_s
    with pytest.raises(KeyError, match="http is missing"):
        _ = Figures(bench).web_per_vcpu


def test_a_price_changes_the_sums(bench: Path) -> None:
    def dearer(held: Any) -> None:
        for plan in held["instances"]:
            plan["usd"] += 1

    change(bench / "plans.json", dearer)

    assert {"costs", "sums"} <= set(capacity.differing(capacity.DOCUMENT.read_text(), Figures(bench)))


def test_a_table_that_is_gone_or_was_edited_is_noticed_and_a_command_mends_it(figures: Figures) -> None:
    text = capacity.DOCUMENT.read_text()
    edited = text.replace("| **sum** | **", "| **sum** | **9", 1)
    gone = re.sub(r"<!-- ends: .*<!-- end of ends -->", "", text, flags=re.DOTALL)

    assert list(capacity.differing(edited, figures)) == ["costs"]
    assert list(capacity.differing(gone, figures)) == ["ends"]
    assert capacity.rewritten(edited, figures) == text
    with pytest.raises(KeyError):
        capacity.rewritten(text.replace("<!-- ends:", "<!-- end:").replace("end of ends", "end of end"), figures)


# ---- what it counts with ----


def test_each_plan_says_where_it_was_read_and_when(figures: Figures) -> None:
    sources = figures.plans["sources"]
    plans = [plan for part in ("instances", "postgres", "redis", "rabbitmq") for plan in figures.plans[part]]
    used = {plan[name] for plan in plans for name in plan if name.endswith("source")}
    used |= {rate["source"] for rate in figures.plans["by use"].values()}

    assert used == set(sources)
    for said in sources.values():
        assert said["what"] and re.fullmatch(r"\d{4}-\d{2}-\d{2}", said["read"])
    for plan in plans:
        assert plan["source"] and plan["usd"] >= 0


def test_the_templates_of_the_product_start_plans_that_are_known(figures: Figures) -> None:
    root = BENCH.parent.parent
    known = {
        (plan["platform"], plan["plan"]) for part in ("instances", "postgres", "redis") for plan in figures.plans[part]
    }
    rendered = set(re.findall(r"^ +plan: (\S+)$", (root / "render.yaml").read_text(), re.MULTILINE))
    addons = json.loads((root / "app.json").read_text())["addons"]

    assert {("Render", plan) for plan in rendered} <= known
    assert {("Heroku", addon.split(":")[1]) for addon in addons} <= known
    fly = (root / "fly.toml").read_text()
    assert 'size = "shared-cpu-1x"' in fly and 'memory = "512mb"' in fly and ("Fly", "shared-cpu-1x 512 MB") in known


def test_every_mix_is_of_known_kinds(figures: Figures) -> None:
    for mix in figures.assumed["mixes"].values():
        assert set(mix) <= set(figures.kinds)
        assert all(figures.kinds[name].queue in ("default", "heavy") for name in mix)


# ---- the arithmetic ----


def test_slots_are_what_a_waiting_job_uses_up(figures: Figures) -> None:
    """25 threads are 19 slots for ordinary jobs, and 19 / 17.5 s are 1.1 a second; not 25."""
    rate, ended_by = installation.carries(figures, figures.kinds["long call"], 25)

    assert ended_by == "slots"
    assert rate == pytest.approx(19 / 17.5, rel=0.01)
    assert figures.a_day(rate) == pytest.approx(rate * 86_400 / 2)


def test_a_film_uses_up_the_processor_and_does_not_fit_into_little_memory(figures: Figures) -> None:
    film = figures.kinds["film"]
    rate, ended_by = installation.carries(figures, film, 25)

    assert (ended_by, rate) == ("processor", pytest.approx(0.7 / film.computes_s))
    assert installation.carries(figures, film, 25, vcpu=0.5)[0] == pytest.approx(rate / 2)
    assert installation.carries(figures, film, 25, mb=256) == (0.0, "memory")


@pytest.mark.parametrize("platform", tables.PLATFORMS)
def test_what_is_bought_is_large_enough_and_a_larger_load_is_never_cheaper(figures: Figures, platform: str) -> None:
    for mix in figures.assumed["mixes"].values():
        sums = []
        for a_day in figures.loads:
            wanted = installation.need(figures, a_day, mix)
            way = installation.cheapest(figures, wanted, platform)
            assert way is not None
            by_role = {each.role: each for each in way}
            database = by_role["Postgres"].plan
            processes = by_role["workers"].count + by_role["heavy workers"].count
            connections = 10 * processes + 5 * by_role["web"].count
            assert by_role["workers"].count * 150 >= wanted.slots
            assert by_role["heavy workers"].count * by_role["heavy workers"].plan["vcpu"] * 0.7 >= wanted.heavy_cores
            assert "pooler" in by_role or database["connections"] >= connections
            assert database["vcpu"] * 0.7 >= wanted.postgres_cores
            assert "usd a GB" in database or database["disk GB"] >= wanted.disk_gb
            sums.append(installation.total(way))
        assert sums == sorted(sums)


def test_no_plan_is_invented_for_a_load_that_none_carries(figures: Figures) -> None:
    (mix, _) = figures.assumed["mixes"].values()

    assert installation.cheapest(figures, installation.need(figures, 5e9, mix), "Heroku") is None


def test_days_in_a_disk_end_where_flight_records_alone_fill_it(figures: Figures) -> None:
    assert tables.days(figures, 1, 1_000_000) == 0
    assert tables.days(figures, 1000, 135_000) > tables.days(figures, 100, 135_000) > 0


def test_messages_that_were_published_are_read_from_rabbitmqs_text() -> None:
    assert footprint.received(OVERVIEW) == 1234
