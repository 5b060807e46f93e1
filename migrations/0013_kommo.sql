-- Accounts of a CRM (Kommo), a mirror of what is in them, the log of its runs, and what was written back.

create table agentflow.crm_accounts (
    id uuid primary key,
    organization_id bigint not null references agentflow.organizations,
    name text not null check (name <> ''),
    base_url text not null,                           -- https://example.kommo.com; changes when the account is renamed
    remote_id bigint,                                 -- the account's number at the CRM, known once it answered
    auth text not null check (auth in ('token', 'oauth')),
    state text not null default 'connecting'
        check (state in ('connecting', 'connected', 'needs_reauth', 'blocked', 'removed')),
    state_reason text,
    access_sealed text,                               -- the token to call with, as agentflow/secrets.py writes it
    access_expires_at timestamptz,
    access_renew_at timestamptz,                      -- well before: a refused renewal leaves time to ask a person
    grant_type text check (grant_type in ('authorization_code', 'refresh_token')),
    grant_sealed text,                                -- what buys the next token, once: a code, then refresh tokens
    grant_begun_at timestamptz,                       -- it was sent, and no answer is known
    grant_held_until timestamptz,                     -- by the one process that is asking now
    grant_refused_at timestamptz,                     -- it buys nothing any more: the token at hand is the last one
    client_id text,                                   -- of the account's own integration; null: the installation's
    client_sealed text,
    redirect_uri text,
    sync_every_s integer not null default 300 check (sync_every_s between 60 and 86400),
    reconcile_every_s integer not null default 604800 check (reconcile_every_s between 3600 and 31536000),
    delete_share double precision not null default 0.1 check (delete_share between 0 and 1),
    next_sync_at timestamptz not null default clock_timestamp(),
    next_reconcile_at timestamptz not null default clock_timestamp() + interval '7 days',
    sweep_started_at timestamptz,                     -- a walk over everything is under way
    sweep_until bigint,                               -- … over what was changed up to this Unix second
    deletions_held integer,                           -- so many more than delete_share allows: somebody is to confirm
    deletions_confirmed integer,                      -- so many may be deleted
    version bigint not null default 0,                -- of the mirror: one for each transaction that changes it
    created_at timestamptz not null default clock_timestamp(),
    check ((state = 'removed') or (access_sealed is not null) or (grant_sealed is not null))
);
create index crm_accounts_list on agentflow.crm_accounts (organization_id, id);
create index crm_accounts_due on agentflow.crm_accounts (next_sync_at) where state in ('connecting', 'connected');

-- How far each kind of thing was read: everything that was changed before `position` is in the mirror.
create table agentflow.crm_streams (
    account_id uuid not null references agentflow.crm_accounts,
    organization_id bigint not null,
    entity_type text not null,
    position bigint not null,                         -- Unix seconds
    sweep_position bigint,                            -- the same of the walk over everything; null: it has ended
    read_at timestamptz,                              -- of what is read as a whole: when
    primary key (account_id, entity_type)
);

-- One row for each thing, gone ones included. `data` is what the CRM said, unknown fields and all.
create table agentflow.crm_entities (
    account_id uuid not null references agentflow.crm_accounts,
    organization_id bigint not null,
    entity_type text not null,
    entity_id bigint not null,
    updated_at bigint not null,                       -- Unix seconds by the CRM's clock; 0 where it names none
    read_at timestamptz not null,                     -- when the read began that this is from, by this database's clock
    seen_at timestamptz not null,                     -- the same of the last walk over everything that met it
    hash bytea not null,                              -- of `data`: what has not changed is not written
    version bigint not null,                          -- of the mirror, when this was written: what readers page by
    deleted_at timestamptz,                           -- a tombstone
    data jsonb not null,
    primary key (account_id, entity_type, entity_id)
);
create index crm_entities_changes on agentflow.crm_entities (account_id, entity_type, version, entity_id);

-- The CRM's own log. Its ids are texts, and its rows never change.
create table agentflow.crm_events (
    account_id uuid not null references agentflow.crm_accounts,
    organization_id bigint not null,
    event_id text not null,
    created_at bigint not null,
    version bigint not null,
    data jsonb not null,
    primary key (account_id, event_id)
);
create index crm_events_changes on agentflow.crm_events (account_id, version, event_id);

-- What is to be read again by its id, since a webhook or an event named it.
create table agentflow.crm_touched (
    organization_id bigint not null,
    account_id uuid not null,
    entity_type text not null check (entity_type <> ''),
    entity_id bigint not null,
    touched_at timestamptz not null default clock_timestamp(),
    primary key (account_id, entity_type, entity_id)
);

-- Fields that nobody expected, or of another kind than expected: said once.
create table agentflow.crm_drift (
    account_id uuid not null references agentflow.crm_accounts,
    organization_id bigint not null,
    entity_type text not null,
    field text not null,
    kind text not null,                               -- what kind of value stood there
    first_seen_at timestamptz not null default clock_timestamp(),
    primary key (account_id, entity_type, field, kind)
);

create table agentflow.sync_runs (
    id uuid primary key,
    organization_id bigint not null,
    account_id uuid not null references agentflow.crm_accounts,
    job_id uuid not null unique,
    mode text not null check (mode in ('incremental', 'backfill', 'reconcile', 'touched')),
    plan boolean not null,
    state text not null default 'running' check (state in ('running', 'succeeded', 'held', 'failed')),
    calls integer not null default 0,
    counts jsonb not null default '{}',               -- by kind of thing: created, updated, unchanged, deleted
    error text,
    started_at timestamptz not null default clock_timestamp(),
    finished_at timestamptz
);
create index sync_runs_list on agentflow.sync_runs (account_id, id);

-- What was to be written to the CRM, one row for each thing, made before the request is sent: an answer may get lost.
create table agentflow.crm_writes (
    job_id uuid not null,
    item integer not null,
    organization_id bigint not null,
    account_id uuid not null references agentflow.crm_accounts,
    entity_type text not null,
    state text not null default 'sent' check (state in ('sent', 'done', 'refused')),
    sent_at timestamptz not null default clock_timestamp(),
    sent_s bigint not null,                           -- the same by the CRM's clock, in Unix seconds
    entity_id bigint,
    errors jsonb,
    primary key (job_id, item)
);
-- One thing at the CRM answers for one write.
create unique index crm_writes_made on agentflow.crm_writes (account_id, entity_type, entity_id)
    where entity_id is not null;

alter table agentflow.crm_accounts enable row level security;
alter table agentflow.crm_streams enable row level security;
alter table agentflow.crm_entities enable row level security;
alter table agentflow.crm_events enable row level security;
alter table agentflow.crm_touched enable row level security;
alter table agentflow.crm_drift enable row level security;
alter table agentflow.sync_runs enable row level security;
alter table agentflow.crm_writes enable row level security;
