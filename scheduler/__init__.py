"""The calendar: what happens at certain times, whatever the jobs do. `python -m scheduler` runs it.

Retries, rescue and ringing do not need it; they are done by every worker.
"""
