"""One render, from a slot on a server to files in storage: it never hangs, never takes a failure for a success, and is never run
twice by us.

**What runs twice and what does not.** A prompt has an id of ours, in Postgres, before it is sent. Nothing is sent for a job that
has a live prompt; whoever takes up the job (after a crash, a shutdown, a wait) goes on with that one, whether it waits, runs or has
ended. A new one is sent only when the one before

- ended, and was found so in the server's history, interrupted by us among others;
- never arrived: its answer was lost, and in several looks over some seconds it was neither in the queue nor in the history;
- was lost: the server had it, and in two looks half a second apart knows nothing of it, which only a restart does (or somebody who
  deleted it), and nobody heard that it ended well;
- cannot be asked for: its server has not answered anybody for COMFYUI_TIMEOUT seconds, in which it would have been interrupted.
  If that server comes back with it, it is stopped there before anything else.

**What ends a wait.** The socket only says when to look; the looks count. A prompt that is not done COMFYUI_TIMEOUT seconds after
it was sent is ended, verified, and tried again. One that waits in a queue of which nothing runs tells that the server is stuck: it is
taken back and rendered elsewhere. An unreachable server parks the job, no attempt spent.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Final, Literal, TypeVar

from agentflow import log, metrics
from agentflow.comfyui import inputs, outputs, pool, preflight, prompts, stopping, times
from agentflow.comfyui.client import Check, Client, FileGone, Refused, Unexpected, said_of
from agentflow.comfyui.history import Ended, understand
from agentflow.comfyui.prompts import Render
from agentflow.comfyui.requests import Prepared
from agentflow.comfyui.socket import Socket, tells_to_look
from agentflow.comfyui.stopping import Sighting
from agentflow.connections import NoAnswer
from agentflow.database import Unavailable
from agentflow.errors import JobError, Permanent, Transient, Wait
from agentflow.jobs import keys, records
from agentflow.worker.running import JobContext, Stopped

logger = log.get(__name__)

T = TypeVar("T")

#: Of one attempt: what was lost in a restart, or whose files were gone, is begun anew so often.
_BEGINNINGS: Final = 3
#: A server may be away so long before its renders are parked; less, where it is known to be.
_PATIENCE_S: Final = 10.0
_LITTLE_PATIENCE_S: Final = 2.0
#: Between looks at the queue, which comes with all its graphs.
_QUEUE_EVERY_S: Final = 1.0
#: In which a queue moves, were it not stuck: the next prompt begins at once.
_STUCK_S: Final = 5.0
#: When a request whose answer is not known is looked for.
_LOOK_AFTER_S: Final = (0.0, 0.5, 1.5, 3.0)
#: For the end of a prompt whose time is over, and of one whose job was cancelled (the watchdog waits 10 s).
_STOP_S: Final = 8.0
_CANCEL_S: Final = 6.0
#: A node in the middle of C code hears of an interruption when it ends. Beyond it the server is taken for stuck.
_STOPPING_S: Final = 180.0
_STOPPING_AGAIN_S: Final = 5.0
_AWAY_AGAIN_S: Final = 10.0
_OUT_OF_MEMORY_S: Final = 5.0
_HELD_S: Final = 1.0
_UPLOADED, _RENDERED = 0.05, 0.9

_LIVE: Final[tuple[prompts.State, ...]] = ("taken", "sending", "sent")


def render(context: JobContext, prepared: Prepared, pool_name: str) -> dict[str, Any]:
    """The result of a job: `outputs`, `provenance`, `prompt_id`, `cached`, `seconds` (of the server).

    Raises Permanent with the code render_refused, render_node_error, render_partly_failed, render_no_output,
    render_output_too_large, render_image_gone, render_bad_image or not_configured; Transient with render_out_of_memory,
    render_interrupted, render_timeout, render_lost, render_not_accepted or render_output_gone; Wait with the reason busy,
    comfyui_unreachable, comfyui_stuck or render_stopping.
    """
    with context.shielded():
        return Supervisor(context, prepared, pool_name).run()


class _BeginAnew(Exception):
    """The prompt is gone for good, and nothing came of it."""


class Supervisor:
    """For one attempt, in its thread."""

    def __init__(self, context: JobContext, prepared: Prepared, pool_name: str) -> None:
        self._context = context
        self._job = context.job
        self._prepared = prepared
        self._pool = pool_name
        self._system = context.system
        self._settings = context.system.settings
        self._has_key = context.job.concurrency_key is not None
        self._has_answered = False
        self._sent_now: tuple[Render, Client] | None = None

    def run(self) -> dict[str, Any]:
        try:
            for _ in range(_BEGINNINGS):
                try:
                    return self._once()
                except _BeginAnew:
                    continue
        except Stopped as stopped:
            raise self._stopped(stopped) from None
        raise Transient("The render was lost again and again, as its server was started anew", code="render_lost")

    def _once(self) -> dict[str, Any]:
        self._context.progress(0.0, "queued")
        render = self._standing() or self._taken()
        client = self._client(render)
        if render.state == "done" and render.found is not None:
            ended = Ended.from_json(render.found)
            self._leave_line()
        else:
            with Socket(client) as socket:
                if render.state == "taken":
                    render = self._sent(render, client, socket)
                self._sent_now = render, client
                ended = self._followed(render, client, socket)
        self._sent_now = None
        return self._collected(render, client, ended)

    # ---- what there is already ----

    def _standing(self) -> Render | None:
        """The prompt that an earlier attempt left, where it is still to be reckoned with."""
        with self._system.database.connection() as conn:
            render = prompts.live(conn, self._job)
        if render is None:
            return None
        if render.state == "taken":  # its attempt died before anything was sent
            self._end(render, "unsent")
            return None
        client = self._system.comfyui.of(render.server)
        if client is None:
            self._end(render, "given_up", "its server is not in COMFYUI_URL any more")
            return None
        logger.info("a render is taken up where it was left", prompt_id=str(render.prompt_id), state=render.state)
        if render.state == "sending":
            if not self._arrived(render, client):
                self._end(render, "unsent")
                return None
            render = self._move(render, "sent", come_from="sending")
        return render

    def _arrived(self, render: Render, client: Client) -> bool:
        """Whether a request whose answer is not known was heard: it may be on its way for a while."""
        for after_s in _LOOK_AFTER_S:
            self._context.sleep(after_s)
            if not self._look(render, client).is_nowhere:
                return True
        return False

    # ---- a new one ----

    def _taken(self) -> Render:
        """A slot of a server. Raises Wait where there is none."""
        names = self._system.comfyui.names(self._pool)
        if not self._has_key:  # left when an earlier prompt had ended
            with self._system.database.connection() as conn:
                keys.enter(conn, self._job, pool.line(self._pool))
            raise Wait(0.0, "busy", message="in line for a GPU again")
        with self._system.database.transaction() as conn:
            render = pool.take(conn, self._job, self._pool, names)
            if render is not None:
                return render
            is_any_well = any(server.well for server in pool.servers(conn) if server.name in names)
        if is_any_well:
            raise Wait(_HELD_S, "busy", message="the render servers have what they may have")
        raise Wait(self._settings.worker_gpu_lock_timeout, "comfyui_unreachable", message="no render server is well")

    def _sent(self, render: Render, client: Client, socket: Socket) -> Render:
        """Raises Permanent where the server cannot run it, Wait where it is away."""
        try:
            graph = self._made_ready(render, client)
            socket.open()
            self._context.check()
            render = self._move(render, "sending", come_from="taken")
        except BaseException as error:
            self._end(render, "unsent")
            if _is_away(error):
                raise self._away(client, error) from error
            raise
        self._sent_now = render, client
        # The last moment at which somebody else may have the job: a process that was frozen gets here late.
        self._context.check()
        try:
            errors = client.submit(
                render.prompt_id,
                graph,
                client_id=socket.client_id or render.prompt_id.hex,
                job_id=self._job.id,
                check=self._context.check,
            )
        except Refused as error:
            self._end(render, "failed", str(error))
            raise
        except (NoAnswer, Unexpected) as error:
            if (isinstance(error, NoAnswer) and not error.sent) or (isinstance(error, Unexpected) and error.status < 500):
                self._end(render, "unsent", str(error))
                raise self._away(client, error) from error
            logger.warning("whether a render was accepted is not known: it is looked for", error=str(error))
            if not self._arrived(render, client):
                self._end(render, "unsent", str(error))
                text = f"The render server did not accept the graph: {error}"
                raise Transient(text, code="render_not_accepted") from error
            errors = {}
        render = self._move(render, "sent", come_from="sending")
        if errors:
            stopping.stop(client, render.prompt_id, _STOP_S, self._context.check)
            self._end(render, "failed")
            said = said_of({"node_errors": errors})
            raise Refused(f"The render server would leave out a part of the graph: {said}", code="render_refused")
        self._has_answered = True
        return render

    def _made_ready(self, render: Render, client: Client) -> dict[str, Any]:
        """Checked against what this server has, with its images there, and names for its files that nobody else has."""
        graph = self._prepared.graph
        places = [(place.node, place.input) for place in self._prepared.images]
        with self._system.database.connection() as conn:
            nodes = pool.nodes_of(conn, client.server.name, {str(each.get("class_type")) for each in graph.values()})
        if nodes is not None and (complaints := preflight.complaints(graph, nodes, places=places)):
            said = "; ".join(
                f"{f'node {each.node}' if each.node else 'the graph'}{f' {each.input}' if each.input else ''}: {each.message}"
                for each in complaints
            )
            raise Refused(f"The render server cannot run the graph: {said[:2000]}", code="render_refused")
        graph = inputs.bring(self._context, client, graph, self._prepared.images, share_end=_UPLOADED)
        return _with_prefix(graph, f"jobs/{self._job.id}/{render.prompt_id.hex[:8]}")

    # ---- at the server ----

    def _followed(self, render: Render, client: Client, socket: Socket) -> Ended:
        """Until it has ended well. Raises what else became of it."""
        graph = self._prepared.graph
        shape = times.shape_of(graph)
        with self._system.database.connection() as conn:
            course = times.Course(graph, times.known(conn, shape, client.server.name))
        ends = time.monotonic() + self._settings.comfyui_timeout - render.age_s
        watch = _QueueWatch()
        while True:
            sighting = self._look(render, client, with_queue=watch.is_due())
            if sighting.entry is not None:
                ended = self._ended(render, client, sighting.entry)
                if ended.ran and course.took:
                    with self._system.database.connection() as conn:
                        times.learn(conn, shape, client.server.name, times.Times(ended.seconds, course.took))
                return ended
            match watch.see(sighting):
                case "lost":
                    if (heard := course.entry()) is not None:
                        return self._ended(render, client, heard)
                    logger.warning("a render was lost: its server was started anew", prompt_id=str(render.prompt_id))
                    self._end(render, "lost")
                    metrics.render_ended("lost")
                    raise _BeginAnew
                case "stuck":
                    raise self._stuck(render, client)
                case "running":
                    course.begin()
            self._report(course, is_running=watch.is_running)
            if time.monotonic() >= ends:
                return self._overdue(render, client)
            self._listen(render, socket, course)

    def _listen(self, render: Render, socket: Socket, course: times.Course) -> None:
        """Until it is time for the next look: after the interval, or when something is said to have ended."""
        look_at = time.monotonic() + self._settings.comfyui_poll_interval
        while (left_s := look_at - time.monotonic()) > 0:
            for event in socket.events(left_s):
                if event["data"].get("prompt_id") == str(render.prompt_id):
                    course.hear(event)
                if tells_to_look(event):
                    look_at = 0.0
            if course.heard:
                self._report(course)

    def _report(self, course: times.Course, *, is_running: bool = True) -> None:
        if not (is_running or course.heard):
            self._context.progress(_UPLOADED, "queued")
        else:
            share = course.fraction() or 0.0
            self._context.progress(_UPLOADED + (_RENDERED - _UPLOADED) * share, "rendering")

    def _ended(self, render: Render, client: Client, entry: dict[str, Any]) -> Ended:
        """Write how it ended. Raises that, unless it ended well."""
        ended = understand(entry, self._prepared.graph, self._prepared.outputs)
        metrics.render_ended(ended.kind)
        if ended.kind == "done":
            self._move(render, "done", come_from="sent", found=ended.as_json())
            self._leave_line()
        else:
            self._end(render, "interrupted" if ended.kind == "interrupted" else "failed", ended.said)
        self._sent_now = None
        with self._system.database.connection() as conn:
            pool.proved(conn, client.server.name)
        self._context.spent(gpu_s=ended.seconds)
        match ended.kind:
            case "done":
                return ended
            case "out_of_memory":
                self._free(client)
                raise Transient(
                    f"The render server ran out of memory: {ended.said}",
                    code="render_out_of_memory",
                    retry_after_s=_OUT_OF_MEMORY_S,
                )
            case "interrupted":
                raise Transient(f"Somebody else interrupted the render: {ended.said}", code="render_interrupted")
            case "no_output":
                raise Permanent(
                    "The render ended without any output: nothing was saved, or what leads to it was blocked",
                    code="render_no_output",
                )
            case "partly_failed":
                raise Permanent(f"A part of the render failed: {ended.said}", code="render_partly_failed")
            case "node_error":
                raise Permanent(f"The render failed: {ended.said}", code="render_node_error")

    def _overdue(self, render: Render, client: Client) -> Ended:
        """Its time is over: it is ended, unless it has ended by itself in the last moment."""
        limit_s = self._settings.comfyui_timeout
        sighting = self._patiently(
            render, client, lambda: stopping.stop(client, render.prompt_id, _STOP_S, self._context.check)
        )
        if sighting is not None:
            if sighting.entry is not None and _kind(sighting.entry, self._prepared) != "interrupted":
                return self._ended(render, client, sighting.entry)
            self._end(render, "timed_out")
            metrics.render_ended("timed_out")
            raise Transient(f"The render took longer than {limit_s:g} s and was interrupted", code="render_timeout")
        if render.age_s < limit_s + _STOPPING_S:
            raise Wait(_STOPPING_AGAIN_S, "render_stopping", message="the render's interruption has not come through yet")
        self._end(render, "given_up", "it could not be interrupted")
        self._sick(client, "stuck")
        raise Transient(f"The render took longer than {limit_s:g} s and cannot be interrupted", code="render_timeout")

    def _stuck(self, render: Render, client: Client) -> JobError:
        """Nothing runs, and this one waits: the server's thread for prompts is dead."""
        sighting = self._patiently(
            render, client, lambda: stopping.stop(client, render.prompt_id, _STOP_S, self._context.check)
        )
        if sighting is not None and sighting.entry is not None:  # it came to life again
            self._ended(render, client, sighting.entry)
            raise _BeginAnew
        self._end(render, "unsent" if sighting is not None else "given_up", "the server is stuck")
        metrics.render_ended("stuck")
        self._sick(client, "stuck")
        return Wait(0.0, "comfyui_stuck", message="the render server takes prompts and runs none")

    def _free(self, client: Client) -> None:
        try:
            client.free(self._context.check)
        except (NoAnswer, Unexpected) as error:
            logger.info("a render server was not told to free its memory", error=str(error))

    # ---- its files ----

    def _collected(self, render: Render, client: Client, ended: Ended) -> dict[str, Any]:
        self._context.progress(_RENDERED, "downloading")
        try:
            found = outputs.collect(self._context, client, ended, share_done=_RENDERED)
        except FileGone:
            self._end(render, "gone")
            text = "The render server has not kept the files of the render; it is rendered again"
            raise Transient(text, code="render_output_gone") from None
        except (NoAnswer, Unexpected) as error:
            raise self._away(client, error, render) from error
        self._move(render, "collected", come_from="done")
        with self._system.database.connection() as conn:
            version = next((s.version for s in pool.servers(conn) if s.name == render.server), None)
        return {
            "outputs": found,
            "provenance": {**self._prepared.provenance, "server_version": version},
            "prompt_id": str(render.prompt_id),
            "cached": not ended.ran,
            "seconds": round(ended.seconds, 3),
        }

    # ---- what is not as it should be ----

    def _look(self, render: Render, client: Client, *, with_queue: bool = True) -> Sighting:
        def ask() -> Sighting:
            if with_queue:
                return stopping.look(client, render.prompt_id, self._context.check)
            return Sighting(client.history(render.prompt_id, self._context.check))

        return self._patiently(render, client, ask)

    def _patiently(self, render: Render, client: Client, ask: Callable[[], T]) -> T:
        """Ask again while the server is away, for some seconds. Raises Wait; _BeginAnew when it was away for too long."""
        patience_s = _PATIENCE_S if self._has_answered else _LITTLE_PATIENCE_S
        away_since: float | None = None
        while True:
            try:
                answer = ask()
            except (NoAnswer, Unexpected) as error:
                away_since = away_since or time.monotonic()
                if time.monotonic() - away_since > patience_s:
                    raise self._away(client, error, render) from error
                self._context.sleep(self._settings.comfyui_poll_interval)
            else:
                self._has_answered = True
                return answer

    def _away(self, client: Client, error: BaseException, render: Render | None = None) -> Exception:
        """Its server is away: the job waits, and its prompt with it, but not for ever."""
        unseen_s = self._sick(client, "unreachable")
        timeout_s = self._settings.comfyui_timeout
        if render is not None and min(render.age_s, unseen_s) > timeout_s:
            self._end(render, "given_up", str(error))
            return _BeginAnew()
        delay_s = min(_AWAY_AGAIN_S, self._settings.worker_gpu_lock_timeout)
        return Wait(delay_s, "comfyui_unreachable", message=str(error))

    def _sick(self, client: Client, problem: pool.Problem) -> float:
        """Have the server left alone for a while. Returns for how long it has answered nobody, in seconds."""
        name = client.server.name
        with self._system.database.connection() as conn:
            if pool.sick(conn, name, problem):
                logger.warning("a render server is left alone for a while", server=name, problem=problem)
            rings = records.rings_for(conn, pool.count(conn, self._pool, self._settings.worker_gpu_lock_timeout))
            known = next((s for s in pool.servers(conn) if s.name == name), None)
        self._system.publisher.ring(rings)
        return math.inf if known is None or known.unseen_s is None else known.unseen_s

    def _stopped(self, stopped: Stopped) -> Stopped:
        """A cancelled job's prompt is ended; any other is left for the next attempt to take up."""
        if stopped.reason != "cancelled" or self._sent_now is None:
            return stopped
        render, client = self._sent_now
        note = "Its server has not let go of it yet."
        with suppress(NoAnswer, Unexpected, *Unavailable):  # then it is found among those that nobody waits for
            sighting = stopping.stop(client, render.prompt_id, _CANCEL_S, _within(_CANCEL_S))
            if sighting is not None:
                self._end(render, "cancelled")
                is_done = sighting.entry is not None and _kind(sighting.entry, self._prepared) == "done"
                note = "The render had run to its end by then." if is_done else "The render was interrupted."
        return Stopped(stopped.reason, note)

    # ---- rows ----

    def _client(self, render: Render) -> Client:
        client = self._system.comfyui.of(render.server)
        if client is None:
            raise Wait(_HELD_S, "busy")  # another worker's settings name it
        return client

    def _move(self, render: Render, state: prompts.State, *, come_from: prompts.State, **facts: Any) -> Render:
        """Raises Stopped where somebody else has the prompt by now."""
        with self._system.database.connection() as conn:
            if not prompts.move(conn, render, state, come_from=[come_from], **facts):
                raise Stopped("lost")
        return dataclasses.replace(render, state=state)

    def _end(self, render: Render, state: prompts.State, problem: str | None = None) -> None:
        with self._system.database.connection() as conn:
            prompts.move(conn, render, state, come_from=[*_LIVE, "done"], problem=problem)

    def _leave_line(self) -> None:
        """The GPU is free: the next render may begin while this one's files are fetched."""
        if self._has_key:
            with self._system.database.connection() as conn:
                rings = records.rings_for(conn, keys.leave(conn, self._job))
            self._system.publisher.ring(rings)
            self._has_key = False


class _QueueWatch:
    """What the looks at a queue say of a prompt, one after the other."""

    def __init__(self) -> None:
        self.is_running = False
        self._next_at = 0.0
        self._nowhere_at: float | None = None
        self._stuck_at: float | None = None

    def is_due(self) -> bool:
        return time.monotonic() >= self._next_at

    def see(self, sighting: Sighting) -> Literal["lost", "stuck", "running", "waiting", "unknown"]:
        if sighting.queue is None:
            return "unknown"
        now = time.monotonic()
        self._next_at = now + _QUEUE_EVERY_S
        if sighting.is_nowhere:
            if self._nowhere_at is not None and now - self._nowhere_at >= stopping.APART_S:
                return "lost"
            self._nowhere_at = self._nowhere_at or now
            self._next_at = now + stopping.APART_S
            return "unknown"
        self._nowhere_at = None
        self.is_running = sighting.position == 0
        if self.is_running or sighting.queue.running:
            self._stuck_at = None
            return "running" if self.is_running else "waiting"
        self._stuck_at = self._stuck_at or now
        return "stuck" if now - self._stuck_at >= _STUCK_S else "waiting"


def _with_prefix(graph: dict[str, Any], prefix: str) -> dict[str, Any]:
    """Whatever saves is given a name that nothing else has: an answer from the cache names files that may be gone."""
    return {
        node: {**each, "inputs": {**each["inputs"], "filename_prefix": prefix}}
        if "filename_prefix" in (each.get("inputs") or {})
        else each
        for node, each in graph.items()
    }


def _kind(entry: dict[str, Any], prepared: Prepared) -> str:
    return understand(entry, prepared.graph, prepared.outputs).kind


def _is_away(error: BaseException) -> bool:
    return isinstance(error, NoAnswer) or (isinstance(error, Unexpected) and error.status not in (400, 413))


def _within(seconds: float) -> Check:
    """For the end of a job that is to end itself: no question outlasts it."""
    end = time.monotonic() + seconds

    def check() -> None:
        if time.monotonic() > end:
            raise NoAnswer("The render server is too slow", code="comfyui_timeout", sent=True)

    return check
