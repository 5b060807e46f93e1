"""What a worker's runtime, the publisher and health ask of a broker, whichever it is."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final

from dramatiq.broker import Broker, Consumer, MessageProxy

from agentflow.broker.message import DeliveredMessage, queue_name
from agentflow.jobs.model import QUEUES, Ring

_UNKNOWN_TYPE_S: Final = 30.0


class BrokerAway(ConnectionError):
    """The broker is known to be away, or refuses messages for now: nothing was sent, and `on_ready` is called when it is back."""


class Doorbell(Broker):
    """A Dramatiq broker that carries rings.

    A worker's runtime sets the callables. `allowance()` is how many messages may be held unclaimed now, of which `reserved()`
    are for critical jobs only; `known(name)` whether a job type is known here; `on_handing_over(message)` hears of each on its
    way to the threads; `give_back(messages, delay_s)` takes those that nobody here can claim. `on_connected(fingerprint)` and
    `on_emptied()` may ask the database; the others return at once.
    """

    connected = False
    last_error: str | None = None
    reconnects = 0

    def __init__(self, *, prefix: str, **others: Any) -> None:
        super().__init__(**others)
        self.prefix = prefix
        self.saturated = False
        self.consumers: list[Any] = []  # DoorbellConsumers, of the kind that the broker makes
        self.allowance: Callable[[], int] = lambda: 1
        self.reserved: Callable[[], int] = lambda: 0
        self.known: Callable[[str], bool] = lambda _: True
        self.on_handing_over: Callable[[DeliveredMessage], None] = lambda _message: None
        self.give_back: Callable[[Sequence[DeliveredMessage], float], None] = lambda _messages, _delay_s: None
        self.on_cancel: Callable[[], None] = lambda: None
        self.on_connected: Callable[[str], None] = lambda _fingerprint: None
        self.on_emptied: Callable[[], None] = lambda: None
        self.on_ready: Callable[[], None] = lambda: None
        #: Jobs became due that nobody rings for: a worker in this process looks for them at once.
        self.on_unrung: Callable[[], None] = lambda: None

    def declare_queues(self) -> None:
        for queue in QUEUES:
            self.declare_queue(queue_name(self.prefix, queue))

    def declare_queue(self, queue_name: str) -> None:
        """As upstream, without a delay queue: nothing is ever delayed in the broker."""
        if queue_name not in self.queues:
            self.emit_before("declare_queue", queue_name)
            self.queues.add(queue_name)
            self.emit_after("declare_queue", queue_name)

    @property
    def fingerprint(self) -> str:
        """Names the server and the queues on it, without secrets: where it differs, messages sent before are elsewhere."""
        raise NotImplementedError

    def ring(self, rings: Sequence[Ring]) -> None:
        """Publish a message for each. Raises an error of the client or an OSError: what was sent then is unknown."""
        raise NotImplementedError

    def take(self, rings: Sequence[Ring]) -> Sequence[Ring]:
        """Have this worker's own threads run what there is room for, as if the broker had brought it. Returns the rest."""
        return rings

    def tell_cancel(self) -> None:
        """Wake the workers' heartbeats: one of their jobs is to be cancelled. Raises as `ring`."""
        raise NotImplementedError

    def can_publish(self) -> bool:
        """False while the broker is known to take nothing: who submits does not stamp, and the relay rings for nobody."""
        return True

    def can_hear(self) -> bool:
        """False while the broker is known to bring nothing: this worker looks for due jobs itself."""
        return True

    def add_consumer(self, consumer: DoorbellConsumer) -> None:
        """It consumes from now on, instead of the one that did of its queue."""
        self.consumers = [c for c in self.consumers if c.queue_name != consumer.queue_name] + [consumer]

    def room(self, critical: bool) -> int:
        """How many more messages may be handed to Dramatiq's threads now."""
        free = self.allowance() - sum(len(consumer.held) for consumer in self.consumers)
        return free if critical else free - self.reserved()

    def room_or_nudge(self, critical: bool) -> int:
        """As `room`; who finds none is nudged when there may be some."""
        if (room := self.room(critical)) > 0:
            return room
        self.saturated = True
        return self.room(critical)  # again, for one who made some before that was known

    def nudge(self) -> None:
        """Room was made: consumers that held back look again."""
        if self.saturated:
            self.saturated = False
            for consumer in self.consumers:
                consumer.bell.set()

    def give_back_own(self, messages: Iterable[Any]) -> None:
        """Of these, what no broker has and no thread took: other workers may find it at once."""
        if own := [m for m in messages if isinstance(m, DeliveredMessage) and not (m.at_broker or m.acknowledged)]:
            self.give_back(own, 0.0)

    def stop_consuming(self) -> None:
        """The process is draining: what nobody has claimed goes to other workers, and no more comes."""

    def check(self, timeout_s: float) -> None:
        """One round trip. Raises an error of the client or an OSError."""
        raise NotImplementedError


class DoorbellConsumer(Consumer):
    """Of one queue. Each message that it hands over is held until somebody has said what became of it, and given back when that
    takes more than a second."""

    UNCLAIMED_S: Final = 1.0

    def __init__(self, broker: Doorbell, queue_name: str, bell: threading.Event) -> None:
        self.broker = broker
        self.queue_name = queue_name
        self.bell = bell
        self.held: dict[int, Any] = {}  # DeliveredMessages, by id()
        self._lock = threading.Lock()

    def ack(self, message: MessageProxy) -> None:
        """Dramatiq's word that a thread has returned, also from a message that it set aside, or could not claim: it says nothing
        here. What counts is `DeliveredMessage.acknowledge`. Nothing is dead-lettered in the broker: the row says what became of
        the job."""

    nack = ack

    def requeue(self, messages: Iterable[MessageProxy]) -> None:
        """At shutdown: the messages that no thread took."""
        self.broker.give_back_own(messages)

    def _is_known(self, message: DeliveredMessage) -> bool:
        """Whether its type is. If not, another worker may know it: this one is of an older version, in the middle of a deploy."""
        if self.broker.known(message.actor_name):
            return True
        message.given_back = True
        self.broker.give_back([message], _UNKNOWN_TYPE_S)
        return False

    def _give_back_unclaimed(self) -> None:
        too_old = time.monotonic() - self.UNCLAIMED_S
        late = [m for m in list(self.held.values()) if m.delivered_at < too_old and not m.given_back]
        for message in late:
            message.given_back = True
        if late:
            self.broker.give_back(late, 1.0)

    def _let_go(self, message: DeliveredMessage) -> bool:
        """Whether it was ours to answer for until now."""
        with self._lock:
            if message.acknowledged:
                return False
            message.acknowledged = True
        self.held.pop(id(message), None)
        return True
