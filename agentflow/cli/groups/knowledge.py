"""`knowledge`: searching, and the embedding model."""

from __future__ import annotations

import click

from agentflow.cli.groups import options


@click.group(cls=options.Group)
def knowledge() -> None:
    """The knowledge base: search in it, and the model that makes its vectors."""


@knowledge.command("search")
@click.argument("question")
@click.option("--org", metavar="SLUG", default="1", help="In this organization's documents.  [default: number 1]")
@click.option("--limit", type=click.IntRange(1, 50), default=10, show_default=True)
@options.AS_LINES
def search_knowledge(question: str, org: str, limit: int, as_json: bool) -> None:
    """Search by meaning and by words."""
    from agentflow.cli import knowledge_commands

    knowledge_commands.search_for(question, org, limit, as_json)


@knowledge.command("models")
@options.AS_LINES
def list_models(as_json: bool) -> None:
    """The embedding models, and how far each is filled."""
    from agentflow.cli import knowledge_commands

    knowledge_commands.show_models(as_json)


@knowledge.command("switch")
@click.argument("model", metavar="PROVIDER/MODEL")
@click.option("-y", "--yes", is_flag=True, help="Do not ask.")
def switch_model(model: str, yes: bool) -> None:
    """Use another embedding model, such as: agentflow knowledge switch openrouter/openai/text-embedding-3-small

    Says what it will cost, then a job makes all vectors anew; searches go on with the old ones until it is done. Interrupted,
    it goes on where it was. The active model named again: what is missing is made.
    """
    from agentflow.cli import knowledge_commands

    knowledge_commands.switch(model, sure=yes)


@knowledge.command("discard")
def discard_model() -> None:
    """Give up a switch that is under way."""
    from agentflow.cli import knowledge_commands

    knowledge_commands.discard()
