-- Renders: what was sent to which ComfyUI server, how the servers are, and lines for a GPU whose length nobody but the servers knows.

-- Of all organizations: machines are the operator's. `well`: it may be given renders; said by whoever looked last.
create table agentflow.comfyui_servers (
    name text primary key,                            -- its address, without credentials
    pool text not null,
    slots smallint not null check (slots between 1 and 16),
    listed_at timestamptz not null default clock_timestamp(),   -- a worker has it in its settings
    looked_at timestamptz,
    seen_at timestamptz,                              -- its last answer
    well boolean not null default false,
    sick_until timestamptz,
    failures integer not null default 0,              -- in a row: each doubles the time until it is believed again
    problem text,
    version text,
    devices jsonb,                                    -- as /system_stats has them, in bytes
    queue integer,                                    -- prompts, anybody's
    nodes jsonb,                                      -- its /object_info
    nodes_at timestamptz
) with (fillfactor = 50);

-- A prompt: written before the server hears of it, since the server tells nobody apart who asks twice.
create table agentflow.renders (
    prompt_id uuid primary key,
    organization_id bigint not null,
    job_id uuid not null references agentflow.jobs on delete cascade,
    fence integer not null,                           -- of the attempt that made it
    server text not null,
    slot smallint not null,
    state text not null default 'taken' check (state in (
        'taken',                                      -- has a slot; nothing was sent
        'sending',                                    -- was sent, perhaps
        'sent',                                       -- the server has it
        'done',                                       -- ran to its end; its files are still to be fetched
        'collected',                                  -- and were: the job's result stands in `found`
        'failed', 'interrupted', 'timed_out', 'cancelled', 'gone',
        'lost',                                       -- had been sent, and the server knows nothing of it any more
        'unsent',                                     -- never arrived
        'given_up'                                    -- nobody can be asked; looked for when the server is back
    )),
    found jsonb,                                      -- what history said of one that is done, and then the job's result
    problem text,
    taken_at timestamptz not null default clock_timestamp(),
    sent_at timestamptz,
    ended_at timestamptz
) with (fillfactor = 70);
create unique index renders_live on agentflow.renders (job_id) where state in ('taken', 'sending', 'sent', 'done', 'collected');
create unique index renders_slot on agentflow.renders (server, slot) where state in ('taken', 'sending', 'sent');
create index renders_given_up on agentflow.renders (server) where state = 'given_up';
create index renders_jobs on agentflow.renders (job_id);

-- How long graphs of one shape take on a server, and their nodes: the share of the work that is done follows from that.
create table agentflow.render_times (
    shape text not null,
    server text not null,
    seconds real not null check (seconds >= 0),
    nodes jsonb not null,                             -- node -> seconds
    updated_at timestamptz not null default clock_timestamp(),
    primary key (shape, server)
) with (fillfactor = 50);

alter table agentflow.comfyui_servers enable row level security;
alter table agentflow.renders enable row level security;
alter table agentflow.render_times enable row level security;

-- A key may have no slots for now, and say how soon those who wait for one look again, should nobody wake them.
alter table agentflow.concurrency_keys drop constraint concurrency_keys_slots_check;
alter table agentflow.concurrency_keys add constraint concurrency_keys_slots_check check (slots between 0 and 1000);
alter table agentflow.concurrency_keys add column look_again_s real check (look_again_s > 0);

-- claim_keyed_1, but for the time until those who wait look again.
create function agentflow.claim_keyed_2(p_ids uuid[], p_worker uuid, p_lease interval) returns setof agentflow.jobs
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
        select k.key, k.look_again_s from agentflow.concurrency_keys k where k.key = any (keys)
        and k.slots <= (select count(*) from agentflow.jobs r where r.concurrency_key = k.key and r.state = 'running')
    )
    update agentflow.jobs j set sent_at = null, sends = 0,
        wait_reason = case when j.concurrency_key in (select key from busy) then 'busy' end,
        wake_at = clock_timestamp() + case when j.concurrency_key in (select key from busy) then coalesce(
            make_interval(secs => (select b.look_again_s from busy b where b.key = j.concurrency_key) * (0.8 + random() / 5)),
            interval '60 s' * (1 + random())
        ) else interval '0' end
    from locked where j.id = locked.id and j.state || '' = 'queued';
end $$;

-- A running job needs its key no more, and goes on without it: the next in line is rung. Null when the lease was lost.
create function agentflow.leave_key_1(p_id uuid, p_fence integer, p_worker uuid) returns uuid[]
language plpgsql
set enable_seqscan = off set enable_hashjoin = off set enable_mergejoin = off set jit = off
as $$
declare
    key text;
begin
    select j.concurrency_key into key from agentflow.jobs j where j.id = p_id;
    if key is null then
        return '{}';
    end if;
    perform agentflow.lock_keys_1(array[key]);
    update agentflow.jobs j set concurrency_key = null, slot = null
    where j.id = p_id and j.fence = p_fence and j.worker = p_worker and j.state || '' = 'running';
    if not found then
        return null;
    end if;
    return coalesce(agentflow.wake_line_1(array[key]), '{}');
end $$;

-- A running job that has no key is to wait in this line once it is parked; the caller parks it at once. Until then it counts as
-- one that holds a slot, under a number that no claim gives out. False when the lease was lost.
create function agentflow.enter_key_1(p_id uuid, p_fence integer, p_worker uuid, p_key text) returns boolean
language plpgsql
set enable_seqscan = off set enable_hashjoin = off set enable_mergejoin = off set jit = off
as $$
begin
    perform agentflow.lock_keys_1(array[p_key]);
    update agentflow.jobs j set concurrency_key = p_key, slot = (
        select least(0, min(r.slot)) - 1 from agentflow.jobs r where r.concurrency_key = p_key and r.state = 'running'
    )
    where j.id = p_id and j.fence = p_fence and j.worker = p_worker and j.state || '' = 'running' and j.concurrency_key is null;
    return found;
end $$;

-- The slots of a pool's line are those of its servers that are well. Returns whom to ring.
create function agentflow.count_gpus_1(p_pool text, p_look_again_s real) returns uuid[]
language plpgsql
set enable_seqscan = off set enable_hashjoin = off set enable_mergejoin = off set jit = off
as $$
declare
    line text := 'gpu:' || p_pool;
    number smallint;
begin
    perform agentflow.lock_keys_1(array[line]);       -- the next statement sees what the last one who counted has seen
    select coalesce(sum(s.slots), 0) into number from agentflow.comfyui_servers s
    where s.pool = p_pool and s.well and s.listed_at > clock_timestamp() - interval '5 min';
    insert into agentflow.concurrency_keys as k (key, slots, look_again_s) values (line, number, p_look_again_s)
    on conflict (key) do update set slots = excluded.slots, look_again_s = excluded.look_again_s
    where (k.slots, k.look_again_s) is distinct from (excluded.slots, excluded.look_again_s);
    return coalesce(agentflow.wake_line_1(array[line]), '{}');
end $$;
