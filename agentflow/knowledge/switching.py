"""From one embedding model to another: the new one is filled beside the old, then takes its place, then the old one goes.

Searches use the old model until everything has a vector of the new one. Documents that come meanwhile get both. A switch that
was interrupted goes on with what is still missing.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Literal, cast, get_args

from agentflow import log, organizations
from agentflow.errors import Permanent, Transient
from agentflow.jobs.requests import NewJob
from agentflow.knowledge import embedding_models, vector_index, vectors
from agentflow.knowledge.embedding_models import EmbeddingModel, Provider
from agentflow.knowledge.vectors import NoVectors, Spending, spending_of
from agentflow.models.client import Caller

if TYPE_CHECKING:
    from agentflow.system import System, Transaction
    from agentflow.worker.running import JobContext

logger = log.get(__name__)

_FILL_END: Final = 0.95


class WrongModel(Permanent):
    """No such model can be named, or not now."""

    def __init__(self, message: str) -> None:
        super().__init__(message, code="wrong_embedding_model")


def parse(title: str) -> tuple[Provider, str]:
    """`openrouter/openai/text-embedding-3-small` as provider and name. Raises WrongModel."""
    provider, _, name = title.partition("/")
    if provider not in get_args(Provider) or not name:
        raise WrongModel(
            f"{title[:100]!r} is not PROVIDER/MODEL, where PROVIDER is {', '.join(get_args(Provider))}: such as"
            " openrouter/openai/text-embedding-3-small"
        )
    return cast(Provider, provider), name


@dataclass(frozen=True, slots=True)
class Estimate:
    """What a switch to a model has to do. `usd` is None where the provider names no price, as those do that cost nothing."""

    texts: int
    tokens: int
    usd: float | None


def estimate(system: System, caller: Caller, title: str) -> Estimate:
    """Asks the model for one vector, to see that it answers and what that costs. Raises WrongModel, and as `Embeddings`."""
    provider, name = parse(title)
    spending = spending_of(caller)
    system.embeddings.dimensions(spending, provider, name)
    with system.database.connection() as conn:
        texts, tokens = vectors.volume(conn)
    usd, asked = spending.measures.get("usd"), spending.measures.get("tokens_in")
    return Estimate(texts, tokens, round(usd / asked * tokens, 4) if usd and asked else None)


def switch(context: JobContext, title: str) -> dict[str, Any]:
    """Fill, switch, delete; of the active model fill what is missing.

    Returns `model`, `vectors` made, `refused`, and the cost that the provider named. Raises WrongModel where another switch
    is under way, NoVectors, and what `Embeddings` does.
    """
    system = context.system
    spending = spending_of(context)
    model = _begun(system, spending, title)
    made = refused = 0
    progress = _Progress(context, spending, *_lacking(system, model))
    while True:
        before = made + refused
        for organization_id in _organizations(system):
            for stored in vectors.fill(system, context, spending, organization_id, model):
                made += stored.made
                refused += stored.refused
                progress.tell(made + refused)
            vector_index.ensure(system, organization_id, model)
        if made + refused == before:
            break
    if model.state == "backfilling":
        with system.database.transaction() as conn:
            if not embedding_models.switch(conn, model.id):
                raise WrongModel(f"the switch to {model.title} was given up")
        logger.info("searches use another embedding model now", model=model.title)
    context.progress(_FILL_END, "deleting the old vectors")
    delete_old(context)
    cost = {name: value for name, value in spending.measures.items() if name in ("tokens_in", "usd")}
    return {"model": model.title, "vectors": made, "refused": refused, **cost}


def discard(transaction: Transaction) -> str | None:
    """Give up the switch that is under way; returns its model's title. A job deletes what was made."""
    filling = embedding_models.of_state(transaction.conn, "backfilling")
    active = embedding_models.of_state(transaction.conn, "active")
    if filling is None or active is None or not embedding_models.retire(transaction.conn, filling.id):
        return None
    transaction.submit(organizations.DEFAULT_ORGANIZATION, NewJob("backfill_embeddings", {"model": active.title}))
    return filling.title


def delete_old(context: JobContext) -> None:
    """What is left of models that are neither searched with nor filled."""
    system = context.system
    with system.database.connection() as conn:
        old = [model for model in embedding_models.every(conn) if model.state == "old"]
    for model in old:
        vector_index.drop_all(system, model.id)
        for organization_id in _organizations(system):
            deleted = 1
            while deleted:
                context.check()
                with system.database.connection() as conn:
                    deleted = vectors.delete_some(conn, organization_id, model.id)
        with system.database.connection() as conn:
            embedding_models.forget(conn, model.id)


def _begun(system: System, caller: Caller, title: str) -> EmbeddingModel:
    """The model, active already or being filled from here on."""
    provider, name = parse(title)
    with system.database.connection() as conn:
        if why := vectors.why_not(conn):
            raise NoVectors(why)
    dimensions = system.embeddings.dimensions(caller, provider, name)
    prefixes = system.embeddings.prefixes(provider)
    with system.database.transaction() as conn:
        known = [model for model in embedding_models.every(conn) if model.state != "old"]
        for model in known:
            if (model.title, model.dimensions, model.passage_prefix, model.query_prefix) == (
                title,
                dimensions,
                *prefixes,
            ):
                return model
        state: Literal["active", "backfilling"] = "backfilling" if known else "active"
        added = embedding_models.add(conn, provider, name, dimensions, *prefixes, state=state)
    if added is None:
        raise Transient(f"what was made of {title} before is still being deleted", code="model_being_deleted")
    if added.title != title:
        raise WrongModel(f"a switch to {added.title} is under way: let it end, or discard it")
    return added


def _organizations(system: System) -> Iterator[int]:
    after = 0
    while True:
        with system.database.connection() as conn:
            page = organizations.every(conn, after=after, limit=100)
        if not page:
            return
        yield from (organization.id for organization in page)
        after = page[-1].id


def _lacking(system: System, model: EmbeddingModel) -> tuple[int, int]:
    """How many vectors there are to be, and how many are missing."""
    whole = lacking = 0
    for organization_id in _organizations(system):
        with system.database.connection() as conn:
            texts, missing = vectors.count(conn, organization_id, model)
        whole += texts
        lacking += missing
    return whole, lacking


class _Progress:
    """How far it is, how long it will take, and what it will have cost."""

    def __init__(self, context: JobContext, spending: Spending, whole: int, lacking: int) -> None:
        self._context = context
        self._spending = spending
        self._whole = whole
        self._lacking = lacking
        self._began = time.monotonic()

    def tell(self, done: int) -> None:
        left = max(0, self._lacking - done)
        there = self._whole - left
        left_s = (time.monotonic() - self._began) / done * left
        said = f"{there} of {self._whole} vectors, about {_duration(left_s)} left"
        if usd := self._spending.measures.get("usd"):
            said += f", ${usd:.4f} of about ${usd / done * max(done, self._lacking):.4f}"
        self._context.progress(_FILL_END * there / max(1, self._whole), said)


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
