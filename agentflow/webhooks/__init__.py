"""Webhooks in: what others tell us, verified, kept as it came, and handed to a job.

sources/      how each kind of sender signs, and what it calls its deliveries: a small module for each
endpoints     where they may arrive: a token in the URL, a secret, and what becomes of the events (config)
intake        a delivery becomes an event and its job, in one transaction
events        the deliveries as rows; replays; order: the older state of an entity is discarded
content       bodies as values, forms with PHP's brackets too; places and mapping read them
silence       endpoints that have gone quiet
touched       what a CRM said has changed
"""
