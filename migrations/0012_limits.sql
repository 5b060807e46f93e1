-- Budgets of a day, head starts within a class, and rules that organizations set for themselves.

-- A rule with `own` was set by the organization, and never allows more than the operator's do.
alter table agentflow.rate_limits add column own boolean not null default false;
alter table agentflow.pauses add column own boolean not null default false;
alter table agentflow.caps add column own boolean not null default false;

-- What an organization (0: each one that has no budget of the operator's) may use up of a measure in a day of UTC.
create table agentflow.budgets (
    organization_id bigint not null,
    measure text not null check (measure ~ '^[a-z][a-z0-9_]{0,62}$'),
    per_day numeric not null check (per_day > 0 and per_day < 1e18),
    own boolean not null default false,
    primary key (organization_id, measure)
);

-- What attempts have used up in a day, kept where usage is written, so that nobody has to add it up. `tokens` is tokens_in and
-- tokens_out together.
create table agentflow.usage_days (
    day date not null,
    organization_id bigint not null,
    measure text not null,
    amount numeric not null check (amount >= 0),
    primary key (day, organization_id, measure)
) with (fillfactor = 50);

alter table agentflow.budgets enable row level security;
alter table agentflow.usage_days enable row level security;

-- Who has used up a budget today.
create view agentflow.budgets_reached with (security_invoker = true) as
select d.organization_id, d.measure, d.amount, b.per_day from agentflow.usage_days d
left join agentflow.budgets mine on mine.organization_id = d.organization_id and mine.measure = d.measure
left join agentflow.budgets each on each.organization_id = 0 and each.measure = d.measure
cross join lateral (
    select case when mine.own then least(mine.per_day, each.per_day) else coalesce(mine.per_day, each.per_day) end as per_day
) b
where d.day = (clock_timestamp() at time zone 'UTC')::date and d.amount >= b.per_day;

create function agentflow.over_budget_1(p_organization bigint) returns boolean
language sql stable
set enable_seqscan = off set enable_hashjoin = off set enable_mergejoin = off set jit = off
as $$
    select exists (select from agentflow.budgets_reached where organization_id = p_organization)
$$;

-- Totals of attempts, as record_usage_1 writes them, and what they have grown by to the day's. Returns the organizations that
-- have used up a budget by it.
create function agentflow.record_usage_2(p_jobs uuid[], p_fences integer[], p_measures jsonb[]) returns setof bigint
language plpgsql
set enable_seqscan = off set enable_hashjoin = off set enable_mergejoin = off set jit = off
as $$
declare
    organizations bigint[];
begin
    -- First the rows, so that of two writers of an attempt one waits for what the other has counted.
    insert into agentflow.usage (job_id, fence, organization_id, measures)
    select j.id, n.fence, j.organization_id, '{}' from unnest(p_jobs, p_fences) n(id, fence)
    join agentflow.jobs j on j.id = n.id
    order by j.id, n.fence
    on conflict (job_id, fence) do nothing;

    with locked as materialized (
        select u.job_id, u.fence, u.organization_id, u.measures from agentflow.usage u
        where (u.job_id, u.fence) in (select * from unnest(p_jobs, p_fences))
        order by u.job_id, u.fence for update
    ), told as (                                      -- totals only rise, whichever order they come in
        select n.id, n.fence, m.name, max(m.value::numeric) as total
        from unnest(p_jobs, p_fences, p_measures) n(id, fence, measures) cross join lateral jsonb_each_text(n.measures) m(name, value)
        group by 1, 2, 3
    ), grown as materialized (
        select l.job_id, l.fence, l.organization_id, t.name, t.total, t.total - coalesce(b.before, 0) as more
        from locked l join told t on t.id = l.job_id and t.fence = l.fence
        cross join lateral (select (l.measures ->> t.name)::numeric as before) b
        where t.total > coalesce(b.before, -1)
    ), written as (
        update agentflow.usage u set updated_at = clock_timestamp(), measures = u.measures || g.totals
        from (select job_id, fence, jsonb_object_agg(name, total) as totals from grown group by 1, 2) g
        where u.job_id = g.job_id and u.fence = g.fence
    ), counted as (
        insert into agentflow.usage_days as d (day, organization_id, measure, amount)
        select (clock_timestamp() at time zone 'UTC')::date, g.organization_id, m.name, sum(g.more)
        from grown g cross join lateral (
            select g.name union all select 'tokens' where g.name in ('tokens_in', 'tokens_out')
        ) m(name)
        where g.more > 0 group by 2, 3 order by 2, 3  -- one order for all who write
        on conflict (day, organization_id, measure) do update set amount = d.amount + excluded.amount
        returning d.organization_id
    )
    select array_agg(distinct c.organization_id) into organizations from counted c;

    if exists (select from agentflow.budgets) then
        return query select distinct r.organization_id from agentflow.budgets_reached r where r.organization_id = any (organizations);
    end if;
end $$;

-- Jobs with a head start come before others of their class and organization as if they had been due so many seconds sooner.
-- An index on that sum would put those that are parked in front of every look; each of the few head starts that there are is
-- one range of this index, and the rest of the queue knows nothing of it.
alter table agentflow.jobs add column head_start_s smallint not null default 0
    constraint head_start_is_known check (head_start_s in (0, 5, 15, 30, 60, 120, 300, 600));
create index jobs_ahead on agentflow.jobs (queue, priority, organization_id, head_start_s, wake_at)
    where state = 'queued' and head_start_s > 0;

-- Jobs that come back from the line of a limit come before all others of their class and organization: their place is now. In
-- the order of time thousands that have none yet would be first, and the service would be called by nobody until each has one.
create function agentflow.back_1(p_reason text) returns boolean language sql immutable parallel safe
as $$ select coalesce(p_reason in ('limit', 'rate_limit', 'model_limit'), false) $$;
create index jobs_back on agentflow.jobs (queue, priority, organization_id, wake_at)
    where state = 'queued' and agentflow.back_1(wait_reason);

-- The first due jobs that are back, and those with each head start, of these types (null: of any).
create function agentflow.ahead_1(
    p_queue text, p_priority smallint, p_organization bigint, p_types text[], p_moment timestamptz, p_limit integer
) returns table (id uuid, type text, wake_at timestamptz, turn_at timestamptz)
language sql stable
set enable_seqscan = off set enable_hashjoin = off set enable_mergejoin = off set jit = off
as $$
    with recursive starts as (
        (select j.head_start_s from agentflow.jobs j
            where j.queue = p_queue and j.priority = p_priority and j.organization_id = p_organization
                and j.state = 'queued' and j.head_start_s > 0
            order by j.head_start_s limit 1)
        union all
        select n.head_start_s from starts s cross join lateral (
            select j.head_start_s from agentflow.jobs j
            where j.queue = p_queue and j.priority = p_priority and j.organization_id = p_organization
                and j.state = 'queued' and j.head_start_s > 0 and j.head_start_s > s.head_start_s
            order by j.head_start_s limit 1
        ) n
    )
    select h.id, h.type, h.wake_at, h.wake_at - make_interval(secs => s.head_start_s) from starts s cross join lateral (
        select j.id, j.type, j.wake_at from agentflow.jobs j
        where j.queue = p_queue and j.priority = p_priority and j.organization_id = p_organization
            and j.state = 'queued' and j.head_start_s > 0 and j.head_start_s = s.head_start_s
            and j.wake_at <= p_moment and (p_types is null or j.type = any (p_types)) and not agentflow.back_1(j.wait_reason)
        order by j.wake_at limit p_limit
    ) h
    union all
    (select j.id, j.type, j.wake_at, j.wake_at - interval '1 day' from agentflow.jobs j
        where j.queue = p_queue and j.priority = p_priority and j.organization_id = p_organization
            and j.state = 'queued' and agentflow.back_1(j.wait_reason)
            and j.wake_at <= p_moment and (p_types is null or j.type = any (p_types))
        order by j.wake_at limit p_limit)
$$;

-- The relay (relay_2) with budgets and head starts: organizations that have used up a budget are passed over. Head starts order an
-- organization's own jobs; between organizations the turn decides, and then the time since which a job is due.
create function agentflow.relay_3(p_queue text) returns table (job_id uuid, job_type text, job_priority smallint, due_in_s double precision)
language plpgsql
set enable_seqscan = off set enable_hashjoin = off set enable_mergejoin = off set jit = off
as $$
declare
    p_window integer;
    outstanding integer;
    room integer;
    organizations bigint[];
    rooms integer[];
    bases double precision[];
    costs double precision[];
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
        select array_agg(distinct l.organization_id) into organizations from lanes l
        where l.wake_at <= clock_timestamp()
        and not exists (select from agentflow.pauses p where p.kind = 'organization' and p.organization_id = l.organization_id)
        and not (budgeted and agentflow.over_budget_1(l.organization_id));
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

        return query
        with mine as materialized (
            select * from unnest(organizations, rooms, bases, costs) m(id, own_room, base, cost)
        ), heads as (
            select c.priority, m.id as organization_id, h.id, h.type, h.wake_at, h.turn, m.own_room, m.base + h.turn * m.cost as place
            from mine m cross join (values (0::smallint), (1::smallint), (2::smallint)) c(priority) cross join lateral (
                select q.*, row_number() over (order by q.turn_at) as turn from (
                    select d.id, d.type, d.wake_at, d.wake_at as turn_at from (
                        select j.id, j.type, j.wake_at, j.head_start_s, j.wait_reason from agentflow.jobs j
                        where j.queue = p_queue and j.priority = c.priority and j.organization_id = m.id
                            and j.state = 'queued' and j.wake_at <= moment
                        order by j.wake_at limit least(room, m.own_room)
                    ) d where d.head_start_s = 0 and not agentflow.back_1(d.wait_reason)
                    union all
                    select a.id, a.type, a.wake_at, a.turn_at
                    from agentflow.ahead_1(p_queue, c.priority, m.id, null, moment, least(room, m.own_room)) a where ahead
                ) q
            ) h
        ), limited as (                               -- an organization's room is for all of its classes
            select h.*, row_number() over (partition by h.organization_id
                order by (h.priority = 2 and h.turn <= greatest(1, room / 10)) desc, h.priority, h.turn) as turn_of_all from heads h
        ), ranked as (
            select l.*, row_number() over (partition by l.priority order by l.place, l.wake_at) as rank
            from limited l where l.turn_of_all <= l.own_room
        ), picked as materialized (
            select r.id, r.organization_id, r.type, r.place from ranked r
            order by (r.priority = 2 and r.rank <= greatest(1, room / 10)) desc, r.priority, r.rank limit room
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
        ), charged as (
            insert into agentflow.lanes as l (queue, organization_id, virtual_s)
            select p_queue, m.id, m.base + n.jobs * m.cost from mine m cross join lateral (
                select count(*) as jobs from picked p where p.organization_id = m.id and p.id not in (select k.id from parked k)
            ) n where cardinality(organizations) > 1
            union all
            select p_queue, 0, min(m.base) from mine m where cardinality(organizations) > 1 having count(*) > 1
            on conflict (queue, organization_id) do update set virtual_s = greatest(l.virtual_s, excluded.virtual_s)
        ), locked as materialized (
            select j.id from agentflow.jobs j join picked on picked.id = j.id
            where j.state || '' = 'queued' and j.wake_at <= clock_timestamp() order by j.id for update of j skip locked
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

-- Polling (poll_2) with the same two.
create function agentflow.poll_3(p_queue text, p_room integer, p_reserved integer, p_types text[])
returns table (job_id uuid, job_type text, job_priority smallint, due_in_s double precision)
language plpgsql
set enable_seqscan = off set enable_hashjoin = off set enable_mergejoin = off set jit = off
as $$
declare
    regular integer := p_room - p_reserved;
    -- A tenth of a small room is less than a row: then it is a row in some of the rounds.
    for_low integer := p_room / 10 + (random() < (p_room % 10) / 10.0)::integer;
    ruled boolean;
    budgeted boolean;
    ahead boolean;
    moment timestamptz;
begin
    if exists (select from agentflow.pauses where kind = 'queue' and name = p_queue) then
        return query select null::uuid, null::text, null::smallint, -1.0::double precision;
        return;
    end if;
    -- Waited for, unlike the relay's: a worker that found it taken would sleep though there is work. It is held for milliseconds.
    perform pg_advisory_xact_lock(hashtextextended('agentflow.relay:' || p_queue, 7));
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
        select l.priority, l.organization_id, h.id, h.type, h.wake_at, h.turn
        from lanes l cross join lateral (
            select q.id, q.type, q.wake_at, row_number() over (order by q.turn_at) as turn from (
                select d.id, d.type, d.wake_at, d.wake_at as turn_at from (
                    select j.id, j.type, j.wake_at, j.head_start_s, j.wait_reason from agentflow.jobs j
                    where j.queue = p_queue and j.priority = l.priority and j.organization_id = l.organization_id
                        and j.state = 'queued' and j.wake_at <= moment and j.type = any (p_types)
                    order by j.wake_at limit p_room
                ) d where d.head_start_s = 0 and not agentflow.back_1(d.wait_reason)
                union all
                select a.id, a.type, a.wake_at, a.turn_at
                from agentflow.ahead_1(p_queue, l.priority, l.organization_id, p_types, moment, p_room) a where ahead
            ) q
        ) h
        where not exists (select from agentflow.pauses p where p.kind = 'organization' and p.organization_id = l.organization_id)
            and not (budgeted and agentflow.over_budget_1(l.organization_id))
    ), ranked as (
        select h.*, row_number() over (partition by h.priority order by h.turn, h.wake_at) as place from heads h
    ), ordered as (
        select r.id, r.organization_id, r.type, r.priority, row_number() over (order by (r.priority = 2 and r.place <= for_low) desc, r.priority, r.place) as n
        from ranked r
    ), allowed as (
        select o.id, o.organization_id, o.type, o.n from (
            select x.*, row_number() over (partition by x.priority = 0 order by x.n) as nth from ordered x
        ) o where o.priority = 0 or o.nth <= regular
    ), picked as materialized (
        select a.id, a.organization_id, a.type, a.n from allowed a order by a.n limit p_room
    ), free as materialized (
        select k.organization_id, k.type, f.free from (select distinct p.organization_id, p.type from picked p where ruled) k
        cross join lateral agentflow.free_1(p_queue, k.organization_id, k.type) f(free)
    ), parked as materialized (                       -- as the relay does
        select p.id, case when p.free < 0 then 'paused' else 'busy' end as reason,
            case when p.free < 0 then 3600 else 300 end * (1 + random() / 10) as seconds
        from (
            select p.id, f.free, row_number() over (partition by p.organization_id, p.type order by p.n) as n
            from picked p join free f on f.organization_id = p.organization_id and f.type = p.type
        ) p where p.n > p.free
    ), locked as materialized (
        select j.id from agentflow.jobs j join picked on picked.id = j.id
        where j.state || '' = 'queued' and j.wake_at <= clock_timestamp() order by j.id for update of j skip locked
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
    select case when not s.held then s.id end, case when not s.held then s.type end, s.priority, case when s.held then 0.0 end::double precision
    from stamped s where not s.held or not exists (select from stamped o where not o.held);
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
