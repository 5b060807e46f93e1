-- The dashboard's gallery of an organization, the newest first. Job ids begin with their time.
create index renders_collected on agentflow.renders (organization_id, job_id) where state = 'collected';
