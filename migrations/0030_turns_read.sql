-- The relay (relay_4), which reads no more of a lane than its turns in this round, also where jobs of the queue have head starts or
-- are back from a limit. One that was parked for a vendor's limit was enough for it to read whole windows of all lanes: where two
-- hundred organizations wait with thousands of jobs each, seconds for a round. Where lanes turn out short, the level rises by steps.
create function agentflow.relay_5(p_queue text) returns table (job_id uuid, job_type text, job_priority smallint, due_in_s double precision)
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
    starts boolean[];                                 -- whether jobs of the lane have head starts or are back
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
    next_at timestamptz;
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

    with recursive lanes as (                         -- by skip scan, not by DISTINCT
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
    select (select min(l.wake_at) from lanes l), array_agg(distinct l.organization_id),
        array_agg(l.priority order by l.organization_id, l.priority), array_agg(l.owner order by l.organization_id, l.priority)
    into next_at, organizations, classes, owners
    from (
        select l.priority, l.organization_id, dense_rank() over (order by l.organization_id)::integer as owner from lanes l
        where room > 0 and l.wake_at <= clock_timestamp()
        and not exists (select from agentflow.pauses p where p.kind = 'organization' and p.organization_id = l.organization_id)
        and not (budgeted and agentflow.over_budget_1(l.organization_id))
    ) l;

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

        -- Of a lane no more is read than its turns may be. The level is a virtual time up to which as many jobs of its class have their
        -- turns as there is room for (of low priority: as are sure of theirs), were there enough in each lane: the first turns of so
        -- many lanes; or that at which lanes have so many together and one each, since turns are whole. Four times as many where jobs
        -- turn out short and a lane was cut off; at last all, as far as the room goes.
        for attempt in 1..5 loop
            select array_agg(least(room, rooms[l.owner],
                case when attempt < 5 then greatest(0, floor((l.level - bases[l.owner]) / costs[l.owner] + 1e-6)) end)::integer order by l.n)
            into reads
            from (
                select p.*, least(
                    min(p.level_up_to) over (partition by p.class),
                    min(bases[p.owner] + costs[p.owner]) filter (where p.nth >= p.need) over (partition by p.class)
                ) as level
                from (
                    select c.*, case when rooms[c.owner] > 0 then
                            (c.need + count(*) over (partition by c.class) + sum(bases[c.owner] / costs[c.owner]) filter (where rooms[c.owner] > 0) over up_to)
                            / sum(1 / costs[c.owner]) filter (where rooms[c.owner] > 0) over up_to
                        end as level_up_to,
                        case when rooms[c.owner] > 0 then count(*) filter (where rooms[c.owner] > 0) over (
                            partition by c.class order by bases[c.owner] + costs[c.owner]
                        ) end as nth
                    from (
                        select o.*, power(4, attempt - 1) * case when o.class = 2 then greatest(1, room / 10) else room end as need
                        from unnest(classes, owners) with ordinality as o(class, owner, n)
                    ) c
                    window up_to as (partition by c.class order by bases[c.owner])
                ) p
            ) l;
            if ahead then                             -- subqueries with a limit: EXISTS may be planned as a hash of all such jobs
                select array_agg(c.most > 0 and coalesce((
                    select true from agentflow.jobs j where j.queue = p_queue and j.priority = c.class
                        and j.organization_id = organizations[c.owner] and j.state = 'queued' and j.head_start_s > 0 limit 1
                ), (
                    select true from agentflow.jobs j where j.queue = p_queue and j.priority = c.class
                        and j.organization_id = organizations[c.owner] and j.state = 'queued' and agentflow.back_1(j.wait_reason)
                        and j.wake_at <= moment limit 1
                ), false) order by c.n)
                into starts
                from unnest(classes, owners, reads) with ordinality as c(class, owner, most, n);
            end if;
            with heads as (
                select c.class as priority, organizations[c.owner] as organization_id, h.id, h.type, h.wake_at, h.turn, h.was_cut,
                    rooms[c.owner] as own_room, bases[c.owner] + h.turn * costs[c.owner] as place
                from unnest(classes, owners, starts, reads) c(class, owner, starts, most) cross join lateral (
                    select q.*, row_number() over (order by q.turn_at) as turn,
                        c.most < least(room, rooms[c.owner]) and count(*) over () >= c.most as was_cut
                    from (
                        select d.id, d.type, d.wake_at, d.wake_at as turn_at from (
                            select j.id, j.type, j.wake_at, j.head_start_s, j.wait_reason from agentflow.jobs j
                            where j.queue = p_queue and j.priority = c.class and j.organization_id = organizations[c.owner]
                                and j.state = 'queued' and j.wake_at <= moment
                            order by j.wake_at limit c.most
                        ) d where d.head_start_s = 0 and not agentflow.back_1(d.wait_reason)
                        union all
                        select a.id, a.type, a.wake_at, a.turn_at
                        from agentflow.ahead_1(p_queue, c.class, organizations[c.owner], null, moment, c.most) a where c.starts  -- null: nowhere
                    ) q
                ) h
                where c.most > 0 and h.turn <= c.most -- of later turns, the jobs between may not have been read
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
                select coalesce(bool_or(k.was_cut and (k.so_far < room or k.priority = 2 and k.found < greatest(1, room / 10))), false)
                from (
                    select c.priority, r.found, sum(r.found) over (order by c.priority) as so_far, coalesce(h.was_cut, false) or c.is_left as was_cut
                    from (
                        select l.class as priority, bool_or(l.most = 0 and rooms[l.owner] > 0) as is_left
                        from unnest(classes, owners, reads) l(class, owner, most) group by l.class
                    ) c cross join lateral (
                        select count(*) from ranked r where r.priority = c.priority
                    ) r(found) left join lateral (
                        select bool_or(h.was_cut) from heads h where h.priority = c.priority
                    ) h(was_cut) on true
                ) k
            )
            into picks, pick_organizations, pick_types, pick_places, is_short
            from chosen c;
            exit when not is_short;
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

    return query select null::uuid, null::text, null::smallint, extract(epoch from next_at - clock_timestamp())::double precision;
end $$;
