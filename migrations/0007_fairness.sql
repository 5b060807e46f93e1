-- Many organizations on one system: what each may use, and whose turn it is. All small tables; where nothing is said in them
-- and one organization is active, the relay does what it did before.

alter table agentflow.organizations add column weight real not null default 1 check (weight between 0.01 and 1000);

-- Calls to a provider, or starts of a job type (`type:NAME`). Organization 0: each one that has none of its own.
create table agentflow.rate_limits (
    organization_id bigint not null,
    provider text not null check (provider <> ''),
    per_s integer not null check (per_s between 1 and 31536000),
    amount integer not null check (amount between 1 and 1000000),
    primary key (organization_id, provider, per_s)
);

-- What is paused: a queue, a type (of one organization or, with 0, of all), or an organization.
create table agentflow.pauses (
    kind text not null check (kind in ('queue', 'type', 'organization')),
    name text not null default '',
    organization_id bigint not null default 0,
    reason text,
    created_at timestamptz not null default clock_timestamp(),
    primary key (kind, name, organization_id),
    constraint names_something check ((kind = 'organization') = (name = '') and (kind <> 'organization' or organization_id > 0)
        and (kind <> 'queue' or organization_id = 0))
);

-- The most jobs of an organization (0: of each one) that run at once; with a type, of that type.
create table agentflow.caps (
    organization_id bigint not null,
    type text not null default '',
    running integer not null check (running between 1 and 100000),
    primary key (organization_id, type)
);

-- Whose turn it is: virtual time is the work done in seconds over the weight. Row 0 of a queue is its clock: an organization that
-- comes back from idleness starts there, and does not get back what it did not ask for.
create table agentflow.lanes (
    queue text not null,
    organization_id bigint not null,
    virtual_s double precision not null default 0,
    cost_s double precision not null default 0.02 check (cost_s > 0),   -- of one job, as measured lately
    primary key (queue, organization_id)
) with (fillfactor = 50);

-- Held back by the cap of their type: the relay lets the first of them go as soon as one of the type has ended.
create index jobs_held on agentflow.jobs (queue, organization_id, type, run_at, id)
    where state = 'queued' and wait_reason = 'busy' and concurrency_key is null;

alter table agentflow.rate_limits enable row level security;
alter table agentflow.pauses enable row level security;
alter table agentflow.caps enable row level security;
alter table agentflow.lanes enable row level security;

-- Where several organizations share a queue, no one may hold more than this share of its threads.
create function agentflow.share_1() returns double precision language sql stable as $$
    select case when (select count(*) from (select from agentflow.organizations limit 2) x) > 1 then 0.8 else 1 end
$$;

-- How many more messages of each organization may be outstanding in a queue: its cap of threads less what runs, as many jobs
-- for each as one thread does in about 50 ms, less what was sent already.
create function agentflow.room_1(p_queue text, p_organizations bigint[], p_window integer)
returns table (organization_id bigint, room integer)
language sql stable
set enable_seqscan = off set enable_hashjoin = off set enable_mergejoin = off set jit = off
as $$
    with staff as (
        select greatest(1, coalesce(sum(threads), 0)) as threads from agentflow.workers
        where seen_at > clock_timestamp() - interval '60 s' and stopped_at is null and p_queue = any (queues)
    ), busy as materialized (
        select j.organization_id, count(*) filter (where j.queue = p_queue) as here, count(*) as anywhere
        from agentflow.jobs j where j.state = 'running' group by 1
    )
    select o.id, greatest(0, least(
        case when s.share < 1 then
            (greatest(1, floor(s.share * staff.threads)) - coalesce(b.here, 0)) * greatest(1, 0.05 / coalesce(l.cost_s, 0.02))
        else p_window end,
        coalesce(c.running - coalesce(b.anywhere, 0), p_window),
        p_window) - sent.n)::integer
    from unnest(p_organizations) o(id) cross join staff cross join (select agentflow.share_1() as share) s
    left join busy b on b.organization_id = o.id
    left join agentflow.lanes l on l.queue = p_queue and l.organization_id = o.id
    left join lateral (
        select c.running from agentflow.caps c where c.organization_id in (o.id, 0) and c.type = ''
        order by c.organization_id desc limit 1
    ) c on true
    cross join lateral (
        select count(*) as n from (
            select from agentflow.jobs j where j.queue = p_queue and j.organization_id = o.id and j.state = 'queued'
            and j.sent_at is not null and j.wake_at > clock_timestamp() limit p_window
        ) x
    ) sent
$$;

-- How many more jobs of a type an organization may have running or sent; null without a cap, -1 while the type is paused.
create function agentflow.free_1(p_queue text, p_organization bigint, p_type text) returns integer
language sql stable
set enable_seqscan = off set enable_hashjoin = off set enable_mergejoin = off set jit = off
as $$
    select case when exists (
        select from agentflow.pauses where kind = 'type' and name = p_type and organization_id in (p_organization, 0)
    ) then -1 else (
        select greatest(0, c.running - (
            select count(*) from agentflow.jobs r
            where r.state = 'running' and r.organization_id = p_organization and r.type = p_type
        ) - (
            select count(*) from agentflow.jobs s where s.queue = p_queue and s.organization_id = p_organization
            and s.state = 'queued' and s.sent_at is not null and s.wake_at > clock_timestamp() and s.type = p_type
        )) from agentflow.caps c where c.organization_id in (p_organization, 0) and c.type = p_type
        order by c.organization_id desc limit 1
    ) end::integer
$$;

-- Lets go, in order, as many of those that the caps of their types held back as there is room for by now.
create function agentflow.let_go_1(p_queue text) returns void
language sql volatile
set enable_seqscan = off set enable_hashjoin = off set enable_mergejoin = off set jit = off
as $$
    with recursive kinds as (
        (select j.organization_id, j.type from agentflow.jobs j
            where j.queue = p_queue and j.state = 'queued' and j.wait_reason = 'busy' and j.concurrency_key is null
            order by j.organization_id, j.type limit 1)
        union all
        select n.organization_id, n.type from kinds k cross join lateral (
            select j.organization_id, j.type from agentflow.jobs j
            where j.queue = p_queue and j.state = 'queued' and j.wait_reason = 'busy' and j.concurrency_key is null
                and (j.organization_id, j.type) > (k.organization_id, k.type)
            order by j.organization_id, j.type limit 1
        ) n
    ), heads as (
        select h.id from kinds k cross join lateral (
            select j.id from agentflow.jobs j
            where j.queue = p_queue and j.organization_id = k.organization_id and j.type = k.type
                and j.state = 'queued' and j.wait_reason = 'busy' and j.concurrency_key is null
            order by j.run_at, j.id limit greatest(0, coalesce(agentflow.free_1(p_queue, k.organization_id, k.type), 1000))
        ) h
    ), locked as materialized (
        select j.id from agentflow.jobs j join heads on heads.id = j.id
        where j.state || '' = 'queued' and j.wait_reason = 'busy' order by j.id for update of j skip locked
    )
    update agentflow.jobs j set wait_reason = null, wake_at = least(j.wake_at, greatest(j.run_at, clock_timestamp() - interval '1 h'))
    from locked where j.id = locked.id
$$;

-- What was done, as the workers measured it: corrects the virtual times, which were charged by what a job was thought to cost.
create function agentflow.charge_1(p_queues text[], p_organizations bigint[], p_jobs integer[], p_seconds double precision[]) returns void
language sql volatile as $$
    insert into agentflow.lanes as l (queue, organization_id, cost_s)
    select w.queue, w.organization_id, greatest(0.0001, w.seconds / w.jobs)
    from unnest(p_queues, p_organizations, p_jobs, p_seconds) w(queue, organization_id, jobs, seconds)
    order by w.queue, w.organization_id
    on conflict (queue, organization_id) do update set
        virtual_s = greatest(0, l.virtual_s + (
            select (w.seconds - w.jobs * l.cost_s) / coalesce(o.weight, 1)
            from unnest(p_queues, p_organizations, p_jobs, p_seconds) w(queue, organization_id, jobs, seconds)
            left join agentflow.organizations o on o.id = w.organization_id
            where w.queue = l.queue and w.organization_id = l.organization_id)),
        cost_s = l.cost_s + (excluded.cost_s - l.cost_s) * (
            select least(0.5, w.jobs / 20.0)
            from unnest(p_queues, p_organizations, p_jobs) w(queue, organization_id, jobs)
            where w.queue = l.queue and w.organization_id = l.organization_id)
$$;

-- Picks due rows of a queue for ringing: classes in order, a tenth of each window for low, and within a class the organization
-- whose virtual time is least. Skips what is paused; what is over the cap of its type is parked for as long as those before it
-- will take. Stamps the picked; the caller commits, and only then publishes.
-- A row with a null id says in how many seconds to look again: when there was nothing to ring.
create function agentflow.relay_2(p_queue text) returns table (job_id uuid, job_type text, job_priority smallint, due_in_s double precision)
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
    ruled := exists (select from agentflow.pauses where kind = 'type') or exists (select from agentflow.caps where type <> '');
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
        and not exists (select from agentflow.pauses p where p.kind = 'organization' and p.organization_id = l.organization_id);
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
                select q.*, row_number() over (order by q.wake_at) as turn from (
                    select j.id, j.type, j.wake_at from agentflow.jobs j
                    where j.queue = p_queue and j.priority = c.priority and j.organization_id = m.id
                        and j.state = 'queued' and j.wake_at <= clock_timestamp()
                    order by j.wake_at limit least(room, m.own_room)
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

-- Polling (poll_1) under the same rules: what is paused waits, what is over the cap of its type is parked.
create function agentflow.poll_2(p_queue text, p_room integer, p_reserved integer, p_types text[])
returns table (job_id uuid, job_type text, job_priority smallint, due_in_s double precision)
language plpgsql
set enable_seqscan = off set enable_hashjoin = off set enable_mergejoin = off set jit = off
as $$
declare
    regular integer := p_room - p_reserved;
    -- A tenth of a small room is less than a row: then it is a row in some of the rounds.
    for_low integer := p_room / 10 + (random() < (p_room % 10) / 10.0)::integer;
    ruled boolean;
begin
    if exists (select from agentflow.pauses where kind = 'queue' and name = p_queue) then
        return query select null::uuid, null::text, null::smallint, -1.0::double precision;
        return;
    end if;
    -- Waited for, unlike the relay's: a worker that found it taken would sleep though there is work. It is held for milliseconds.
    perform pg_advisory_xact_lock(hashtextextended('agentflow.relay:' || p_queue, 7));
    ruled := exists (select from agentflow.pauses where kind = 'type') or exists (select from agentflow.caps where type <> '');
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
            select q.id, q.type, q.wake_at, row_number() over (order by q.wake_at) as turn from (
                select j.id, j.type, j.wake_at from agentflow.jobs j
                where j.queue = p_queue and j.priority = l.priority and j.organization_id = l.organization_id
                    and j.state = 'queued' and j.wake_at <= clock_timestamp() and j.type = any (p_types)
                order by j.wake_at limit p_room
            ) q
        ) h
        where not exists (select from agentflow.pauses p where p.kind = 'organization' and p.organization_id = l.organization_id)
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
