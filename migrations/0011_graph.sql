-- The graph of who and what an organization's documents speak of. A name is an entity of its own and stays one; that several
-- mean the same is said by their common root, so that it can be taken back.

create table agentflow.graph_entities (
    organization_id bigint not null references agentflow.organizations,
    id uuid primary key,                              -- of organization, type and key: the same whenever it is found again
    type text not null,
    key text not null check (key <> ''),              -- the name without case, ё, quotes and dots
    name text not null,                               -- as most mentions have it
    mentions integer not null default 0,
    root_id uuid not null,                            -- of all that mean the same the first by id; itself where it is alone
    near bigint[] not null,                           -- entities with one of these in common are worth comparing
    embedding bytea,                                  -- of the name: half-precision floats of length 1
    embedder text,                                    -- which model that is of
    unique (organization_id, type, key)
);
create index graph_entities_root on agentflow.graph_entities (organization_id, root_id);
create index graph_entities_near on agentflow.graph_entities using gin (near) with (fastupdate = off);   -- read at once after writing
create index graph_entities_words on agentflow.graph_entities using gin (to_tsvector('simple', key));

create table agentflow.graph_mentions (
    organization_id bigint not null,
    document_id uuid not null references agentflow.documents on delete cascade,
    chunk_key bytea not null,                         -- whose text the offsets refer to, wherever in the document it stands by now
    entity_id uuid not null references agentflow.graph_entities on delete cascade,
    start_offset integer not null,                    -- of characters in the chunk's text: [start, end)
    end_offset integer not null check (end_offset > start_offset),
    name text not null,                               -- as it is called there
    primary key (document_id, chunk_key, entity_id, start_offset, end_offset)
);
-- Not by organization, as cascades are not; nor the indexes of edges and evidence below.
create index graph_mentions_entity on agentflow.graph_mentions (entity_id);

create table agentflow.graph_edges (
    organization_id bigint not null,
    id uuid primary key,                              -- of the entities and the predicate
    from_id uuid not null references agentflow.graph_entities on delete cascade,
    predicate text not null,
    to_id uuid not null references agentflow.graph_entities on delete cascade
);
create index graph_edges_from on agentflow.graph_edges (from_id);
create index graph_edges_to on agentflow.graph_edges (to_id);

create table agentflow.graph_evidence (
    organization_id bigint not null,
    document_id uuid not null references agentflow.documents on delete cascade,
    chunk_key bytea not null,
    edge_id uuid not null references agentflow.graph_edges on delete cascade,
    start_offset integer not null,
    end_offset integer not null check (end_offset > start_offset),
    valid_from text check (valid_from ~ '^\d{4}(-\d{2}(-\d{2})?)?$'),   -- as exactly as the text says it
    valid_to text check (valid_to ~ '^\d{4}(-\d{2}(-\d{2})?)?$'),
    valid_start_offset integer,                       -- where the text says so
    valid_end_offset integer check (valid_end_offset > valid_start_offset),
    primary key (document_id, chunk_key, edge_id, start_offset, end_offset),
    check ((valid_from is null and valid_to is null) = (valid_start_offset is null)),
    check ((valid_start_offset is null) = (valid_end_offset is null))
);
create index graph_evidence_edge on agentflow.graph_evidence (edge_id);

-- What was decided of two entities. Without references: what a person has decided outlives the documents.
create table agentflow.graph_matches (
    organization_id bigint not null,
    id uuid primary key,                              -- of the two entities
    one_id uuid not null,
    other_id uuid not null check (other_id > one_id),
    same boolean not null,
    weak boolean not null default false,              -- one name may be short for the other, as long as nobody else's is
    decided_by text not null check (decided_by in ('names', 'model', 'person')),
    decided_at timestamptz not null default clock_timestamp()
);
create index graph_matches_one on agentflow.graph_matches (organization_id, one_id);
create index graph_matches_other on agentflow.graph_matches (organization_id, other_id);
create index graph_matches_list on agentflow.graph_matches (organization_id, id) where same or decided_by = 'person';

-- What an organization wants to be found; without a row the defaults.
create table agentflow.graph_types (
    organization_id bigint primary key references agentflow.organizations,
    types jsonb not null,
    updated_at timestamptz not null default clock_timestamp()
);

-- Whoever writes to an organization's graph waits for whoever does.
create function agentflow.graph_lock_1(organization bigint) returns void language sql as $$
    select pg_advisory_xact_lock(hashtextextended('agentflow.graph', organization))
$$;

-- How often entities are mentioned, and by which name most of all.
create function agentflow.graph_recount_1(organization bigint, ids uuid[]) returns void language sql as $$
    update agentflow.graph_entities e set name = m.name, mentions = m.mentions
    from (select entity_id, count(*) as mentions, mode() within group (order by name collate "C") as name
        from agentflow.graph_mentions where organization_id = organization and entity_id = any(ids) group by entity_id) m
    where e.organization_id = organization and e.id = m.entity_id and (e.name, e.mentions) <> (m.name, m.mentions)
$$;

-- An edge needs evidence and an entity a mention: what loses its last goes, also where a document is deleted beside the program.
create function agentflow.graph_evidence_gone_1() returns trigger language plpgsql as $$
begin
    perform agentflow.graph_lock_1(o.id) from (select distinct organization_id as id from gone order by 1) o;
    delete from agentflow.graph_edges e using (select distinct organization_id, edge_id from gone) g
    where e.id = g.edge_id and e.organization_id = g.organization_id
        and not exists (select from agentflow.graph_evidence v
            where v.edge_id = e.id and v.organization_id = e.organization_id);
    return null;
end $$;
create trigger graph_evidence_gone after delete on agentflow.graph_evidence referencing old table as gone
    for each statement execute function agentflow.graph_evidence_gone_1();

create function agentflow.graph_mentions_gone_1() returns trigger language plpgsql as $$
begin
    perform agentflow.graph_lock_1(o.id) from (select distinct organization_id as id from gone order by 1) o;
    delete from agentflow.graph_entities e using (select distinct organization_id, entity_id from gone) g
    where e.id = g.entity_id and e.organization_id = g.organization_id
        and not exists (select from agentflow.graph_mentions m
            where m.entity_id = e.id and m.organization_id = e.organization_id);
    perform agentflow.graph_recount_1(g.organization_id, g.ids)
    from (select organization_id, array_agg(distinct entity_id) as ids from gone group by 1) g;
    return null;
end $$;
create trigger graph_mentions_gone after delete on agentflow.graph_mentions referencing old table as gone
    for each statement execute function agentflow.graph_mentions_gone_1();

-- Of the names that stay the first is the root, and what was decided of the gone one by rules or models can be decided again.
create function agentflow.graph_entities_gone_1() returns trigger language plpgsql as $$
begin
    update agentflow.graph_entities e set root_id = (select m.id from agentflow.graph_entities m
        where m.organization_id = e.organization_id and m.root_id = e.root_id order by m.id limit 1)
    from gone g where e.organization_id = g.organization_id and e.root_id = g.id;
    delete from agentflow.graph_matches m using gone g
    where m.organization_id = g.organization_id and m.one_id = g.id and m.decided_by <> 'person';
    delete from agentflow.graph_matches m using gone g
    where m.organization_id = g.organization_id and m.other_id = g.id and m.decided_by <> 'person';
    return null;
end $$;
create trigger graph_entities_gone after delete on agentflow.graph_entities referencing old table as gone
    for each statement execute function agentflow.graph_entities_gone_1();

alter table agentflow.graph_entities enable row level security;
alter table agentflow.graph_mentions enable row level security;
alter table agentflow.graph_edges enable row level security;
alter table agentflow.graph_evidence enable row level security;
alter table agentflow.graph_matches enable row level security;
alter table agentflow.graph_types enable row level security;
