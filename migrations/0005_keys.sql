-- Keys of two kinds: those by which an organization's programs come in, and those that keep jobs single.

create table agentflow.api_keys (
    id uuid primary key,
    organization_id bigint not null references agentflow.organizations,
    name text not null check (name <> ''),
    prefix text not null unique,                      -- the first part of the key: finds the row, and tells keys apart for people
    hash bytea not null check (octet_length(hash) = 32),   -- SHA-256: nothing slower is needed for 256 random bits
    scopes text[] not null check (cardinality(scopes) > 0 and scopes <@ array['submit', 'read', 'manage', 'webhooks']),
    created_at timestamptz not null default clock_timestamp(),
    expires_at timestamptz,
    revoked_at timestamptz,
    last_used_at timestamptz,                         -- to the minute or so: not a write for each request
    successor_id uuid references agentflow.api_keys   -- of a rotated key
);
create index api_keys_list on agentflow.api_keys (organization_id, id);

-- Which job holds a unique key. Of their own, like idempotency keys: a submit locks this row, so that of many at once one wins
-- and the others see what it did.
create table agentflow.unique_keys (
    organization_id bigint not null,
    type text not null,
    key text not null,
    job_id uuid,                                      -- null only inside the transaction that makes the row
    accepted_at timestamptz not null default clock_timestamp(),
    primary key (organization_id, type, key)
);

-- A batch whose jobs were all there already (unique keys) has none of its own, and has ended.
alter table agentflow.batches drop constraint batches_total_check, add constraint batches_total_check check (total >= 0);

alter table agentflow.api_keys enable row level security;
alter table agentflow.unique_keys enable row level security;
