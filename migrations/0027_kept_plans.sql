-- What runs for each job is planned once in a session: planning took longer than running it. Functions keep their plans behind
-- a pooler, too, where statements cannot be prepared. A kept plan serves any values, so that it is asked for at once, not after
-- five runs that are compared with it; the settings on the functions keep it good for a table that grows under it.

-- Functions in SQL are planned each time. These do the same as before, in a language that keeps their plans.
do $$
declare
    f record;
begin
    for f in
        select p.oid, p.prosrc, p.proretset from pg_proc p
        where p.pronamespace = 'agentflow'::regnamespace
            and p.proname in ('window_1', 'share_1', 'room_1', 'free_1', 'over_budget_1', 'ahead_1')
    loop
        execute replace(replace(pg_get_functiondef(f.oid), 'LANGUAGE sql', 'LANGUAGE plpgsql'), f.prosrc, format(
            case when f.proretset then E'\n#variable_conflict use_column\nbegin\n    return query%send '
            else E'\nbegin\n    return (%s);\nend ' end, case when f.proretset then f.prosrc || E';\n' else f.prosrc end));
    end loop;
    for f in
        select p.oid from pg_proc p
        where p.pronamespace = 'agentflow'::regnamespace and p.proname in (
            'window_1', 'share_1', 'room_1', 'free_1', 'over_budget_1', 'ahead_1', 'relay_3', 'poll_3', 'claim_keyed_1',
            'claim_keyed_2', 'settle_1', 'follow_up_1', 'wake_line_1', 'leave_key_1', 'enter_key_1', 'heartbeat_1'
        )
    loop
        execute format('alter function %s set plan_cache_mode = force_generic_plan', f.oid::regprocedure);
    end loop;
end $$;

-- Claims what of p_ids is queued, due and without a concurrency key, and returns it; what has a key comes back as it is, queued.
-- The waiting lock is meant: SKIP LOCKED would lose the wake-up of a row that somebody merely looks at. Sorted, so that two
-- batches cannot deadlock.
create function agentflow.claim_1(p_ids uuid[], p_worker uuid, p_lease interval) returns setof agentflow.jobs
language plpgsql
set enable_seqscan = off set enable_hashjoin = off set enable_mergejoin = off set jit = off
set plan_cache_mode = force_generic_plan
as $$
begin
    return query
    with locked as materialized (
        select j.id from agentflow.jobs j
        where j.id = any (p_ids) and j.state || '' = 'queued' and j.run_at <= clock_timestamp() and j.concurrency_key is null
        order by j.id for update
    ), claimed as (
        update agentflow.jobs j set state = 'running', attempt = j.attempt + 1, fence = j.fence + 1, worker = p_worker,
            lease_until = clock_timestamp() + p_lease, started_at = clock_timestamp(),
            wake_at = null, sent_at = null, sends = 0, wait_reason = null, progress = null, stage = null
        from locked where j.id = locked.id and j.state || '' = 'queued' and j.attempt < j.max_attempts
        returning j.*
    )
    select * from claimed
    union all
    select j.* from agentflow.jobs j
    where j.id = any (p_ids) and j.state || '' = 'queued' and j.run_at <= clock_timestamp() and j.concurrency_key is not null;
end $$;

-- Inserts jobs of an organization in the order given. Those that are due are stamped as sent while the organization's window has
-- room and none of its class waits already, where p_ring says that somebody can be rung.
create function agentflow.submit_1(
    p_organization bigint, p_batch uuid, p_trace text, p_ring boolean,
    p_ids uuid[], p_types text[], p_queues text[], p_priorities smallint[], p_payloads jsonb[], p_max_attempts smallint[],
    p_time_limits real[], p_run_ats timestamptz[], p_keys text[], p_thens jsonb[], p_callbacks text[], p_correlations text[],
    p_idempotency_keys text[], p_retries uuid[], p_head_starts smallint[]
) returns setof agentflow.jobs
language plpgsql
set enable_seqscan = off set enable_hashjoin = off set enable_mergejoin = off set jit = off
set plan_cache_mode = force_generic_plan
as $$
begin
    return query
    with input as materialized (
        select * from unnest(
            p_ids, p_types, p_queues, p_priorities, p_payloads, p_max_attempts, p_time_limits, p_run_ats, p_keys, p_thens,
            p_callbacks, p_correlations, p_idempotency_keys, p_retries, p_head_starts
        ) with ordinality as i(id, type, queue, priority, payload, max_attempts, time_limit_s, run_at, concurrency_key,
            then_jobs, callback_url, correlation_id, idempotency_key, retry_of, head_start_s, n)
    ), room as materialized (
        select q.queue, w.size - (
                select count(*) from (
                    select 1 from agentflow.jobs s where s.queue = q.queue and s.organization_id = p_organization
                    and s.state = 'queued' and s.sent_at is not null limit w.size
                ) x
            ) as room,
            exists (
                select from agentflow.jobs o where o.queue = q.queue and o.priority = q.priority and o.state = 'queued'
                and o.organization_id = p_organization and o.wake_at <= clock_timestamp()
            ) as older, q.priority
        from (select distinct i.queue, i.priority from input i) q
        cross join lateral (select agentflow.window_1(q.queue) as size) w
    ), placed as (
        select i.*, p_ring and (i.run_at is null or i.run_at <= clock_timestamp()) and not r.older
            and row_number() over (partition by i.queue order by i.priority, i.n) <= r.room as now
        from input i join room r on r.queue = i.queue and r.priority = i.priority
    )
    insert into agentflow.jobs as j (id, organization_id, type, queue, priority, payload, max_attempts, time_limit_s, run_at,
        concurrency_key, then_jobs, callback_url, correlation_id, idempotency_key, retry_of, head_start_s, batch_id, trace,
        wake_at, sent_at, sends)
    select p.id, p_organization, p.type, p.queue, p.priority, p.payload, p.max_attempts, p.time_limit_s,
        coalesce(p.run_at, clock_timestamp()), p.concurrency_key, p.then_jobs, p.callback_url, p.correlation_id,
        p.idempotency_key, p.retry_of, p.head_start_s, p_batch, p_trace,
        case when p.now then clock_timestamp() + interval '30 s' else coalesce(p.run_at, clock_timestamp()) end,
        case when p.now then clock_timestamp() end, p.now::integer
    from placed p order by p.n
    returning j.*;
end $$;

-- Two changes to the texts of relay_3 and poll_3, which promise what they did.
-- What was picked is looked up by its ids: on a small table a join begins with all jobs, and a kept plan would do so on a large one.
-- And the relay looks at no more of an organization's jobs than its turns in this round may be: where two hundred wait with
-- thousands each, whole windows of all of them were read to pick one. The level is the virtual time up to which twice as many jobs
-- as there is room for have their turns, were there enough of each; who is short of jobs leaves turns to the next round.
do $$
declare
    changes text[] := array[
        array['relay_3(text)', 'select * from unnest(organizations, rooms, bases, costs) m(id, own_room, base, cost)',
            'select m.*, least(room, m.own_room, 1 + ceil(greatest(0, (l.level - m.base) / m.cost)))::integer as most
            from unnest(organizations, rooms, bases, costs) m(id, own_room, base, cost) cross join (
                select min(p.level) as level from (
                    select (2 * room + sum(o.base / o.cost) over up_to) / sum(1 / o.cost) over up_to as level
                    from unnest(bases, costs) o(base, cost) window up_to as (order by o.base)
                ) p
            ) l'],
        array['relay_3(text)', 'order by j.wake_at limit least(room, m.own_room)', 'order by j.wake_at limit m.most'],
        array['relay_3(text)', 'null, moment, least(room, m.own_room))', 'null, moment, m.most)'],
        array['relay_3(text)', 'join picked on picked.id = j.id
            where ', 'where j.id = any (array(select p.id from picked p)) and '],
        array['poll_3(text,integer,integer,text[])', 'join picked on picked.id = j.id
        where ', 'where j.id = any (array(select p.id from picked p)) and ']
    ];
    change text[];
    was text;
begin
    foreach change slice 1 in array changes loop
        was := pg_get_functiondef(('agentflow.' || change[1])::regprocedure);
        if position(change[2] in was) = 0 then
            raise exception '% has no %', change[1], change[2];
        end if;
        execute replace(was, change[2], change[3]);
    end loop;
end $$;
