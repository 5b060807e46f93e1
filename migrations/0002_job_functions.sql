-- The transitions of a job. Functions carry a version in their name: old and new workers overlap during a deploy, so a change
-- of meaning is a new function, and the old one goes a release later.
--
-- Order of locks everywhere: keys (advisory, sorted) before rows (sorted by id); try-locks never wait.
-- `state || ''` keeps the planner off the partial indexes on state, which fill with dead entries: rows here are found by id.
-- The settings on each function do the same for the generic plans that plpgsql caches on an empty table.

create function agentflow.lock_keys_1(p_keys text[]) returns void language plpgsql as $$
declare
    h bigint;
begin
    for h in select distinct hashtextextended(k, 7) from unnest(p_keys) k where k is not null order by 1 loop
        perform pg_advisory_xact_lock(h);
    end loop;
end $$;

-- How many messages of a queue may be outstanding: what the live workers can use in about 50 ms.
create function agentflow.window_1(p_queue text) returns integer language sql stable as $$
    select least(1000, greatest(16, coalesce(sum((demand ->> p_queue)::integer), 0)::integer))
    from agentflow.workers where seen_at > clock_timestamp() - interval '60 s' and stopped_at is null
$$;

-- Claims jobs that have a concurrency key. A message for such a job rings for its key: the head of the line gets the slot, so
-- nobody barges in and one lost message cannot block the line. The refused are parked; whoever frees a slot rings the head.
create function agentflow.claim_keyed_1(p_ids uuid[], p_worker uuid, p_lease interval) returns setof agentflow.jobs
language plpgsql
set enable_seqscan = off set enable_hashjoin = off set enable_mergejoin = off set jit = off
as $$
declare
    keys text[];
begin
    select array_agg(distinct concurrency_key) into keys
    from agentflow.jobs where id = any (p_ids) and state || '' = 'queued' and concurrency_key is not null;
    if keys is null then
        return;
    end if;
    perform agentflow.lock_keys_1(keys);              -- the next statement has a snapshot taken after the lock

    return query
    with used as (
        select concurrency_key as key, array_agg(slot) as slots
        from agentflow.jobs where concurrency_key = any (keys) and state = 'running' group by 1
    ), free as (
        select k.key, s.slot, row_number() over (partition by k.key order by s.slot) as n
        from agentflow.concurrency_keys k left join used on used.key = k.key
        cross join lateral (
            select s::smallint as slot from generate_series(0, k.slots - 1) s
            where s::smallint <> all (coalesce(used.slots, '{}'))
            limit greatest(0, k.slots - coalesce(cardinality(used.slots), 0))
        ) s
        where k.key = any (keys)
    ), wanted as (
        select concurrency_key as key, queue, count(*) as n
        from agentflow.jobs where id = any (p_ids) and state || '' = 'queued' and concurrency_key = any (keys) group by 1, 2
    ), heads as (
        select h.id, h.key, row_number() over (partition by h.key order by h.run_at, h.id) as n
        from wanted w cross join lateral (
            select j.id, j.concurrency_key as key, j.run_at from agentflow.jobs j
            where j.concurrency_key = w.key and j.queue = w.queue and j.state = 'queued' and j.run_at <= clock_timestamp()
            order by j.run_at, j.id limit w.n
        ) h
    ), taken as materialized (
        select heads.id, free.slot from heads join free on free.key = heads.key and free.n = heads.n
    ), locked as materialized (                       -- with those parked below: one pass, in one order
        select j.id from agentflow.jobs j where j.id = any (p_ids || array(select taken.id from taken))
        and j.state || '' = 'queued' and j.concurrency_key = any (keys) order by j.id for update
    )
    update agentflow.jobs j set state = 'running', attempt = j.attempt + 1, fence = j.fence + 1, worker = p_worker,
        slot = taken.slot, lease_until = clock_timestamp() + p_lease, started_at = clock_timestamp(),
        wake_at = null, sent_at = null, sends = 0, wait_reason = null, progress = null, stage = null
    from taken, locked
    where j.id = taken.id and locked.id = taken.id and j.state || '' = 'queued' and j.run_at <= clock_timestamp()
    returning j.*;

    -- Asked for and not taken: parked without a message, with a safety time in case the wake-up is lost with its process. While
    -- a slot is free the relay rings at once: a younger job's message came first and took the head of the line.
    with locked as materialized (
        select id from agentflow.jobs
        where id = any (p_ids) and state || '' = 'queued' and concurrency_key = any (keys) and run_at <= clock_timestamp()
        order by id for update
    ), busy as materialized (
        select k.key from agentflow.concurrency_keys k where k.key = any (keys)
        and k.slots <= (select count(*) from agentflow.jobs r where r.concurrency_key = k.key and r.state = 'running')
    )
    update agentflow.jobs j set sent_at = null, sends = 0,
        wait_reason = case when j.concurrency_key in (select key from busy) then 'busy' end,
        wake_at = clock_timestamp()
            + case when j.concurrency_key in (select key from busy) then interval '60 s' * (1 + random()) else interval '0' end
    from locked where j.id = locked.id and j.state || '' = 'queued';
end $$;

-- A UUIDv7 (RFC 9562, 5.7), for the jobs that are made here: retention and lists take the order of ids for that of time.
create function agentflow.uuid7_1() returns uuid language sql volatile as $$
    select encode(set_bit(set_bit(overlay(uuid_send(gen_random_uuid())
        placing substring(int8send((extract(epoch from clock_timestamp()) * 1000)::bigint) from 3) from 1 for 6), 52, 1), 53, 1),
        'hex')::uuid
$$;

-- What follows from a job's end, in the transaction that ends it: `then` jobs, the callback, the batch's counts.
-- The rows of p_ids are terminal and locked by the caller. Returns the new jobs, which may be rung at once.
create function agentflow.follow_up_1(p_ids uuid[]) returns setof uuid
language plpgsql
set enable_seqscan = off set enable_hashjoin = off set enable_mergejoin = off set jit = off
as $$
begin
    return query
    insert into agentflow.jobs (id, organization_id, type, queue, priority, payload, max_attempts, time_limit_s,
        then_jobs, callback_url, correlation_id, parent_id, wake_at, sent_at, sends)
    select (t ->> 'id')::uuid, j.organization_id, t ->> 'type', t ->> 'queue', (t ->> 'priority')::smallint, t -> 'payload',
        (t ->> 'max_attempts')::smallint, (t ->> 'time_limit_s')::real, nullif(t -> 'then', 'null'), t ->> 'callback_url',
        j.correlation_id, j.id, clock_timestamp() + interval '30 s', clock_timestamp(), 1
    from agentflow.jobs j cross join lateral jsonb_array_elements(j.then_jobs) t
    where j.id = any (p_ids) and j.state || '' = 'succeeded' and j.then_jobs is not null
    union all
    select agentflow.uuid7_1(), j.organization_id, 'deliver_callback', 'default', 0::smallint,
        jsonb_build_object('job_id', j.id, 'url', j.callback_url), 10::smallint, 60::real, null, null,
        j.correlation_id, j.id, clock_timestamp() + interval '30 s', clock_timestamp(), 1
    from agentflow.jobs j
    where j.id = any (p_ids) and j.finished_at is not null and j.callback_url is not null
    returning id;

    with ended as materialized (                      -- by id alone: an index on batch_id would be read from end to end
        select batch_id, state from agentflow.jobs where id = any (p_ids) and finished_at is not null
    ), counts as (
        select batch_id, count(*) filter (where state = 'succeeded') as s, count(*) filter (where state = 'failed') as f,
            count(*) filter (where state = 'cancelled') as c
        from ended where batch_id is not null group by 1
    ), locked as materialized (
        select b.id from agentflow.batches b join counts on counts.batch_id = b.id order by b.id for update of b
    )
    update agentflow.batches b set succeeded = b.succeeded + s, failed = b.failed + f, cancelled = b.cancelled + c,
        finished_at = case when b.succeeded + b.failed + b.cancelled + s + f + c = b.total then clock_timestamp() end
    from counts, locked where b.id = counts.batch_id and locked.id = b.id;
end $$;

-- Rings the next in line of each key while it has free slots. The caller holds the keys' locks, under which parking as busy
-- happens too: no wake-up can be lost. Returns the jobs to ring.
create function agentflow.wake_line_1(p_keys text[]) returns uuid[]
language plpgsql
set enable_seqscan = off set enable_hashjoin = off set enable_mergejoin = off set jit = off
as $$
declare
    woken uuid[];
begin
    with heads as materialized (
        select h.id from agentflow.concurrency_keys k cross join lateral (
            select j.id from agentflow.jobs j
            where j.concurrency_key = k.key and j.state = 'queued' and j.run_at <= clock_timestamp()
            order by j.run_at, j.id
            limit greatest(0, k.slots - (select count(*) from agentflow.jobs r where r.concurrency_key = k.key and r.state = 'running'))
        ) h where k.key = any (p_keys)
    ), locked as materialized (
        select j.id from agentflow.jobs j join heads on heads.id = j.id
        where j.state || '' = 'queued' and j.wait_reason = 'busy' order by j.id for update of j skip locked
    ), next as (
        update agentflow.jobs j set wait_reason = null, sent_at = clock_timestamp(), sends = 1,
            wake_at = clock_timestamp() + interval '30 s'
        from locked where j.id = locked.id returning j.id
    )
    select array_agg(n.id) into woken from next n;
    return woken;
end $$;

-- The one way out of running: finish, retry, park, hand back, rescue. p_worker null means rescue: the lease must be over.
-- Outcomes: succeeded, failed, cancelled, retry, wait, handback, crashed. A row is returned for each verdict that was
-- written; a verdict without a row came too late (the lease was lost) and changed nothing. Rows with kind 'ring' name jobs
-- that became due by it.
create function agentflow.settle_1(
    p_ids uuid[], p_fences integer[], p_outcomes text[], p_delays double precision[], p_reasons text[],
    p_results jsonb[], p_errors jsonb[], p_worker uuid, p_lease interval, p_max_crashes integer
) returns table (kind text, job_id uuid, job_fence integer, job_state text, job_queue text, job_type text, job_priority smallint)
language plpgsql
set enable_seqscan = off set enable_hashjoin = off set enable_mergejoin = off set jit = off
as $$
declare
    keys text[];
    done uuid[];
    done_fences integer[];
    done_states text[];
    done_queues text[];
    done_types text[];
    with_follow_up uuid[];
    rung uuid[];
    woken uuid[];
begin
    select array_agg(distinct j.concurrency_key) into keys from agentflow.jobs j
    where j.id = any (p_ids) and j.state || '' = 'running' and j.concurrency_key is not null;
    if keys is not null then
        perform agentflow.lock_keys_1(keys);
    end if;

    with verdicts as materialized (                   -- the same verdict twice in a batch counts once
        select distinct on (v.id, v.fence) v.*
        from unnest(p_ids, p_fences, p_outcomes, p_delays, p_reasons, p_results, p_errors)
            v(id, fence, outcome, delay, reason, result, error)
    ), locked as materialized (                       -- the row as it is under the lock, not as the snapshot saw it
        select j.id, j.fence, j.attempt, j.max_attempts, j.crashes, j.cancel_requested, j.worker, j.started_at
        from agentflow.jobs j join verdicts v on v.id = j.id and v.fence = j.fence
        where j.state || '' = 'running' and case when p_worker is null
            then j.lease_until < clock_timestamp() or j.lease_until > clock_timestamp() + 2 * p_lease
            else j.worker = p_worker end
        order by j.id for update of j
    ), decided as materialized (
        select j.id, j.fence, j.attempt, j.worker, j.started_at, v.outcome, v.delay, v.reason, v.result, v.error,
            case
                when v.outcome in ('succeeded', 'failed') then v.outcome
                when v.outcome = 'cancelled' or j.cancel_requested then 'cancelled'
                when v.outcome = 'retry' and j.attempt >= j.max_attempts then 'failed'
                when v.outcome = 'crashed' and j.crashes + 1 >= p_max_crashes then 'failed'
                else 'queued'
            end as state
        from locked j join verdicts v on v.id = j.id and v.fence = j.fence
    ), written as (
        update agentflow.jobs j set
            state = d.state, worker = null, lease_until = null, slot = null,
            result = d.result, error = d.error,
            progress = case when d.state = 'succeeded' then 1 when d.state = 'queued' then null else j.progress end,
            stage = case when d.state in ('succeeded', 'queued') then null else j.stage end,
            finished_at = case when d.state <> 'queued' then clock_timestamp() end,
            finished_by = case when d.state <> 'queued' then d.worker end,
            -- waiting, interruption and the death of a process (crashes bound that) give the attempt back
            attempt = case when d.state = 'queued' and d.outcome in ('wait', 'handback', 'crashed') then j.attempt - 1 else j.attempt end,
            crashes = j.crashes + (d.outcome = 'crashed')::integer,
            run_at = case when d.state = 'queued' then clock_timestamp() + make_interval(secs => coalesce(d.delay, 0)) else j.run_at end,
            wake_at = case when d.state = 'queued' then clock_timestamp() + make_interval(secs => coalesce(d.delay, 0)) end,
            sent_at = null, sends = 0,
            wait_reason = case when d.state = 'queued' then coalesce(d.reason, d.outcome) end
        from decided d where j.id = d.id
        returning j.id, j.fence, j.state, j.queue, j.type, j.then_jobs is not null or j.callback_url is not null or j.batch_id is not null as follows
    ), recorded as (
        insert into agentflow.attempts (job_id, fence, attempt, worker, started_at, outcome, error)
        select d.id, d.fence, d.attempt, d.worker, d.started_at,
            case when d.state = 'cancelled' then 'cancelled' else d.outcome end, d.error
        from decided d where d.state <> 'succeeded'
    )
    select array_agg(w.id), array_agg(w.fence), array_agg(w.state), array_agg(w.queue), array_agg(w.type),
        array_agg(w.id) filter (where w.follows and w.state <> 'queued')
    into done, done_fences, done_states, done_queues, done_types, with_follow_up from written w;
    if done is null then
        return;
    end if;

    if with_follow_up is not null then
        select array_agg(f) into rung from agentflow.follow_up_1(with_follow_up) f;
    end if;
    if keys is not null then
        woken := agentflow.wake_line_1(keys);
    end if;

    return query
    select 'settled', s.*, null::smallint from unnest(done, done_fences, done_states, done_queues, done_types) s
    union all
    select 'ring', j.id, j.fence, j.state, j.queue, j.type, j.priority from agentflow.jobs j where j.id = any (rung || woken);
end $$;

-- Renews the leases of a worker's jobs and stores their progress. Answers per job: ok, cancel, lost, skipped (its row was
-- locked: ask again), and orphan for a running row of this worker that the worker did not name (a claim whose answer was lost).
create function agentflow.heartbeat_1(
    p_worker uuid, p_ids uuid[], p_fences integer[], p_progress real[], p_stages text[], p_lease interval
) returns table (job_id uuid, job_fence integer, answer text)
language plpgsql
set enable_seqscan = off set enable_hashjoin = off set enable_mergejoin = off set jit = off
as $$
begin
    return query
    with mine as materialized (
        select * from unnest(p_ids, p_fences, p_progress, p_stages) m(id, fence, progress, stage)
    ), locked as materialized (
        select j.id from agentflow.jobs j join mine m on m.id = j.id and m.fence = j.fence
        where j.state || '' = 'running' and j.worker = p_worker order by j.id for update of j skip locked
    ), renewed as (
        update agentflow.jobs j set lease_until = clock_timestamp() + p_lease,
            progress = coalesce(m.progress, j.progress), stage = coalesce(m.stage, j.stage)
        from locked, mine m where j.id = locked.id and m.id = j.id returning j.id
    )
    select m.id, m.fence, case
        when j.state is distinct from 'running' or j.fence <> m.fence or j.worker is distinct from p_worker then 'lost'
        when j.cancel_requested then 'cancel'
        when r.id is null then 'skipped'
        else 'ok' end
    from mine m left join agentflow.jobs j on j.id = m.id left join renewed r on r.id = m.id
    union all
    select j.id, j.fence, 'orphan' from agentflow.jobs j
    where j.worker = p_worker and j.state = 'running' and j.id <> all (p_ids);
end $$;

-- Takes jobs from workers whose leases ran out. One process at a time does it, and only one whose own heartbeats came through
-- for half a lease up to now, by the database's clock: after an outage of the database everybody's leases are over, and a
-- rescue that was under way when it froze would take jobs from workers that live.
create function agentflow.rescue_1(p_worker uuid, p_limit integer, p_lease interval, p_max_crashes integer)
returns table (kind text, job_id uuid, job_fence integer, job_state text, job_queue text, job_type text, job_priority smallint)
language plpgsql as $$
declare
    ids uuid[];
    fences integer[];
    delays double precision[];
begin
    if not pg_try_advisory_xact_lock(hashtextextended('agentflow.rescue', 7)) or not exists (
        select from agentflow.workers where id = p_worker and stopped_at is null
            and seen_at > clock_timestamp() - p_lease / 2 and well_since <= clock_timestamp() - p_lease / 2
    ) then
        return;
    end if;
    select array_agg(x.id), array_agg(x.fence), array_agg(x.delay) into ids, fences, delays from (
        select id, fence, least(300, 2 * power(2, crashes)) * (0.5 + random() / 2) as delay from agentflow.jobs
        where state = 'running' and (lease_until < clock_timestamp() or lease_until > clock_timestamp() + 2 * p_lease)
        order by id limit p_limit
    ) x;
    if ids is null then
        return;
    end if;
    return query select * from agentflow.settle_1(ids, fences,
        array_fill('crashed'::text, array[cardinality(ids)]), delays, array_fill('worker lost'::text, array[cardinality(ids)]),
        array_fill(null::jsonb, array[cardinality(ids)]),
        array_fill('{"code": "worker_lost", "message": "The worker that ran this job died or fell silent."}'::jsonb, array[cardinality(ids)]),
        null, p_lease, p_max_crashes);
end $$;

-- Cancels a queued job; asks for the end of a running one. Returns null when there is no such job, else its state now.
create function agentflow.cancel_1(p_organization bigint, p_id uuid) returns table (job_state text, rung uuid[])
language plpgsql as $$
declare
    s text;
    key text;
    follows boolean;
    r uuid[];
begin
    select j.concurrency_key into key from agentflow.jobs j where j.id = p_id and j.organization_id = p_organization;
    if key is not null then                           -- it may be the head that was just woken: the next one takes its place
        perform agentflow.lock_keys_1(array[key]);
    end if;
    update agentflow.jobs j set cancel_requested = true,
        state = case when j.state = 'queued' then 'cancelled' else j.state end,
        finished_at = case when j.state = 'queued' then clock_timestamp() end,
        wake_at = null, sent_at = null, wait_reason = null
    where j.id = p_id and j.organization_id = p_organization and j.state || '' in ('queued', 'running')
    returning j.state, j.callback_url is not null or j.batch_id is not null into s, follows;
    if s = 'cancelled' and follows then
        select array_agg(f) into r from agentflow.follow_up_1(array[p_id]) f;
    end if;
    if s = 'cancelled' and key is not null then
        r := r || agentflow.wake_line_1(array[key]);
    end if;
    if s is null then
        select j.state into s from agentflow.jobs j where j.id = p_id and j.organization_id = p_organization;
    end if;
    if s is not null then
        return query select s, r;
    end if;
end $$;

-- Picks due rows of a queue for ringing, fairly: organizations in turn within a class, classes in order, and a tenth of
-- each window for low, so that nothing starves. Stamps them; the caller commits, and only then publishes.
-- When there is nothing to ring, one row with a null id says in how many seconds the next row of the queue is due.
create function agentflow.relay_1(p_queue text) returns table (job_id uuid, job_type text, job_priority smallint, due_in_s double precision)
language plpgsql
set enable_seqscan = off set enable_hashjoin = off set enable_mergejoin = off set jit = off
as $$
declare
    p_window integer;
    outstanding integer;
    room integer;
begin
    if not pg_try_advisory_xact_lock(hashtextextended('agentflow.relay:' || p_queue, 7)) then
        return;
    end if;
    p_window := agentflow.window_1(p_queue);
    select count(*) into outstanding from (
        select 1 from agentflow.jobs where queue = p_queue and state = 'queued' and sent_at is not null
        and wake_at > clock_timestamp() limit p_window
    ) x;
    room := p_window - outstanding;
    if room > 0 then
        return query
        with recursive lanes as (                     -- (priority, organization) pairs by skip scan, not by DISTINCT
            (select j.priority, j.organization_id from agentflow.jobs j
                where j.queue = p_queue and j.state = 'queued' order by j.priority, j.organization_id limit 1)
            union all
            select n.priority, n.organization_id from lanes l cross join lateral (
                select j.priority, j.organization_id from agentflow.jobs j
                where j.queue = p_queue and j.state = 'queued'
                    and (j.priority, j.organization_id) > (l.priority, l.organization_id)
                order by j.priority, j.organization_id limit 1
            ) n
        ), heads as (
            select l.priority, h.id, h.wake_at, h.turn
            from lanes l cross join lateral (
                select q.id, q.wake_at, row_number() over (order by q.wake_at) as turn from (
                    select j.id, j.wake_at from agentflow.jobs j
                    where j.queue = p_queue and j.priority = l.priority and j.organization_id = l.organization_id
                        and j.state = 'queued' and j.wake_at <= clock_timestamp()
                    order by j.wake_at limit room
                ) q
            ) h
        ), ranked as (
            select h.*, row_number() over (partition by h.priority order by h.turn, h.wake_at) as place from heads h
        ), picked as materialized (
            select r.id from ranked r
            order by (r.priority = 2 and r.place <= greatest(1, room / 10)) desc, r.priority, r.place limit room
        ), locked as materialized (
            select j.id from agentflow.jobs j join picked on picked.id = j.id
            where j.state || '' = 'queued' and j.wake_at <= clock_timestamp() order by j.id for update of j skip locked
        )
        update agentflow.jobs j set sent_at = clock_timestamp(), sends = least(j.sends + 1, 30000),
            wake_at = clock_timestamp() + least(interval '30 s' * power(2, least(j.sends, 4)), interval '5 min')
        from locked where j.id = locked.id
        returning j.id, j.type, j.priority, null::double precision;
        if found then
            return;
        end if;
    end if;
    return query
    with recursive lanes as (
        (select j.priority, j.organization_id, j.wake_at from agentflow.jobs j
            where j.queue = p_queue and j.state = 'queued' order by j.priority, j.organization_id, j.wake_at limit 1)
        union all
        select n.priority, n.organization_id, n.wake_at from lanes l cross join lateral (
            select j.priority, j.organization_id, j.wake_at from agentflow.jobs j
            where j.queue = p_queue and j.state = 'queued'
                and (j.priority, j.organization_id) > (l.priority, l.organization_id)
            order by j.priority, j.organization_id, j.wake_at limit 1
        ) n
    )
    select null::uuid, null::text, null::smallint, extract(epoch from min(wake_at) - clock_timestamp())::double precision
    from lanes;
end $$;
