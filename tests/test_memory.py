"""Memory: what the container has, what jobs are taken to need, who may start, and that nobody waits for ever."""

from __future__ import annotations

import os
import random
from pathlib import Path
from uuid import uuid4

import psycopg
import pytest

from agentflow import container
from agentflow.container import Container, Memory
from agentflow.jobs import dispatch, large, leases, peaks
from agentflow.jobs.peaks import Learned, Noted, Peaks
from agentflow.system import System
from agentflow.worker.ledger import Held, Ledger, State, Waiting
from agentflow.worker.room import GIVE_UP_S, PATIENCE_S, Asked, Never, Room, decide, that_fit
from tests.core_support import LEASE_S, claim, claimed, read, rescuer, settle, verdict

MB = 1 << 20
MACHINE = {"proc/meminfo": "MemTotal:        8388608 kB\nMemFree:  1 kB\nMemAvailable:    6291456 kB\n"}


def tree(root: Path, files: dict[str, str]) -> Path:
    for name, text in {**MACHINE, **files}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def v2(folder: str, *, limit: str, used: int, inactive: int = 0, active: int = 0, mapped: int = 0) -> dict[str, str]:
    stat = f"anon 1\ninactive_file {inactive * MB}\nactive_file {active * MB}\nfile_mapped {mapped * MB}\n"
    return {
        f"{folder}/memory.max": f"{limit}\n",
        f"{folder}/memory.current": f"{used * MB}\n",
        f"{folder}/memory.stat": stat,
        f"{folder}/memory.events": "low 0\nhigh 0\nmax 9\noom 3\noom_kill 2\n",
    }


V2_MOUNT = "30 23 0:26 {root} /sys/fs/cgroup rw,nosuid - cgroup2 cgroup rw,nsdelegate\n"
V1_MOUNT = "35 31 0:32 {root} /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory\n"


def test_a_container_of_version_2_whose_group_is_the_top_of_what_it_sees(tmp_path: Path) -> None:
    files = v2("sys/fs/cgroup", limit=str(512 * MB), used=300, inactive=40, active=60, mapped=20)
    files |= {"proc/self/cgroup": "0::/\n", "proc/self/mountinfo": V2_MOUNT.format(root="/")}

    found = Container(root=tree(tmp_path, files))

    assert found.memory() == Memory(limit=512 * MB, used=260 * MB, pinned=220 * MB)
    assert found.kills() == 2


def test_nested_groups_of_version_2_the_least_limit_counts_with_all_that_is_below_it(tmp_path: Path) -> None:
    files = v2("sys/fs/cgroup/system.slice", limit=str(256 * MB), used=200)
    files |= v2("sys/fs/cgroup/system.slice/worker.service", limit="max", used=90)
    files |= {"proc/self/cgroup": "0::/system.slice/worker.service\n", "proc/self/mountinfo": V2_MOUNT.format(root="/")}

    assert Container(root=tree(tmp_path, files)).memory() == Memory(256 * MB, 200 * MB, 200 * MB)


def v1(folder: str, *, limit: int, used: int) -> dict[str, str]:
    return {
        f"{folder}/memory.limit_in_bytes": f"{limit}\n",
        f"{folder}/memory.usage_in_bytes": f"{used * MB}\n",
        f"{folder}/memory.stat": f"inactive_file 1\ntotal_inactive_file {10 * MB}\ntotal_active_file {5 * MB}\n",
        f"{folder}/memory.oom_control": "oom_kill_disable 0\nunder_oom 0\noom_kill 7\n",
    }


@pytest.mark.parametrize("mounted", ["/docker/1f", "/"])
def test_a_container_of_version_1_with_and_without_a_view_of_what_is_above_it(tmp_path: Path, mounted: str) -> None:
    own = "sys/fs/cgroup/memory" + ("" if mounted != "/" else "/docker/1f")
    files = v1("sys/fs/cgroup/memory", limit=9223372036854771712, used=4000) if mounted == "/" else {}
    files |= v1(own, limit=512 * MB, used=200)
    files["proc/self/cgroup"] = "5:cpu,cpuacct:/docker/1f\n4:memory:/docker/1f\n0::/\n"
    files["proc/self/mountinfo"] = V1_MOUNT.format(root=mounted) + V2_MOUNT.format(root="/").replace(
        "/sys/fs/cgroup", "/sys/fs/cgroup/unified"
    )

    found = Container(root=tree(tmp_path, files))

    assert found.memory() == Memory(512 * MB, 190 * MB, 185 * MB)
    assert found.kills() == 7


def test_a_group_by_a_name_of_another_namespace_is_what_is_mounted(tmp_path: Path) -> None:
    files = v1("sys/fs/cgroup/memory", limit=512 * MB, used=200)
    files |= {"proc/self/cgroup": "4:memory:/kubepods/pod1/2f\n", "proc/self/mountinfo": V1_MOUNT.format(root="/../..")}

    assert Container(root=tree(tmp_path, files)).memory() == Memory(512 * MB, 190 * MB, 185 * MB)


def test_without_a_limit_the_machine_counts(tmp_path: Path) -> None:
    files = v1("sys/fs/cgroup/memory", limit=9223372036854771712, used=200)
    files |= {"proc/self/cgroup": "4:memory:/\n", "proc/self/mountinfo": V1_MOUNT.format(root="/")}

    assert Container(root=tree(tmp_path, files)).memory() == Memory(8192 * MB, 2048 * MB, 2048 * MB)


def test_a_limit_that_is_told_where_the_group_is_hidden_counts_what_processes_hold(tmp_path: Path) -> None:
    page = os.sysconf("SC_PAGE_SIZE")
    files = {"proc/7/statm": f"9 {60 * MB // page} {20 * MB // page} 1 0 1 0\n", "proc/9/comm": "gone meanwhile"}

    assert Container(root=tree(tmp_path, files), told=512 * MB).memory() == Memory(512 * MB, 40 * MB, 40 * MB)
    assert Container(root=tmp_path, told=512 * MB).kills() is None


def test_elsewhere_than_on_linux_nothing_is_known(tmp_path: Path) -> None:
    assert Container(root=tmp_path).memory() is None


def test_this_machine_is_read() -> None:
    limit = container.limit_bytes()

    assert limit is not None and 0 < container.used_bytes() < limit
    assert 0 < container.resident_bytes() <= (container.peak_bytes() or 0)


# ---- what is learned ----


def test_the_first_guess_counts_until_enough_was_measured(system: System, conn: psycopg.Connection) -> None:
    learning = Peaks(system.database)
    for _ in range(2):
        learning.note("film", 5 * MB, 200 * MB)
    learning.step(conn)
    assert learning.need("film", 5 * MB, guess=300 * MB) == 300 * MB

    learning.note("film", 6 * MB, 200 * MB)  # of the same size: between 4 and 8 MB
    learning.step(conn)

    assert 200 * MB <= learning.need("film", 7 * MB, guess=300 * MB) < 240 * MB


def test_what_one_worker_measured_another_one_knows(system: System, conn: psycopg.Connection) -> None:
    one, other = Peaks(system.database), Peaks(system.database)
    for _ in range(4):
        one.note("film", None, 100 * MB)
    one.step(conn)

    other.step(conn)

    assert 100 * MB <= other.need("film", None, guess=0) < 120 * MB


def test_nineteen_in_twenty_stay_below_what_is_taken_to_be_needed() -> None:
    weights = {Noted("film", 22, peaks.peak_class(100 * MB)): 95.0, Noted("film", 22, peaks.peak_class(400 * MB)): 5.0}
    assert Learned(weights).need("film", 3 * MB, guess=0) < 120 * MB

    weights[Noted("film", 22, peaks.peak_class(400 * MB))] = 6.0

    assert Learned(weights).need("film", 3 * MB, guess=0) >= 400 * MB


def test_a_larger_input_needs_no_less_than_a_smaller_one_and_unknown_ones_what_all_took() -> None:
    learned = Learned({Noted("film", 20, peaks.peak_class(200 * MB)): 9.0})

    assert learned.need("film", 64 * MB, guess=90 * MB) >= 200 * MB
    assert learned.need("film", 1000, guess=90 * MB) == 90 * MB
    assert learned.need("film", None, guess=90 * MB) >= 200 * MB
    assert learned.need("other", None, guess=0) == 0


def test_what_was_measured_long_ago_counts_less(conn: psycopg.Connection) -> None:
    peaks.write(conn, {Noted("film", 22, 30): 8.0})
    conn.execute("update agentflow.memory_peaks set noted_at = noted_at - interval '14 days'")
    assert peaks.read(conn)[Noted("film", 22, 30)] == pytest.approx(4.0, rel=0.01)

    peaks.write(conn, {Noted("film", 22, 30): 1.0})

    assert peaks.read(conn)[Noted("film", 22, 30)] == pytest.approx(5.0, rel=0.01)


@pytest.mark.parametrize("number", [1, 7, 33, 40])
def test_classes_of_peaks_are_a_quarter_of_an_octave(number: int) -> None:
    most = peaks.class_bytes(number)

    assert peaks.peak_class(most) == number
    assert peaks.peak_class(most + MB) > number
    assert most / peaks.class_bytes(number + 1) == pytest.approx(2**-0.25)


# ---- who may start ----


def room(*, used: int, limit: int = 512, processes: int = 100, has: dict[int, int] | None = None) -> Room:
    resident = {pid: mb * MB for pid, mb in (has or {}).items()}
    return Room(Memory(limit * MB, used * MB, used * MB), processes * MB, 48 * MB, lambda pid: resident.get(pid, 0))


def test_what_runs_may_still_grow_and_nobody_gets_what_it_will_take() -> None:
    state = State(held=[Held("me", "a", 200 * MB, [7])])
    there = room(used=150, has={7: 50})  # 512 - 150 - (200 - 50) - 48 = 164

    assert decide(state, Asked("b", 165 * MB), there, 0.0) is not None
    assert decide(state, Asked("b", 164 * MB), there, 0.0) is None


def test_what_fits_into_no_container_of_this_size_is_not_parked_for_ever() -> None:
    state = State()

    assert decide(state, Asked("a", 400 * MB), room(used=120), 0.0) == Never(364 * MB)
    assert not state.waiting


def test_one_that_was_killed_is_tried_alone_or_with_room_for_more_than_it_had() -> None:
    asked = Asked("a", 100 * MB, after_kill=900 * MB)
    state = State(held=[Held("me", "b", 50 * MB)])

    assert decide(state, asked, room(used=120), 0.0) is not None

    state.held.clear()

    assert decide(state, asked, room(used=120), 1.0) is None


def test_a_large_one_is_overtaken_for_a_while_and_then_no_more() -> None:
    state = State(held=[Held("me", "x", 100 * MB, [7])])
    there = room(used=200, has={7: 100})  # 264 MB are left
    assert decide(state, Asked("large", 300 * MB), there, 0.0) is not None

    assert decide(state, Asked("small", 100 * MB), there, PATIENCE_S - 1) is None
    assert decide(state, Asked("small", 100 * MB), there, PATIENCE_S) is not None
    state.release("me", "x")

    assert that_fit(state, room(used=100), PATIENCE_S) == ["large"]
    assert decide(state, Asked("large", 300 * MB), room(used=100), PATIENCE_S) is None


def test_alone_it_may_have_the_reserve_and_is_given_up_where_even_that_is_not_enough() -> None:
    state = State()
    leaking = room(used=200)  # 264 MB but for the reserve, and 312 with it

    assert decide(state, Asked("a", 300 * MB), leaking, 0.0) is not None
    assert decide(state, Asked("a", 300 * MB), leaking, PATIENCE_S) is None

    state = State()
    assert decide(state, Asked("b", 350 * MB), leaking, 0.0) is not None
    assert isinstance(decide(state, Asked("b", 350 * MB), leaking, PATIENCE_S), float)
    assert decide(state, Asked("b", 350 * MB), leaking, GIVE_UP_S) == Never(264 * MB)


@pytest.mark.parametrize("seed", range(20))
def test_whatever_comes_starts_one_day_and_never_more_than_there_is(seed: int) -> None:
    """A container in which jobs come and go at random, and look again when they were told to, or are woken."""
    chance, idle = random.Random(seed), room(used=100)  # those that run have taken nothing of theirs yet
    state, now, alive, ended = State(), 0.0, dict[str, float](), set[str]()
    looks = [(float(n), f"j{n}", chance.choice([20, 60, 150, 280, 360, 390]) * MB) for n in range(60)]
    while looks or alive:
        now = min([at for at, _, _ in looks] + list(alive.values()))
        for job in [job for job, end in alive.items() if end <= now]:
            del alive[job]
            ended.add(job)
            state.release("me", job)
            woken = that_fit(state, idle, now)
            looks = [(now if job_ in woken else at, job_, need) for at, job_, need in looks]
        for look in [look for look in looks if look[0] <= now]:
            looks.remove(look)
            _, job, need = look
            state.forget_late(now)
            answer = decide(state, Asked(job, need), idle, now)
            if answer is None:
                state.hold("me", job, need)
                alive[job] = now + chance.uniform(1, 60)
                assert sum(held.need for held in state.held) <= (512 - 100) * MB
            elif isinstance(answer, Never):
                assert need > 364 * MB
                ended.add(job)
            else:
                looks.append((now + answer * chance.uniform(0.7, 1.3), job, need))
        assert now < 20_000

    assert len(ended) == 60 and not state.held and not state.waiting


# ---- the ledger ----


def test_processes_of_a_container_see_each_others_jobs_and_those_of_the_dead_are_struck_out(tmp_path: Path) -> None:
    workers = [uuid4(), uuid4()]
    one, other = (Ledger("a container", worker, parent=tmp_path) for worker in workers)
    elsewhere = Ledger("another one", uuid4(), parent=tmp_path)
    with one.open() as (state, _):
        state.hold(one.owner, "a", 200 * MB)
        state.waiting.append(Waiting("b", 300 * MB, 0.0, 1e12))

    with other.open() as (state, dead):
        assert ([held.job for held in state.held], dead) == (["a"], [])
    with elsewhere.open() as (state, _):
        assert not state.held
    assert one._alive is not None
    os.close(one._alive)  # as the kernel does with those of the killed
    with other.open() as (state, dead):
        assert (state.held, dead) == ([], [workers[0]])
        assert [waiting.job for waiting in state.waiting] == ["b"]
    with other.open() as (_, dead):
        assert dead == []


def test_a_ledger_that_was_cut_off_or_belongs_to_somebody_else_holds_nobody_up(tmp_path: Path) -> None:
    ledger = Ledger("a container", uuid4(), parent=tmp_path)
    (folder,) = tmp_path.iterdir()
    (folder / "state.json").write_text('{"owners": {')
    with ledger.open() as (state, _):
        assert state.held == []
        state.hold(ledger.owner, "a", MB)
    with ledger.open() as (state, _):
        assert [held.job for held in state.held] == ["a"]

    (tmp_path / "file").touch()
    alone = Ledger("a container", uuid4(), parent=tmp_path / "file")
    with alone.open() as (state, _):
        state.hold(alone.owner, "b", MB)
    with alone.open() as (state, dead):
        assert ([held.job for held in state.held], list(dead)) == (["b"], [])


def test_a_closed_ledger_leaves_nothing_and_names_nobody(tmp_path: Path) -> None:
    one, other = (Ledger("a container", uuid4(), parent=tmp_path) for _ in range(2))
    with one.open() as (state, _):
        state.hold(one.owner, "a", MB)

    one.close()

    with other.open() as (state, dead):
        assert (state.held, dead, list(state.owners)) == ([], [], [other.owner])


# ---- rows ----

REASONS = ("memory", "limit")
FACTS = {
    "kind": "worker",
    "host": "h",
    "pid": 1,
    "version": "1",
    "threads": 1,
    "demand": {},
    "memory_bytes": 1,
    "busy": 0,
}


def test_parked_jobs_are_woken_and_others_left_alone(conn: psycopg.Connection) -> None:
    worker = uuid4()
    jobs = [claimed(conn, worker) for _ in range(2)]
    settle(
        conn, worker, *(verdict(job, "wait", 600.0, reason=reason) for job, reason in zip(jobs, REASONS, strict=True))
    )

    dispatch.wake_parked(conn, [job.id for job in jobs], "memory")

    assert [job.id for job in claim(conn, worker, *jobs)] == [jobs[0].id]


def test_a_job_goes_to_the_large_queue_where_that_is_served_and_it_is_still_ours(conn: psycopg.Connection) -> None:
    job = claimed(conn, uuid4())
    assert not large.move(conn, job)
    leases.announce_worker(conn, uuid4(), {**FACTS, "queues": ["large"]}, lease_s=30.0)
    other = claimed(conn, uuid4())
    conn.execute("update agentflow.jobs set fence = fence + 1 where id = %s", (other.id,))

    assert large.move(conn, job)

    assert (read(conn, job).queue, read(conn, job).state) == ("large", "running")
    assert not large.move(conn, job)  # it is there
    assert not large.move(conn, other)  # it was taken from us


def test_the_rescue_names_a_worker_that_the_kernel_killed(conn: psycopg.Connection) -> None:
    me, killed, lost = rescuer(conn), uuid4(), uuid4()
    leases.announce_worker(conn, killed, {**FACTS, "queues": ["default"]}, lease_s=LEASE_S)
    jobs = [claimed(conn, worker) for worker in (killed, lost)]
    conn.execute("update agentflow.jobs set lease_until = now() - interval '1 s'")

    leases.killed_for_memory(conn, [killed])
    leases.rescue(conn, me, limit=10, lease_s=LEASE_S, max_crashes=3)

    errors = [read(conn, job).error for job in jobs]
    assert [error and error["code"] for error in errors] == ["worker_out_of_memory", "worker_lost"]
