"""`agentflow knowledge …`: search, and the model that makes the vectors."""

from __future__ import annotations

import json
from dataclasses import asdict

import click

import actors  # noqa: F401 - fills the registry
from agentflow import organizations
from agentflow.cli import output
from agentflow.cli.direct import connected
from agentflow.cli.errors import USAGE, Failure
from agentflow.errors import JobError
from agentflow.jobs.requests import NewJob
from agentflow.knowledge import embedding_models, search, switching, vectors
from agentflow.knowledge.embedding import Unpaid
from agentflow.organizations import DEFAULT_ORGANIZATION


def search_for(question: str, org: str, limit: int, as_json: bool) -> None:
    with connected() as system:
        with system.database.connection() as conn:
            organization = organizations.find(conn, org)
        if organization is None:
            raise Failure(f"there is no organization {org!r}; `agentflow orgs list` shows them", USAGE)
        found = search.search(system, organization.id, question, limit=limit)
    if found.problem and not as_json:
        print(f"by words alone: {found.problem}")
    for hit in found.hits:
        if as_json:
            print(json.dumps(asdict(hit), default=str, ensure_ascii=False))
        else:
            place = ", ".join(f"{name} {value}" for name, value in hit.place.items() if value)
            print(f"{hit.score:.4f}  {hit.title}{f' ({place})' if place else ''}\n        {hit.text[:300]}")
    if not found.hits and not as_json:
        print("nothing was found")


def show_models(as_json: bool) -> None:
    with connected() as system, system.database.connection() as conn:
        if why := vectors.why_not(conn):
            raise Failure(str(vectors.NoVectors(why)))
        found = [(model, *vectors.extent(conn, model)) for model in embedding_models.every(conn)]
        try:
            wanted = "/".join(system.embeddings.configured())
        except JobError as error:
            raise Failure(str(error), USAGE) from None
    if as_json:
        for model, made, missing in found:
            said = {"model": model.title, "state": model.state, "dimensions": model.dimensions}
            print(json.dumps({**said, "vectors": made, "missing": missing}))
    elif found:
        rows = [(m.title, m.state, str(m.dimensions), str(made), str(missing)) for m, made, missing in found]
        output.console().print(output.table(("model", "state", "dimensions", "vectors", "missing"), rows))
    else:
        print(f"no vectors yet: the first document makes them with {wanted}")
    if found and wanted not in [model.title for model, _, _ in found] and not as_json:
        print(f"the settings name {wanted}: `agentflow knowledge switch {wanted}` takes it into use")


def switch(title: str, *, sure: bool) -> None:
    with connected() as system:
        try:
            estimate = switching.estimate(system, Unpaid(), title)
        except JobError as error:
            raise Failure(str(error), USAGE if isinstance(error, switching.WrongModel) else 1) from None
        cost = f"about ${estimate.usd:.4f}" if estimate.usd is not None else "no price was named"
        print(f"{estimate.texts} texts with about {estimate.tokens} tokens; {cost}")
        if not sure:
            click.confirm("Switch?", abort=True)
        submitted = system.submit(DEFAULT_ORGANIZATION, NewJob("backfill_embeddings", {"model": title}))
    print(f"job {submitted.job.id}: `agentflow jobs show {submitted.job.id}` says how far it is")


def discard() -> None:
    with connected() as system, system.transaction() as transaction:
        dropped = switching.discard(transaction)
    if dropped is None:
        raise Failure("no switch is under way")
    print(f"{dropped} is given up; what was made with it is deleted")
