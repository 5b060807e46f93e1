"""The calendar's tables: schedules that organizations make, and the ticks of everything that is due at a time.

agentflow.schedules.when      when a schedule ticks: cron lines, intervals, single moments
agentflow.schedules.records   schedules that organizations make
agentflow.schedules.ticks     each time that something was due, claimed once
agentflow.schedules.firing    a tick and its job, in one transaction
"""
