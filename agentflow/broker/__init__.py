"""The doorbell: brokers that carry job ids to workers, and nothing else.

A message is a hint that a job may be due. Losing, doubling or delaying one changes nothing: the claim in Postgres decides,
and the relay rings again (agentflow/jobs/dispatch.py).
"""

from __future__ import annotations

from agentflow.broker.doorbell import BrokerAway, Doorbell
from agentflow.broker.message import DeliveredMessage, PolledMessage, message_for, queue_name
from agentflow.broker.polling import PollingBroker
from agentflow.broker.rabbitmq import RabbitBroker
from agentflow.broker.redis import BellBroker

__all__ = [
    "BellBroker",
    "BrokerAway",
    "DeliveredMessage",
    "Doorbell",
    "PolledMessage",
    "PollingBroker",
    "RabbitBroker",
    "message_for",
    "queue_name",
]
