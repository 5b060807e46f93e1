-- Webhooks in: where they may arrive, what opens an endpoint, and every delivery as it came.

create table agentflow.webhook_endpoints (
    id uuid primary key,
    organization_id bigint not null references agentflow.organizations,
    source text not null check (source <> ''),
    name text not null check (name <> ''),
    config jsonb not null default '{}',               -- what becomes of its events: agentflow/webhooks/config.py
    silence_after_s double precision check (silence_after_s > 0),   -- without an event for so long it is silent
    watched_since timestamptz not null default clock_timestamp(),   -- made, enabled, or asked to be watched: then
    silent_since timestamptz,                         -- noticed and told, once per silence
    created_at timestamptz not null default clock_timestamp(),
    disabled_at timestamptz
);
create index webhook_endpoints_list on agentflow.webhook_endpoints (organization_id, id);

-- The token in an endpoint's URL, of which only the SHA-256 is kept, and the secret that its sender signs with, sealed. Two of a
-- kind may be live at once, so that a sender can change over.
create table agentflow.webhook_credentials (
    id uuid primary key,
    organization_id bigint not null,
    endpoint_id uuid not null references agentflow.webhook_endpoints,
    kind text not null check (kind in ('token', 'secret')),
    hash bytea unique check (octet_length(hash) = 32),
    sealed text,
    created_at timestamptz not null default clock_timestamp(),
    expires_at timestamptz,
    constraint one_form check ((kind = 'token') = (hash is not null) and (kind = 'secret') = (sealed is not null))
);
create index webhook_credentials_list on agentflow.webhook_credentials (endpoint_id, created_at);

-- No foreign key to the endpoint: its share lock would make that row a hot spot.
create table agentflow.webhook_events (
    id uuid primary key,                              -- UUIDv7, made when it was received
    organization_id bigint not null,
    endpoint_id uuid not null,
    received_at timestamptz not null default clock_timestamp(),
    verdict text not null check (verdict in ('verified', 'by_token', 'conflict', 'refused')),
    reason text,                                      -- why it was refused
    delivery_id text,                                 -- as the sender names it
    delivery_key bytea check (octet_length(delivery_key) = 32),   -- what must not come twice: of the id, else of the body
    body_hash bytea not null check (octet_length(body_hash) = 32),
    type text,
    entity text,                                      -- what it is about; events of one are handled in order
    version timestamptz,                              -- when that changed, as the sender says
    headers jsonb not null,                           -- secrets redacted
    body bytea not null,                              -- as it came; of a refused one the beginning
    size_bytes integer not null,
    duplicates integer not null default 0,
    replays integer not null default 0,
    job_id uuid,                                      -- its handle_webhook job
    outcome text check (outcome in ('done', 'stale', 'ignored', 'failed')),
    detail text,                                      -- why it was ignored, or failed
    action_job_id uuid,                               -- the job that was made of it
    handled_by uuid,                                  -- the handle_webhook job, a replay's perhaps, that handled it last
    handled_at timestamptz,
    constraint handled check ((outcome is null) = (handled_at is null))
);
create unique index webhook_events_once on agentflow.webhook_events (endpoint_id, delivery_key);
create index webhook_events_list on agentflow.webhook_events (organization_id, id);
create index webhook_events_of_endpoint on agentflow.webhook_events (endpoint_id, id);
create index webhook_events_refused on agentflow.webhook_events (endpoint_id, received_at) where verdict = 'refused';

-- The newest state of each entity that was acted upon, so that an older one that comes late is discarded.
create table agentflow.webhook_entities (
    organization_id bigint not null,
    endpoint_id uuid not null,
    entity text not null,
    version timestamptz not null,
    seen_at timestamptz not null default clock_timestamp(),
    primary key (endpoint_id, entity)
);
create index webhook_entities_age on agentflow.webhook_entities (seen_at);

alter table agentflow.webhook_endpoints enable row level security;
alter table agentflow.webhook_credentials enable row level security;
alter table agentflow.webhook_events enable row level security;
alter table agentflow.webhook_entities enable row level security;
