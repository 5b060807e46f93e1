"""The graph of one document: who and what it speaks of, by a model, as far as its text bears it out.

Answers are kept by what was asked, and the document's facts are written in one transaction in place of those that it had: a
second run, or one after a kill, pays nothing again and ends in the same graph.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final
from uuid import UUID

from pydantic import Field

from actors.extract_graph import reading
from actors.extract_graph.grounding import Grounding
from actors.extract_graph.reading import Found
from actors.extract_graph.resolution import resolve
from agentflow.errors import Permanent, Transient
from agentflow.jobs.registry import Payload, job
from agentflow.knowledge import graph, graph_types
from agentflow.knowledge.graph import Chunk, Source
from agentflow.models.asking import Answer, Asking
from agentflow.worker.running import JobContext

#: Where reading ends and comparing names begins.
_READ_END: Final = 0.8
_FAILURES_NAMED: Final = 20


class ExtractGraph(Payload):
    document_id: UUID
    second_pass: bool = Field(False, description="Ask once more for what was missed: more facts, twice the cost")


#: Chunks, and what was found in them before.
Question = tuple[list[Chunk], Found | None]


@job("extract_graph", payload=ExtractGraph, time_limit_s=3600.0)
def extract_graph(context: JobContext, payload: ExtractGraph) -> dict[str, Any]:
    """Find the entities and relations that a document speaks of, each with the words that say so."""
    asking = Asking(context, context.system.models)
    asking.models.endpoint("chat")  # better now than with the first question
    organization = context.job.organization_id
    with context.system.database.connection() as conn:
        source = graph.read_source(conn, organization, payload.document_id)
        types = graph_types.read(conn, organization)
    if source is None:
        raise Permanent(f"There is no document {payload.document_id}.", code="no_such_document")
    grounding = Grounding(types)
    failed = _read(asking, source, grounding, second_pass=payload.second_pass)
    asking.try_again_if_it_may_help()
    unread = {chunk.key for chunks, _ in failed for chunk in chunks}
    with context.system.database.transaction() as conn:
        written = graph.store(conn, source, grounding.mentions, grounding.relations, unread=unread)
    if written == "gone":
        raise Permanent(f"The document {payload.document_id} was deleted meanwhile.", code="no_such_document")
    if written == "changed":
        raise Transient("the document has another text by now", code="document_changed")
    context.progress(_READ_END, "names")
    merged = resolve(asking, source, lambda done: context.progress(_READ_END + (1 - _READ_END) * done, "names"))
    asking.try_again_if_it_may_help()
    return {
        "document_id": str(source.id),
        "status": "partial" if failed else "done",
        "entities": len({(mention.entity.type, mention.entity.name) for mention in grounding.mentions}),
        "mentions": len(grounding.mentions),
        "relations": len(grounding.relations),
        "dropped": dict(sorted(grounding.dropped.items())),
        "names": merged,
        "failed": [{"passage": chunks[0].text[:80], **answer.failed} for chunks, answer in failed[:_FAILURES_NAMED]],
    }


def _read(
    asking: Asking, source: Source, grounding: Grounding, *, second_pass: bool
) -> list[tuple[list[Chunk], Answer]]:
    """Ask for the facts of each group of chunks. Returns those that failed; raises the first failure where all did."""
    passes = 2 if second_pass else 1
    questions: list[Question] = [(chunks, None) for chunks in reading.groups(source)]
    failed: list[tuple[list[Chunk], Answer]] = []
    for number in range(passes):
        said = asking.each(
            questions,
            lambda question: reading.read(asking, source, question[0], grounding.types, question[1]),
            _share(asking, number / passes, 1 / passes),
        )
        if said and all(answer.error for answer in said) and number == 0:
            asking.try_again_if_it_may_help()
            raise said[0].error or Permanent("no answer")
        heard: list[Question] = []
        for (chunks, _), answer in zip(questions, said, strict=True):
            if answer.error is not None:
                failed.append((chunks, answer))
                continue
            found = Found.model_validate(answer.value)
            grounding.add(chunks, found)
            heard.append((chunks, found))
        questions = heard
    return failed


def _share(asking: Asking, begins: float, share: float) -> Callable[[float], None]:
    return lambda done: asking.context.progress(_READ_END * (begins + share * done), "reading")
