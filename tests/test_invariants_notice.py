"""The proof that the tests of the invariants notice: each condition is taken out of the code, and its test is to fail."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import psycopg
import pytest

from agentflow import system
from agentflow.jobs import dispatch, leases, records
from agentflow.worker import chores, claimer, heart, settler
from tests import test_invariants as invariants
from tests.mutations import mutate_code, mutate_function

Change = Callable[[psycopg.Connection, pytest.MonkeyPatch], None]

# What its tests use, for one of them at a time.
original, database_url, database = invariants.original, invariants.database_url, invariants.database
nothing_goes_on = invariants.nothing_goes_on


def function(name: str, *changes: tuple[str, str]) -> Change:
    return lambda conn, patch: mutate_function(conn, name, *changes)


def code(owner: Any, name: str, *changes: tuple[str, str]) -> Change:
    return lambda conn, patch: mutate_code(patch, owner, name, *changes)


def without_constraint(name: str) -> Change:
    return lambda conn, patch: conn.execute(f"alter table agentflow.jobs drop constraint {name}") and None


def without_index(name: str) -> Change:
    return lambda conn, patch: conn.execute(f"drop index agentflow.{name}") and None


def both(*changes: Change) -> Change:
    def apply(conn: psycopg.Connection, patch: pytest.MonkeyPatch) -> None:
        for change in changes:
            change(conn, patch)

    return apply


_LOCK_KEYS = ("perform agentflow.lock_keys_1(keys);", "")
_HOLDS = """
    where j.state || '' = 'running' and case when p_worker is null
        then j.lease_until < clock_timestamp() or j.lease_until > clock_timestamp() + 2 * p_lease else j.worker = p_worker end
"""
_DUE = ("and j.run_at <= clock_timestamp()", "")
#: what is taken out -> the test that has to notice, its parameters, how
MUTATIONS: dict[str, tuple[Callable[..., None], dict[str, Any], Change]] = {
    "1 a claim looks at the state": (
        invariants.test_a_job_moves_along_the_six_edges_and_no_other,
        {},
        function(
            "claim_1",
            (
                "and j.state || '' = 'queued' and j.run_at <= clock_timestamp() and j.concurrency_key is null",
                "and j.run_at <= clock_timestamp() and j.concurrency_key is null",
            ),
            ("and j.state || '' = 'queued' and j.attempt", "and j.attempt"),
        ),
    ),
    "1 a cancel looks at the state": (
        invariants.test_a_job_moves_along_the_six_edges_and_no_other,
        {},
        function(
            "cancel_1",
            ("and j.state || '' in ('queued', 'running')", ""),
            (
                "finished_at = case when j.state = 'queued' then clock_timestamp() end",
                "finished_at = clock_timestamp()",
            ),
        ),
    ),
    "1 a dead letter stays as it is": (
        invariants.test_trying_a_dead_letter_again_makes_a_new_job_and_leaves_the_old_one,
        {},
        code(records, "retry", ("raise NotRetryable", "NotRetryable")),
    ),
    "2 a finish looks at the state": (
        invariants.test_a_job_ends_once_however_many_say_that_it_did,
        {},
        function(
            "settle_1",
            (
                _HOLDS,
                "",
            ),
        ),
    ),
    "2 a cancel leaves what has ended": (
        invariants.test_of_a_finish_and_a_cancel_that_meet_one_decides,
        {},
        function(
            "cancel_1",
            ("and j.state || '' in ('queued', 'running')", ""),
            ("finished_at = case when j.state = 'queued' then clock_timestamp() end,", ""),
        ),
    ),
    "3 the fence rises at a claim": (
        invariants.test_the_fence_rises_by_one_at_each_claim_and_at_nothing_else,
        {},
        function("claim_1", ("fence = j.fence + 1", "fence = j.attempt + 1")),
    ),
    "3 the fence rises at a keyed claim": (
        invariants.test_the_fence_rises_by_one_at_each_claim_and_at_nothing_else,
        {},
        function("claim_keyed_1", ("fence = j.fence + 1", "fence = j.attempt + 1")),
    ),
    "3 the fence never falls": (
        invariants.test_the_fence_rises_by_one_at_each_claim_and_at_nothing_else,
        {},
        function(
            "settle_1",
            (
                "sent_at = null, sends = 0,",
                "sent_at = null, sends = 0, fence = case when d.state = 'queued' then j.attempt - 1 else j.fence end,",
            ),
        ),
    ),
    "3 a finish looks at the fence": (
        invariants.test_a_stale_holder_cannot_finish_what_was_claimed_again_as_the_same_attempt,
        {"outcome": "wait"},
        function("settle_1", ("and v.fence = j.fence", "")),
    ),
    "3 a finish looks at the worker": (
        invariants.test_a_finish_by_another_worker_with_the_right_fence_is_refused,
        {},
        function("settle_1", ("else j.worker = p_worker end", "else true end")),
    ),
    "3 a heartbeat looks at the fence": (
        invariants.test_a_stale_holder_cannot_renew_the_lease,
        {},
        function("heartbeat_1", ("and m.fence = j.fence", "")),
    ),
    "3 a heartbeat looks at the worker": (
        invariants.test_a_stale_holder_cannot_renew_the_lease,
        {},
        function("heartbeat_1", ("and j.worker = p_worker order by", "order by")),
    ),
    **{
        f"4 the constraint {name}": (
            invariants.test_a_row_that_contradicts_itself_is_refused,
            {"constraint": name},
            without_constraint(name),
        )
        for name in invariants.REFUSED
    },
    "5 a busy job has a safety time": (
        invariants.test_a_waiting_row_is_rung_within_five_minutes_of_being_due,
        {},
        function("claim_keyed_1", ("interval '60 s' * (1 + random())", "interval '1 h'")),
    ),
    "5 a wait is finite": (
        invariants.test_a_waiting_row_is_rung_within_five_minutes_of_being_due,
        {},
        function("claim_keyed_1", ("interval '60 s' * (1 + random())", "interval 'infinity'")),
    ),
    "5 the pause between rings is bounded": (
        invariants.test_a_waiting_row_is_rung_within_five_minutes_of_being_due,
        {},
        function("relay_5", ("interval '5 min'", "interval '1 h'")),
    ),
    "6 a keyed claim locks its key": (
        invariants.test_a_claim_that_meets_another_of_its_key_waits_and_finds_the_slot_taken,
        {},
        function("claim_keyed_1", _LOCK_KEYS),
    ),
    "6 a keyed claim locks its key, and no index guards the slot": (
        invariants.test_a_claim_that_meets_another_of_its_key_waits_and_finds_the_slot_taken,
        {},
        both(function("claim_keyed_1", _LOCK_KEYS), without_index("jobs_slot")),
    ),
    "6 a keyed claim counts the slots": (
        invariants.test_a_key_gives_out_each_of_its_slots_once,
        {"at_once": True},
        function(
            "claim_keyed_1",
            ("generate_series(0, k.slots - 1)", "generate_series(0, k.slots)"),
            ("k.slots - coalesce", "k.slots + 1 - coalesce"),
        ),
    ),
    "6 an index guards the slot": (
        invariants.test_two_running_jobs_cannot_have_the_same_slot,
        {},
        without_index("jobs_slot"),
    ),
    "6 a job is busy only while no slot is free": (
        invariants.test_a_key_with_a_free_slot_lets_nobody_wait_whose_message_was_overtaken,
        {},
        function("claim_keyed_1", ("k.slots <= (select", "0 <= (select")),
    ),
    "6 a finish locks the key": (
        invariants.test_parking_as_busy_and_freeing_the_slot_cannot_miss_each_other,
        {},
        function("settle_1", _LOCK_KEYS),
    ),
    "6 a finish rings the next": (
        invariants.test_whoever_frees_a_slot_rings_the_next_in_line,
        {"leaving": "succeeded"},
        function("settle_1", ("woken := agentflow.wake_line_1(keys);", "")),
    ),
    "6 a rescue rings the next": (
        invariants.test_whoever_frees_a_slot_rings_the_next_in_line,
        {"leaving": "crashed"},
        function(
            "settle_1", ("if keys is not null then woken", "if keys is not null and p_worker is not null then woken")
        ),
    ),
    "6 a cancel rings the next": (
        invariants.test_cancelling_the_one_that_was_rung_rings_the_next,
        {},
        function("cancel_1", ("r := r || agentflow.wake_line_1(array[key]);", "")),
    ),
    "7 an attempt is written": (
        invariants.test_a_job_that_does_not_run_has_an_attempt_for_each_claim,
        {},
        function(
            "settle_1", ("from decided d where d.state <> 'succeeded'", "from decided d where d.state = 'failed'")
        ),
    ),
    "8 a retry counts the attempts": (
        invariants.test_retrying_ends_when_the_attempts_are_spent,
        {},
        function("settle_1", ("when v.outcome = 'retry' and j.attempt >= j.max_attempts then 'failed'", "")),
    ),
    "8 waiting gives the attempt back": (
        invariants.test_waiting_and_interruption_spend_no_attempt,
        {},
        function("settle_1", ("d.outcome in ('wait', 'handback', 'crashed')", "d.outcome in ('handback', 'crashed')")),
    ),
    "8 crashes are bounded": (
        invariants.test_a_job_whose_worker_dies_again_and_again_fails_as_lost,
        {},
        function("settle_1", ("when v.outcome = 'crashed' and j.crashes + 1 >= p_max_crashes then 'failed'", "")),
    ),
    "8 a crash gives the attempt back": (
        invariants.test_a_job_whose_worker_dies_again_and_again_fails_as_lost,
        {},
        function("settle_1", ("d.outcome in ('wait', 'handback', 'crashed')", "d.outcome in ('wait', 'handback')")),
    ),
    "9 every end is followed up": (
        invariants.test_each_end_writes_one_callback_and_only_success_starts_the_next_jobs,
        {"how": "lost"},
        function(
            "settle_1",
            ("filter (where w.follows and w.state <> 'queued')", "filter (where w.follows and w.state = 'succeeded')"),
        ),
    ),
    "9 a queued job's cancel is followed up": (
        invariants.test_each_end_writes_one_callback_and_only_success_starts_the_next_jobs,
        {"how": "cancelled while queued"},
        function("cancel_1", ("if s = 'cancelled' and follows then", "if false then")),
    ),
    "9 only success starts the next jobs": (
        invariants.test_each_end_writes_one_callback_and_only_success_starts_the_next_jobs,
        {"how": "failed"},
        function("follow_up_1", ("and j.state || '' = 'succeeded' and j.then_jobs", "and j.then_jobs")),
    ),
    "9 a batch counts each kind of end": (
        invariants.test_a_batch_counts_each_end_once_and_is_finished_by_the_last,
        {},
        function("follow_up_1", ("cancelled = b.cancelled + c,", "")),
    ),
    "9 an index guards the callback": (
        invariants.test_a_second_callback_of_a_job_is_refused,
        {},
        without_index("jobs_callback"),
    ),
    "10 a message for a job that is not due": (
        invariants.test_a_message_for_a_row_that_is_not_waiting_and_due_changes_nothing,
        {"key": None},
        function("claim_1", _DUE),
    ),
    "10 a message for a keyed job that is not due": (
        invariants.test_a_message_for_a_row_that_is_not_waiting_and_due_changes_nothing,
        {"key": "k"},
        both(function("claim_keyed_1", _DUE), function("claim_1", _DUE)),
    ),
    "10 a message for a running job": (
        invariants.test_a_message_for_a_row_that_is_not_waiting_and_due_changes_nothing,
        {"key": None},
        function(
            "claim_1",
            (
                "and j.state || '' = 'queued' and j.run_at <= clock_timestamp() and j.concurrency_key is null",
                "and j.run_at <= clock_timestamp() and j.concurrency_key is null",
            ),
            ("and j.state || '' = 'queued' and j.attempt", "and j.attempt"),
        ),
    ),
    "10 a doubled message": (
        invariants.test_a_doubled_message_is_one_claim,
        {"key": None},
        function(
            "claim_1",
            ("order by j.id for update", "order by j.id"),
            ("and j.state || '' = 'queued' and j.attempt", "and j.attempt"),
        ),
    ),
    "10 a lost message": (
        invariants.test_a_lost_message_is_rung_again,
        {},
        function(
            "relay_5",
            (
                "and j.state = 'queued' and j.wake_at <= moment order by j.wake_at limit c.most",
                "and j.state = 'queued' and j.wake_at <= moment and j.sent_at is null order by j.wake_at limit c.most",
            ),
        ),
    ),
    "11 the relay commits first": (
        invariants.test_the_relay_publishes_after_its_commit,
        {},
        code(
            chores.Relay,
            "_ring",
            ("for queue in self._queues:", "for queue in conn.execute('begin') and self._queues:"),
        ),
    ),
    "11 the settler commits first": (
        invariants.test_a_finish_and_a_rescue_tell_others_after_their_commit,
        {},
        code(settler.Settler, "_write", ("self._unsure = True", "self._unsure = conn.execute('begin') and True")),
    ),
    "11 the rescue commits first": (
        invariants.test_a_finish_and_a_rescue_tell_others_after_their_commit,
        {},
        code(chores.Rescue, "step", ("settled = leases", "conn.execute('begin'); settled = leases")),
    ),
    "11 the submitter commits first": (
        invariants.test_a_submitter_rings_after_the_commit,
        {},
        code(
            system.Transaction,
            "submit_prepared",
            ("self.rings.extend(submitted.rings)", "self.system.publisher.ring(submitted.rings)"),
        ),
    ),
    "12 a claim sorts its rows": (
        invariants.test_rows_are_locked_in_the_order_of_their_ids,
        {},
        function("claim_1", ("order by j.id for update", "order by j.id desc for update")),
    ),
    "12 a finish sorts its rows": (
        invariants.test_rows_are_locked_in_the_order_of_their_ids,
        {},
        function("settle_1", ("order by j.id for update of j", "order by j.id desc for update of j")),
    ),
    "12 a keyed claim locks once": (
        invariants.test_a_keyed_claim_locks_the_head_and_those_it_parks_in_one_order,
        {},
        function("claim_keyed_1", ("p_ids || array(select taken.id from taken)", "array(select taken.id from taken)")),
    ),
    "12 taking back sorts its rows": (
        invariants.test_rows_are_locked_in_the_order_of_their_ids,
        {},
        code(dispatch, "take_back", ("order by id for update", "order by id desc for update")),
    ),
    "12 keys are sorted": (
        invariants.test_keys_are_locked_before_rows_and_in_one_order,
        {},
        function("lock_keys_1", ("order by 1 loop", "order by 1 desc loop")),
    ),
    "12 a keyed claim locks keys first": (
        invariants.test_keys_are_locked_before_rows_and_in_one_order,
        {},
        function("claim_keyed_1", _LOCK_KEYS),
    ),
    "12 a finish locks keys first": (
        invariants.test_keys_are_locked_before_rows_and_in_one_order,
        {},
        function("settle_1", _LOCK_KEYS),
    ),
    "12 a cancel locks keys first": (
        invariants.test_keys_are_locked_before_rows_and_in_one_order,
        {},
        function("cancel_1", ("perform agentflow.lock_keys_1(array[key]);", "")),
    ),
    "12 a heartbeat skips": (
        invariants.test_a_heartbeat_waits_for_nobody,
        {},
        function("heartbeat_1", ("for update of j skip locked", "for update of j nowait")),
    ),
    "13 a claim asks the clock": (
        invariants.test_a_lease_is_whole_however_long_its_claim_had_to_wait,
        {"key": None},
        function("claim_1", ("lease_until = clock_timestamp()", "lease_until = now()")),
    ),
    "13 a keyed claim asks the clock": (
        invariants.test_a_lease_is_whole_however_long_its_claim_had_to_wait,
        {"key": "k"},
        function("claim_keyed_1", ("lease_until = clock_timestamp()", "lease_until = now()")),
    ),
    "13 a heartbeat asks the clock": (
        invariants.test_a_renewed_lease_and_a_park_are_counted_from_their_writing,
        {},
        function("heartbeat_1", ("lease_until = clock_timestamp()", "lease_until = now()")),
    ),
    "13 a park asks the clock": (
        invariants.test_a_renewed_lease_and_a_park_are_counted_from_their_writing,
        {},
        function(
            "settle_1",
            (
                "wake_at = case when d.state = 'queued' then clock_timestamp()",
                "wake_at = case when d.state = 'queued' then now()",
            ),
        ),
    ),
    "13 a claimer looks at its watch first": (
        invariants.test_a_worker_counts_its_lease_from_before_the_claim_was_sent,
        {},
        code(claimer.Claimer, "_deliver", ("started + self._lease_s", "time.monotonic() + self._lease_s")),
    ),
    "13 a heart looks at its watch first": (
        invariants.test_a_worker_counts_its_lease_from_before_the_heartbeat_was_sent,
        {},
        code(
            heart.Heart,
            "step",
            ("job.lease_ends = started + self._lease_s", "job.lease_ends = time.monotonic() + self._lease_s"),
        ),
    ),
    "13 a lease too far ahead": (
        invariants.test_a_lease_too_far_ahead_counts_as_over,
        {},
        function("rescue_2", ("or j.lease_until > clock_timestamp() + 2 * p_lease", "")),
    ),
    "14 a finish looks whether it is cancelled": (
        invariants.test_a_job_asked_to_end_never_waits_again,
        {"outcome": "wait", "key": None},
        function("settle_1", ("or j.cancel_requested then", "then")),
    ),
    "14 a finish looks at the row that it locked": (
        invariants.test_a_cancel_that_a_retry_had_to_wait_for_is_seen_by_it,
        {"key": None},
        function(
            "settle_1",
            ("from locked j join verdicts v", "from locked join agentflow.jobs j using (id) join verdicts v"),
        ),
    ),
    "14 a heartbeat says that it is cancelled": (
        invariants.test_a_job_asked_to_end_never_waits_again,
        {"outcome": "wait", "key": None},
        function("heartbeat_1", ("when j.cancel_requested then 'cancel'", "")),
    ),
    "14 a cancel covers running jobs": (
        invariants.test_a_cancel_that_meets_a_claim_is_not_lost,
        {},
        function("cancel_1", ("and j.state || '' in ('queued', 'running')", "and j.state || '' = 'queued'")),
    ),
    "14 a claim looks again after its wait": (
        invariants.test_a_claim_that_meets_a_cancel_gets_nothing,
        {},
        function(
            "claim_1",
            ("order by j.id for update", "order by j.id"),
            ("and j.state || '' = 'queued' and j.attempt", "and j.attempt"),
        ),
    ),
    **{
        f"15 the rescuer is {word}": (
            invariants.test_only_a_worker_whose_heartbeats_came_through_for_half_a_lease_rescues,
            {"why": why},
            function("rescue_2", (condition, "true")),
        )
        for word, why, condition in (
            ("alive", "stopped", "stopped_at is null"),
            ("heard of", "silent", "seen_at > clock_timestamp() - p_lease / 2"),
            ("well", "new", "well_since <= clock_timestamp() - p_lease / 2"),
        )
    },
    "15 the rescuer is known": (
        invariants.test_only_a_worker_whose_heartbeats_came_through_for_half_a_lease_rescues,
        {"why": "unknown"},
        function("rescue_2", ("id = p_worker and", "")),
    ),
    "15 a gap counts": (
        invariants.test_a_gap_between_heartbeats_makes_a_worker_start_anew,
        {},
        code(leases, "announce_worker", ("then clock_timestamp()", "then w.well_since")),
    ),
    "15 the rescue looks again after its wait": (
        invariants.test_a_lease_renewed_while_the_rescue_looks_is_left_alone,
        {},
        function(
            "settle_1",
            ("then j.lease_until < clock_timestamp() or j.lease_until > clock_timestamp() + 2 * p_lease", "then true"),
        ),
    ),
    "15 an orphan has to be seen twice": (
        invariants.test_a_claim_nobody_heard_of_is_handed_back_when_seen_twice,
        {},
        code(heart.Heart, "step", ("in orphans & self._orphans:", "in orphans:")),
    ),
    "16 a submitter looks at the window": (
        invariants.test_a_flood_is_rung_as_far_as_the_window_reaches,
        {},
        function("submit_1", ("and row_number() over (partition by i.queue order by i.priority, i.n) <= r.room", "")),
    ),
    "16 the relay looks at the window": (
        invariants.test_a_flood_is_rung_as_far_as_the_window_reaches,
        {},
        function("relay_5", ("room := p_window - outstanding;", "room := p_window;")),
    ),
    "16 submitters see each other's": (
        invariants.test_submitters_at_once_exceed_the_window_by_no_more_than_themselves,
        {"alone": False},
        function("submit_1", ("and s.sent_at is not null limit w.size", "and false limit w.size")),
    ),
    "16 submitters of single jobs see each other's": (
        invariants.test_submitters_at_once_exceed_the_window_by_no_more_than_themselves,
        {"alone": True},
        function("submit_one_1", ("and s.sent_at is not null limit p_window", "and false limit p_window")),
    ),
    "16 a submitter looks for older jobs": (
        invariants.test_nobody_is_rung_before_an_older_job_of_its_class,
        {"alone": False},
        function("submit_1", ("and not r.older", "")),
    ),
    "16 a submitter of a single job looks for older ones": (
        invariants.test_nobody_is_rung_before_an_older_job_of_its_class,
        {"alone": True},
        function("submit_one_1", ("and o.wake_at <= clock_timestamp()", "and false")),
    ),
    "16 rings grow rarer": (
        invariants.test_an_unheard_job_is_rung_ever_more_seldom_and_at_least_every_five_minutes,
        {},
        function("relay_5", ("power(2, least(j.sends, 4))", "1")),
    ),
    "a verdict twice in a batch": (
        invariants.test_the_same_verdict_twice_in_a_batch_counts_once,
        {},
        function("settle_1", ("select distinct on (v.id, v.fence) v.*", "select v.*")),
    ),
    "a refused batch is split": (
        invariants.test_a_result_that_cannot_be_stored_fails_its_job_alone,
        {"result": '{"text": "a\\u0000b"}'},
        code(settler.Settler, "_write", ("if len(batch) > 1:", "if False:")),
    ),
    "an unheard commit is looked up": (
        invariants.test_a_finish_whose_commit_was_not_heard_is_known_to_be_written,
        {"outcome": "succeeded"},
        code(settler.Settler, "step", ("if self._batch and self._unsure:", "if False:")),
    ),
}


@pytest.mark.parametrize("taken_out", MUTATIONS)
def test_its_test_notices_when_a_condition_is_taken_out(
    taken_out: str, request: pytest.FixtureRequest, conn: psycopg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    test, parameters, change = MUTATIONS[taken_out]
    change(conn, monkeypatch)
    needed = [name for name in inspect.signature(test).parameters if name not in parameters]
    fixtures = {name: request.getfixturevalue(name) for name in needed}

    # Not any error: a mutation that breaks the syntax would prove nothing.
    with pytest.raises((AssertionError, psycopg.IntegrityError, psycopg.errors.LockNotAvailable)):
        test(**fixtures, **parameters)


def test_every_numbered_invariant_has_a_mutation_and_every_test_named_there_exists() -> None:
    numbers = {name.split()[0] for name in MUTATIONS if name[0].isdigit()}
    assert numbers == {str(number) for number in range(1, 17)}
    assert all(test in vars(invariants).values() for test, _, _ in MUTATIONS.values())
