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
            'window_1', 'share_1', 'room_1', 'free_1', 'over_budget_1', 'ahead_1', 'poll_3', 'claim_keyed_1', 'claim_keyed_2',
            'settle_1', 'follow_up_1', 'wake_line_1', 'leave_key_1', 'enter_key_1', 'heartbeat_1'
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

-- The relay (relay_3) with plans that are kept, and with lanes read as far as their turns in this round go: where two hundred
-- organizations wait with thousands of jobs each, whole windows of all of them were read to pick one.
create function agentflow.relay_4(p_queue text) returns table (job_id uuid, job_type text, job_priority smallint, due_in_s double precision)
language plpgsql
set enable_seqscan = off set enable_hashjoin = off set enable_mergejoin = off set jit = off
set plan_cache_mode = force_generic_plan
as $$
declare
    p_window integer;
    outstanding integer;
    room integer;
    organizations bigint[];
    rooms integer[];
    bases double precision[];
    costs double precision[];
    classes smallint[];                               -- of each lane; the place of its owner in the arrays above; how much of it is read
    owners integer[];
    reads integer[];
    picks uuid[];
    pick_organizations bigint[];
    pick_types text[];
    pick_places double precision[];
    is_short boolean;
    clock double precision;
    ruled boolean;
    budgeted boolean;
    ahead boolean;
    moment timestamptz;
begin
    if not pg_try_advisory_xact_lock(hashtextextended('agentflow.relay:' || p_queue, 7)) then
        return;
    end if;
    if exists (select from agentflow.pauses where kind = 'queue' and name = p_queue) then
        return query select null::uuid, null::text, null::smallint, 5.0::double precision;
        return;
    end if;
    p_window := agentflow.window_1(p_queue);
    select count(*) into outstanding from (
        select 1 from agentflow.jobs where queue = p_queue and state = 'queued' and sent_at is not null
        and wake_at > clock_timestamp() limit p_window
    ) x;
    room := p_window - outstanding;
    select exists (select from agentflow.pauses where kind = 'type') or exists (select from agentflow.caps where type <> ''),
        exists (select from agentflow.budgets), exists (
            select from agentflow.jobs j where j.queue = p_queue and j.state = 'queued' and j.head_start_s > 0
        ) or exists (
            select from agentflow.jobs j where j.queue = p_queue and j.state = 'queued' and agentflow.back_1(j.wait_reason)
        ), clock_timestamp()
    into ruled, budgeted, ahead, moment;
    if ruled then
        perform agentflow.let_go_1(p_queue);
    end if;

    if room > 0 then
        with recursive lanes as (                     -- by skip scan, not by DISTINCT
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
        select array_agg(distinct l.organization_id), array_agg(l.priority order by l.organization_id, l.priority),
            array_agg(l.owner order by l.organization_id, l.priority)
        into organizations, classes, owners
        from (
            select l.priority, l.organization_id, dense_rank() over (order by l.organization_id)::integer as owner from lanes l
            where l.wake_at <= clock_timestamp()
            and not exists (select from agentflow.pauses p where p.kind = 'organization' and p.organization_id = l.organization_id)
            and not (budgeted and agentflow.over_budget_1(l.organization_id))
        ) l;
    end if;

    if organizations is not null then
        if agentflow.share_1() = 1 and not exists (select from agentflow.caps) then
            rooms := array_fill(room, array[cardinality(organizations)]);
        else
            select array_agg(r.room order by r.organization_id) into rooms
            from agentflow.room_1(p_queue, organizations, p_window) r;
        end if;
        select coalesce(max(virtual_s), 0) into clock from agentflow.lanes where queue = p_queue and organization_id = 0;
        select array_agg(greatest(coalesce(l.virtual_s, 0), clock) order by o.id), array_agg(coalesce(l.cost_s, 0.02) / coalesce(g.weight, 1) order by o.id)
        into bases, costs
        from unnest(organizations) o(id) left join agentflow.lanes l on l.queue = p_queue and l.organization_id = o.id
        left join agentflow.organizations g on g.id = o.id;

        -- Of a lane no more is read than its turns may be: the level is the virtual time up to which twice as many jobs of its class
        -- as there is room for have their turns, were there enough in each lane. Where a class turns out short and a lane of it was
        -- cut off, all are read as far as the room goes. Head starts are turns of their own: then so, too.
        select array_agg(least(room, rooms[l.owner], 1 + ceil(greatest(0, (l.level - bases[l.owner]) / costs[l.owner])))::integer order by l.n)
        into reads
        from (
            select p.*, min(p.level_up_to) over (partition by p.class) as level from (
                select c.class, c.owner, c.n, case when rooms[c.owner] > 0 then
                    (2 * room + sum(bases[c.owner] / costs[c.owner]) filter (where rooms[c.owner] > 0) over up_to)
                    / sum(1 / costs[c.owner]) filter (where rooms[c.owner] > 0) over up_to end as level_up_to
                from unnest(classes, owners) with ordinality as c(class, owner, n)
                window up_to as (partition by c.class order by bases[c.owner])
            ) p
        ) l;
        for attempt in 1..2 loop
            if attempt = 2 or ahead then
                select array_agg(least(room, rooms[o.owner]) order by o.n) into reads from unnest(owners) with ordinality as o(owner, n);
            end if;
            with heads as (
                select c.class as priority, organizations[c.owner] as organization_id, h.id, h.type, h.wake_at, h.turn, h.was_cut,
                    rooms[c.owner] as own_room, bases[c.owner] + h.turn * costs[c.owner] as place
                from unnest(classes, owners, reads) c(class, owner, most) cross join lateral (
                    select q.*, row_number() over (order by q.turn_at) as turn from (
                        select d.id, d.type, d.wake_at, d.wake_at as turn_at, d.n = c.most and c.most < least(room, rooms[c.owner]) as was_cut
                        from (
                            select f.*, count(*) over () as n from (
                                select j.id, j.type, j.wake_at, j.head_start_s, j.wait_reason from agentflow.jobs j
                                where j.queue = p_queue and j.priority = c.class and j.organization_id = organizations[c.owner]
                                    and j.state = 'queued' and j.wake_at <= moment
                                order by j.wake_at limit c.most
                            ) f
                        ) d where d.head_start_s = 0 and not agentflow.back_1(d.wait_reason)
                        union all
                        select a.id, a.type, a.wake_at, a.turn_at, false
                        from agentflow.ahead_1(p_queue, c.class, organizations[c.owner], null, moment, c.most) a where ahead
                    ) q
                ) h
            ), limited as (                           -- an organization's room is for all of its classes
                select h.*, row_number() over (partition by h.organization_id
                    order by (h.priority = 2 and h.turn <= greatest(1, room / 10)) desc, h.priority, h.turn) as turn_of_all from heads h
            ), ranked as (
                select l.*, row_number() over (partition by l.priority order by l.place, l.wake_at) as rank
                from limited l where l.turn_of_all <= l.own_room
            ), chosen as (
                select r.id, r.organization_id, r.type, r.place from ranked r
                order by (r.priority = 2 and r.rank <= greatest(1, room / 10)) desc, r.priority, r.rank limit room
            )
            select array_agg(c.id), array_agg(c.organization_id), array_agg(c.type), array_agg(c.place), (
                select coalesce(bool_or(k.was_cut and k.found < room), false) from (
                    select h.priority, bool_or(h.was_cut) as was_cut,
                        (select count(*) from ranked r where r.priority = h.priority) as found
                    from heads h group by h.priority
                ) k
            )
            into picks, pick_organizations, pick_types, pick_places, is_short
            from chosen c;
            exit when ahead or not is_short;
        end loop;

        return query
        with mine as materialized (
            select * from unnest(organizations, bases, costs) m(id, base, cost)
        ), picked as materialized (
            select * from unnest(picks, pick_organizations, pick_types, pick_places) p(id, organization_id, type, place)
        ), free as materialized (
            select k.organization_id, k.type, f.free from (select distinct p.organization_id, p.type from picked p where ruled) k
            cross join lateral agentflow.free_1(p_queue, k.organization_id, k.type) f(free)
        ), parked as materialized (                   -- those of paused types, and those over the cap of their type
            select p.id, case when p.free < 0 then 'paused' else 'busy' end as reason,
                case when p.free < 0 then 3600 else 300 end * (1 + random() / 10) as seconds
            from (
                select p.id, f.free, row_number() over (partition by p.organization_id, p.type order by p.place) as n
                from picked p join free f on f.organization_id = p.organization_id and f.type = p.type
            ) p where p.n > p.free
        ), locked as materialized (
            select j.id, j.organization_id, j.sends from agentflow.jobs j
            where j.id = any (picks) and j.state || '' = 'queued' and j.wake_at <= clock_timestamp() order by j.id for update of j skip locked
        ), charged as (                               -- once for each job, however often it is rung for until it is claimed
            insert into agentflow.lanes as l (queue, organization_id, virtual_s)
            select p_queue, m.id, m.base + n.jobs * m.cost from mine m cross join lateral (
                select count(*) as jobs from locked p where p.organization_id = m.id and p.sends = 0
                and p.id not in (select k.id from parked k)
            ) n where cardinality(organizations) > 1
            union all
            select p_queue, 0, min(m.base) from mine m where cardinality(organizations) > 1 having count(*) > 1
            on conflict (queue, organization_id) do update set virtual_s = greatest(l.virtual_s, excluded.virtual_s)
        ), stamped as (
            update agentflow.jobs j set
                sent_at = case when k.id is null then clock_timestamp() end,
                sends = case when k.id is null then least(j.sends + 1, 30000) else 0 end,
                wait_reason = case when k.id is null then j.wait_reason else k.reason end,
                wake_at = clock_timestamp() + case when k.id is null
                    then least(interval '30 s' * power(2, least(j.sends, 4)), interval '5 min')
                    else make_interval(secs => k.seconds) end
            from locked left join parked k on k.id = locked.id where j.id = locked.id
            returning j.id, j.type, j.priority, k.id is not null as held
        )
        -- Where all that was picked was parked, the relay looks again at once: others may wait behind them.
        select case when not s.held then s.id end, case when not s.held then s.type end, s.priority, case when s.held then 0.0 end::double precision
        from stamped s where not s.held or not exists (select from stamped o where not o.held);
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

-- What poll_3 has picked is looked up by its ids: on a small table a join begins with all jobs, and a kept plan would do so on a
-- large one.
do $$
declare
    was text := pg_get_functiondef('agentflow.poll_3(text,integer,integer,text[])'::regprocedure);
    changed text := replace(was, 'join picked on picked.id = j.id
        where ', 'where j.id = any (array(select p.id from picked p)) and ');
begin
    if changed = was then
        raise exception 'poll_3 is another one';
    end if;
    execute changed;
end $$;
