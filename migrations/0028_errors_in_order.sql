-- Errors in the order in which they are shown, for words that very many of them share: reading all that have them took a second.
create index jobs_erred on agentflow.jobs (id) where error is not null;
create index jobs_erred_of on agentflow.jobs (organization_id, id) where error is not null;
