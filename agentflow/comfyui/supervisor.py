"""One render, from a slot on a server to files in storage: it never hangs, never takes a failure for a success, and is never run
twice by us.

**What runs twice and what does not.** A prompt has an id of ours, in Postgres, before it is sent. Nothing is sent for a job
that has a live prompt; whoever takes up the job (after a crash, a shutdown, a wait) goes on with that one, whether it waits,
runs or has ended. A new one is sent only when the one before

- ended, and was found so in the server's history, interrupted by us among others;
- never arrived: its answer was lost, and in several looks over some seconds it was neither in the queue nor in the history;
- was lost: the server had it, and in two looks half a second apart knows nothing of it, which only a restart does (or somebody
  who deleted it), and nobody heard that it ended well;
- cannot be asked for: its server has not answered anybody for COMFYUI_TIMEOUT seconds, in which it would have been interrupted.
  If that server comes back with it, it is stopped there before anything else.

**What ends a wait.** The socket only says when to look; the looks count. A prompt that is not done COMFYUI_TIMEOUT seconds after
it was sent is ended, verified, and tried again. One that waits in a queue of which nothing runs tells that the server is stuck:
it is taken back and rendered elsewhere. An unreachable server parks the job, no attempt spent.
"""

from __future__ import annotations

import random
import time
from contextlib import suppress
from typing import Any, Final

from agentflow import log, metrics
from agentflow.comfyui import outputs, pool, prompts, sending, sightings, times
from agentflow.comfyui.attempt import Attempt, BeginAnew
from agentflow.comfyui.client import Check, Client, FileGone, Unexpected
from agentflow.comfyui.clients import NotConfigured
from agentflow.comfyui.history import Ended, understand
from agentflow.comfyui.prompts import Render
from agentflow.comfyui.requests import Prepared
from agentflow.comfyui.sightings import QueueWatch
from agentflow.comfyui.socket import Socket, tells_to_look
from agentflow.connections import NoAnswer
from agentflow.database import Unavailable
from agentflow.errors import JobError, Permanent, Transient, Wait
from agentflow.jobs import keys
from agentflow.worker.running import JobContext, Stopped

logger = log.get(__name__)

#: Of one attempt: what was lost in a restart is begun anew so often.
_BEGINNINGS: Final = 3
#: For the end of a prompt whose time is over, within what the job has beyond it; and of one whose job was cancelled, before the
#: watchdog loses patience.
_STOP_S: Final = 20.0
_CANCEL_S: Final = 6.0
#: A node in the middle of C code hears of an interruption when it ends. Beyond it the server is taken for stuck.
_STOPPING_S: Final = 180.0
_STOPPING_AGAIN_S: Final = 5.0
_OUT_OF_MEMORY_S: Final = 5.0
#: Until somebody is back who found that the slots of the line are those of prompts without a worker.
_HELD_S: Final = 3.0
#: Where the server is done, of the whole.
_RENDERED: Final = 0.9


def render(context: JobContext, prepared: Prepared, pool_name: str) -> dict[str, Any]:
    """The result of a job: `outputs`, `provenance`, `prompt_id`, `cached`, `seconds` (of the server).

    Raises Permanent with the code render_refused, render_node_error, render_partly_failed, render_no_output,
    render_output_too_large, render_image_gone, render_bad_image or not_configured; Transient with render_out_of_memory,
    render_interrupted, render_timeout, render_lost, render_not_accepted or render_output_gone; Wait with the reason busy,
    comfyui_unreachable, comfyui_stuck or render_stopping.
    """
    with context.shielded():
        return Supervisor(context, prepared, pool_name).run()


class Supervisor:
    """For one attempt, in its thread."""

    def __init__(self, context: JobContext, prepared: Prepared, pool_name: str) -> None:
        self._context = context
        self._job = context.job
        self._prepared = prepared
        self._pool = pool_name
        self._system = context.system
        self._settings = context.system.settings
        self._attempt = Attempt(context, prepared, pool_name)

    def run(self) -> dict[str, Any]:
        try:
            for _ in range(_BEGINNINGS):
                try:
                    return self._once()
                except BeginAnew:
                    continue
        except Stopped as stopped:
            raise self._stopped(stopped) from None
        raise Transient("The render was lost again and again, as its server was started anew", code="render_lost")

    def _once(self) -> dict[str, Any]:
        self._context.progress(0.0, "queued")
        render = self._standing() or self._taken()
        if (
            render.state == "collected" and render.found is not None
        ):  # its attempt died before its job's end was written
            return render.found
        client = self._system.comfyui.of(render.server)
        assert client is not None  # noqa: S101 - both looked for it
        if render.state == "done" and render.found is not None:
            ended = Ended.from_json(render.found)
            self._attempt.leave_line()
        else:
            with Socket(client) as socket:
                if render.state == "taken":
                    render = sending.send(self._attempt, render, client, socket)
                self._attempt.at_server = render, client
                ended = self._followed(render, client, socket)
        return self._collected(render, client, ended)

    # ---- what there is already ----

    def _standing(self) -> Render | None:
        """The prompt that an earlier attempt left, where it is still to be reckoned with."""
        with self._system.database.connection() as conn:
            render = prompts.live(conn, self._job)
        if render is None:
            return None
        if render.state == "taken":  # its attempt died before anything was sent
            self._attempt.end(render, "unsent")
            return None
        if render.state == "collected":
            return render
        client = self._system.comfyui.of(render.server)
        if client is None:
            with self._system.database.connection() as conn:
                if any(server.name == render.server for server in pool.servers(conn)):
                    raise self._not_here()
            self._attempt.end(render, "given_up", "its server is in no worker's COMFYUI_URL any more")
            return None
        logger.info("a render is taken up where it was left", prompt_id=str(render.prompt_id), state=render.state)
        if render.state == "sending":
            if not sending.arrived(self._attempt, render, client):
                self._attempt.end(render, "unsent")
                return None
            render = self._attempt.move(render, "sent", come_from="sending")
        return render

    # ---- a new one ----

    def _taken(self) -> Render:
        """A slot of a server. Raises Wait where there is none."""
        names = self._names()
        if not self._attempt.has_key:  # left when an earlier prompt had ended
            with self._system.database.connection() as conn:
                keys.enter(conn, self._job, pool.line(self._pool))
            raise Wait(0.0, "busy", message="in line for a GPU again")
        with self._system.database.transaction() as conn:
            render = pool.take(conn, self._job, self._pool, names)
            if render is not None:
                return render
            is_any_well = any(server.well for server in pool.servers(conn) if server.name in names)
        if is_any_well:
            raise Wait(_HELD_S * random.uniform(0.7, 1.0), "busy", message="the render servers have what they may have")
        raise Wait(self._settings.worker_gpu_lock_timeout, "comfyui_unreachable", message="no render server is well")

    def _names(self) -> list[str]:
        """The servers of the pool. Raises NotConfigured; Wait where only other workers have some."""
        try:
            return self._system.comfyui.names(self._pool)
        except NotConfigured:
            with self._system.database.connection() as conn:
                if any(server.pool == self._pool for server in pool.servers(conn)):
                    raise self._not_here() from None
            raise

    def _not_here(self) -> Wait:
        return Wait(_HELD_S * random.uniform(0.7, 1.0), "busy", message="only other workers have its server")

    # ---- at the server ----

    def _followed(self, render: Render, client: Client, socket: Socket) -> Ended:
        """Until it has ended well. Raises what else became of it."""
        graph = self._prepared.graph
        shape = times.shape_of(graph)
        with self._system.database.connection() as conn:
            course = times.Course(graph, times.known(conn, shape, client.server.name))
        ends = time.monotonic() + self._settings.comfyui_timeout - render.age_s
        watch = QueueWatch()
        while True:
            sighting = self._attempt.look(render, client, with_queue=watch.is_due())
            if sighting.entry is not None:
                ended = self._ended(render, client, sighting.entry, is_overdue=time.monotonic() >= ends)
                if ended.ran and course.took:
                    with self._system.database.connection() as conn:
                        times.learn(conn, shape, client.server.name, times.Times(ended.seconds, course.took))
                return ended
            match watch.see(sighting):
                case "lost":
                    if (heard := course.entry()) is not None:
                        return self._ended(render, client, heard)
                    logger.warning("a render was lost: its server was started anew", prompt_id=str(render.prompt_id))
                    self._attempt.end(render, "lost")
                    metrics.render_ended("lost")
                    raise BeginAnew
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
            self._context.progress(sending.UPLOADED, "queued")
        else:
            share = course.fraction() or 0.0
            self._context.progress(sending.UPLOADED + (_RENDERED - sending.UPLOADED) * share, "rendering")

    def _ended(self, render: Render, client: Client, entry: dict[str, Any], *, is_overdue: bool = False) -> Ended:
        """Write how it ended. Raises that, unless it ended well."""
        ended = self._understood(client, entry)
        if is_overdue and ended.kind == "interrupted":
            raise self._timed_out(render)
        metrics.render_ended(ended.kind)
        if ended.kind == "done":
            self._attempt.move(render, "done", come_from="sent", found=ended.as_json())
            self._attempt.leave_line()
        else:
            self._attempt.end(render, "interrupted" if ended.kind == "interrupted" else "failed", ended.said)
        self._attempt.at_server = None
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
        sighting = self._attempt.patiently(
            render, client, lambda: sightings.stop(client, render.prompt_id, _STOP_S, self._context.check)
        )
        if sighting is not None:
            if sighting.entry is not None:
                return self._ended(render, client, sighting.entry, is_overdue=True)
            raise self._timed_out(render)
        if render.age_s < limit_s + _STOPPING_S:
            raise Wait(
                _STOPPING_AGAIN_S, "render_stopping", message="the render's interruption has not come through yet"
            )
        self._attempt.end(render, "given_up", "it could not be interrupted")
        self._attempt.sick(client, "stuck")
        raise Transient(f"The render took longer than {limit_s:g} s and cannot be interrupted", code="render_timeout")

    def _timed_out(self, render: Render) -> Transient:
        self._attempt.end(render, "timed_out")
        metrics.render_ended("timed_out")
        limit_s = self._settings.comfyui_timeout
        return Transient(f"The render took longer than {limit_s:g} s and was interrupted", code="render_timeout")

    def _stuck(self, render: Render, client: Client) -> JobError:
        """Nothing runs, and this one waits: the server's thread for prompts is dead."""
        sighting = self._attempt.patiently(
            render, client, lambda: sightings.stop(client, render.prompt_id, _STOP_S, self._context.check)
        )
        if sighting is not None and sighting.entry is not None:  # it came to life again
            self._ended(render, client, sighting.entry)
            raise BeginAnew
        self._attempt.end(render, "unsent" if sighting is not None else "given_up", "the server is stuck")
        metrics.render_ended("stuck")
        self._attempt.sick(client, "stuck")
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
            self._attempt.end(render, "gone")
            text = "The render server has not kept the files of the render; it is rendered again"
            raise Transient(text, code="render_output_gone") from None
        except NoAnswer as error:
            if error.sent:
                raise
            raise self._attempt.away(client, error, render) from error
        with self._system.database.connection() as conn:
            version = next((s.version for s in pool.servers(conn) if s.name == render.server), None)
        result = {
            "outputs": found,
            "provenance": {**self._prepared.provenance, "server_version": version},
            "prompt_id": str(render.prompt_id),
            "cached": not ended.ran,
            "seconds": round(ended.seconds, 3),
        }
        self._attempt.move(render, "collected", come_from="done", found=result)
        return result

    # ---- what is not as it should be ----

    def _stopped(self, stopped: Stopped) -> Stopped:
        """A cancelled job's prompt is ended; any other is left for the next attempt to take up."""
        if stopped.reason != "cancelled" or self._attempt.at_server is None:
            return stopped
        render, client = self._attempt.at_server
        note = "Its server has not let go of it yet."
        with suppress(NoAnswer, Unexpected, *Unavailable):  # then it is found among those that nobody waits for
            sighting = sightings.stop(client, render.prompt_id, _CANCEL_S, _within(_CANCEL_S))
            if sighting is not None:
                self._attempt.end(render, "cancelled")
                is_done = sighting.entry is not None and self._understood(client, sighting.entry).kind == "done"
                note = "The render had run to its end by then." if is_done else "The render was interrupted."
        return Stopped(stopped.reason, note)

    def _understood(self, client: Client, entry: dict[str, Any]) -> Ended:
        graph, nodes = self._prepared.graph, self._attempt.nodes(client) or {}
        saving = {id_ for id_, each in graph.items() if nodes.get(each["class_type"], {}).get("output_node")}
        return understand(entry, graph, self._prepared.outputs, saving)


def _within(seconds: float) -> Check:
    """For the end of a job that is to end itself: no question outlasts it."""
    end = time.monotonic() + seconds

    def check() -> None:
        if time.monotonic() > end:
            raise NoAnswer("The render server is too slow", code="comfyui_timeout", sent=True)

    return check
