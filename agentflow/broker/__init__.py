"""The doorbell: brokers that carry job ids to workers, and nothing else.

A message is a hint that a job may be due. Losing, doubling or delaying one changes nothing: the claim in Postgres decides,
and the relay rings again (agentflow/jobs/dispatch.py).
"""

from __future__ import annotations

from agentflow.broker.message import DeliveredMessage, message_for, queue_name
from agentflow.broker.redis import BellBroker

__all__ = ["BellBroker", "DeliveredMessage", "message_for", "queue_name"]
