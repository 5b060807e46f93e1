"""Sending a graph to a server whose slot a render has: once, or not at all, and known which."""

from __future__ import annotations

import json
from contextlib import suppress
from typing import Any, Final

from agentflow import log
from agentflow.comfyui import inputs, preflight, sightings
from agentflow.comfyui.attempt import Attempt
from agentflow.comfyui.client import Client, Refused, Unexpected, said_of
from agentflow.comfyui.preflight import Complaint
from agentflow.comfyui.prompts import Render
from agentflow.comfyui.socket import Socket
from agentflow.connections import NoAnswer
from agentflow.errors import Transient

logger = log.get(__name__)

#: When a request whose answer is not known is looked for.
LOOK_AFTER_S: Final = (0.0, 0.5, 1.5, 3.0)
#: Where the graph is at its server, of the whole.
UPLOADED: Final = 0.05
_STOP_S: Final = 8.0


def send(attempt: Attempt, render: Render, client: Client, socket: Socket) -> Render:
    """Raises Permanent where the server cannot run it, Wait where it is away, Transient where it did not take it."""
    try:
        graph = _made_ready(attempt, render, client)
        socket.open()
        attempt.context.check()
        render = attempt.move(render, "sending", come_from="taken")
    except BaseException as error:
        attempt.end(render, "unsent")
        if isinstance(error, NoAnswer) and not error.sent:
            raise attempt.away(client, error) from error
        raise
    attempt.at_server = render, client
    # The last moment at which somebody else may have the job: a process that was frozen gets here late.
    attempt.context.check()
    try:
        errors = client.submit(
            render.prompt_id,
            graph,
            client_id=socket.client_id or render.prompt_id.hex,
            job_id=attempt.job.id,
            check=attempt.context.check,
        )
    except Refused as error:
        attempt.end(render, "failed", str(error))
        raise
    except (NoAnswer, Unexpected) as error:
        if _never_heard(error):
            attempt.end(render, "unsent", str(error))
            raise attempt.away(client, error) from error
        logger.warning("whether a render was accepted is not known: it is looked for", error=str(error))
        if not arrived(attempt, render, client):
            attempt.end(render, "unsent", str(error))
            text = f"The render server did not accept the graph: {error}"
            raise Transient(text, code="render_not_accepted") from error
        errors = {}
    render = attempt.move(render, "sent", come_from="sending")
    if errors:
        with suppress(NoAnswer, Unexpected):  # then it is found among those that nobody waits for
            if sightings.stop(client, render.prompt_id, _STOP_S, attempt.context.check) is not None:
                attempt.end(render, "failed")
        said = said_of({"node_errors": errors})
        raise Refused(f"The render server would leave out a part of the graph: {said}", code="render_refused")
    return render


def _made_ready(attempt: Attempt, render: Render, client: Client) -> dict[str, Any]:
    """Checked against what this server has, with its images there, and names for its files that nobody else has."""
    graph = attempt.prepared.graph
    if complaints := _complaints(attempt, client):
        said = "; ".join(
            f"{f'node {each.node}' if each.node else 'the graph'}{f' {each.input}' if each.input else ''}: {each.message}"
            for each in complaints
        )
        raise Refused(f"The render server cannot run the graph: {said[:2000]}", code="render_refused")
    graph = inputs.bring(attempt.context, client, graph, attempt.prepared.images, share_end=UPLOADED)
    return _with_prefix(graph, f"jobs/{attempt.job.id}/{render.prompt_id.hex[:8]}")


def _complaints(attempt: Attempt, client: Client) -> list[Complaint]:
    """By what the server said of its nodes lately; before anything is refused, by what it says now."""
    graph = attempt.prepared.graph
    places = [(place.node, place.input) for place in attempt.prepared.images]
    nodes = attempt.nodes(client)
    if nodes is None or not preflight.complaints(graph, nodes, places=places):
        return []
    return preflight.complaints(graph, json.loads(client.nodes(attempt.context.check)), places=places)


def arrived(attempt: Attempt, render: Render, client: Client) -> bool:
    """Whether a request whose answer is not known was heard: it may be on its way for a while."""
    for after_s in LOOK_AFTER_S:
        attempt.context.sleep(after_s)
        if not attempt.look(render, client).is_nowhere:
            return True
    return False


def _with_prefix(graph: dict[str, Any], prefix: str) -> dict[str, Any]:
    """Whatever saves is given a name that nothing else has: an answer from the cache names files that may be gone."""
    return {
        node: {**each, "inputs": {**each["inputs"], "filename_prefix": prefix}}
        if "filename_prefix" in (each.get("inputs") or {})
        else each
        for node, each in graph.items()
    }


def _never_heard(error: NoAnswer | Unexpected) -> bool:
    """Whether it is certain that the prompt is not in the queue: no connection, or something before the server said no."""
    return not error.sent if isinstance(error, NoAnswer) else 400 <= error.status < 500
