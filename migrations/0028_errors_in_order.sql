-- Words that very many errors share are found in the order in which they are shown; reading all that have them took a second.
create index jobs_erred on agentflow.jobs (id) where error is not null;
