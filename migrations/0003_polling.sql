-- Picks due rows of a queue for the free threads of one worker, which nobody rings for: there is no broker, or it is away. As
-- fairly as the relay (relay_1): organizations in turn within a class, classes in order, a tenth for low. Stamps them, so that
-- no other worker takes them, too. Of p_room rows all may be critical, and p_room - p_reserved of other classes; only types of
-- p_types, which the worker knows and has room for.
--
-- When nothing is due: rows that were sent 5 s ago and claimed by nobody. Their messages are in a broker that is away, or that
-- was one until a deploy, or they were picked by a process that died; and where a message does come, its claim finds nothing.
-- When there is nothing to pick at all, one row with a null id says in how many seconds the next row of the queue is due.
create function agentflow.poll_1(p_queue text, p_room integer, p_reserved integer, p_types text[])
returns table (job_id uuid, job_type text, job_priority smallint, due_in_s double precision)
language plpgsql
set enable_seqscan = off set enable_hashjoin = off set enable_mergejoin = off set jit = off
as $$
declare
    regular integer := p_room - p_reserved;
    -- A tenth of a small room is less than a row: then it is a row in some of the rounds.
    for_low integer := p_room / 10 + (random() < (p_room % 10) / 10.0)::integer;
begin
    -- Waited for, unlike the relay's: a worker that found it taken would sleep though there is work. It is held for milliseconds.
    perform pg_advisory_xact_lock(hashtextextended('agentflow.relay:' || p_queue, 7));
    return query                                      -- with a snapshot taken after the lock
    with recursive lanes as (
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
                    and j.state = 'queued' and j.wake_at <= clock_timestamp() and j.type = any (p_types)
                order by j.wake_at limit p_room
            ) q
        ) h
    ), ranked as (
        select h.*, row_number() over (partition by h.priority order by h.turn, h.wake_at) as place from heads h
    ), ordered as (
        select r.id, r.priority, row_number() over (order by (r.priority = 2 and r.place <= for_low) desc, r.priority, r.place) as n
        from ranked r
    ), allowed as (
        select o.id, o.n from (
            select x.*, row_number() over (partition by x.priority = 0 order by x.n) as nth from ordered x
        ) o where o.priority = 0 or o.nth <= regular
    ), picked as materialized (
        select a.id from allowed a order by a.n limit p_room
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

    return query
    with sent as (
        select j.id, j.priority, row_number() over (order by j.priority, j.sent_at) as n from agentflow.jobs j
        where j.queue = p_queue and j.state = 'queued' and j.sent_at is not null
            and j.sent_at < clock_timestamp() - interval '5 s' and j.type = any (p_types)
    ), picked as materialized (
        select x.id from (
            select s.*, row_number() over (partition by s.priority = 0 order by s.n) as nth from sent s
        ) x where x.priority = 0 or x.nth <= regular order by x.n limit p_room
    ), locked as materialized (
        select j.id from agentflow.jobs j join picked on picked.id = j.id
        where j.state || '' = 'queued' and j.sent_at < clock_timestamp() - interval '5 s' order by j.id for update of j skip locked
    )
    update agentflow.jobs j set sent_at = clock_timestamp(), wake_at = greatest(j.wake_at, clock_timestamp() + interval '30 s')
    from locked where j.id = locked.id
    returning j.id, j.type, j.priority, null::double precision;
    if found then
        return;
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
