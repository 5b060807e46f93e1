"""Flight records: everything that led to a job, a webhook, a file or an edge of the graph, and everything that came of it.

agentflow.flights.records     from what one may ask, and whose it must be
agentflow.flights.gathering   what touches it: the jobs of the same trace, retries and replays, the webhook behind them …
agentflow.flights.telling     what was gathered, as a tree of causes
agentflow.jobs.flights        the legs: jobs and webhooks, also those that retention has deleted
"""
