"""Renders on ComfyUI servers: ask for one, with its images, and see how it goes."""

from __future__ import annotations

import dataclasses
from typing import Any, Final
from uuid import UUID

from flask import request

from agentflow.comfyui import graphs, pictures, pool, preflight, requests
from agentflow.comfyui.preflight import Complaint
from agentflow.comfyui.requests import MAX_IMAGES, TYPE, Image, InvalidRender, RenderRequest
from agentflow.database import Unavailable
from agentflow.ids import new_id
from agentflow.jobs import records
from agentflow.jobs.model import Job
from agentflow.jobs.records import Filter
from agentflow.jobs.requests import NewJob
from agentflow.storage import NotStored
from agentflow.system import System
from web import jobs, outlook, uploads
from web.api import MAX_JSON_BYTES, Answer, Call, Routes, View, parse_json, read_json, validated
from web.cursors import cursor_of, read_cursor
from web.jobs import JobError
from web.problems import Fault, Refused, invalid
from web.render_views import ListQuery, OutputView, ProvenanceView, RenderBody, RenderList, RenderSummary, RenderView

routes = Routes("renders")

_FIELD: Final = "request"
_SHORT: Final = ("workflow", "version", "pool")


@dataclasses.dataclass(frozen=True, slots=True)
class _Asked:
    """A render to be submitted as job `id`. `sent` is the request as its sender would repeat it, uploads by their content."""

    id: UUID
    body: RenderBody
    request: RenderRequest
    sent: RenderRequest


@routes.post(
    "/api/renders",
    {202: RenderView},
    body=RenderBody,
    other_bodies={
        "multipart/form-data": {
            "type": "object",
            "properties": {_FIELD: {"type": "string", "description": "The JSON, without the images that are sent"}},
            "required": [_FIELD],
            "additionalProperties": {"type": "string", "format": "binary"},
        },
    },
    headers=jobs.BatchHeaders,
    scope="submit",
    problems=(408, 409),
    max_body_bytes=1 << 62,  # RENDER_IMAGE_MAX_BYTES is looked at below
)
def create(call: Call, headers: jobs.BatchHeaders) -> Answer:
    """Ask for a render: JSON, or a form with that JSON as `request` and each image as a file under the image's name.

    Images are PNG, JPEG or WebP, RENDER_IMAGE_MAX_BYTES at most. What no server of the pool could run is refused at once, with
    all that is wrong in `errors`: nodes and models that are missing, values out of range. A workflow as ComfyUI's editor saves it
    is 422, with the way to export it. `POST /api/jobs/{id}/cancel` cancels a render.
    """
    if request.mimetype == "multipart/form-data":
        return _create_form(call, headers.idempotency_key)
    if request.mimetype != "application/json" and request.content_length:
        raise Refused(
            415,
            "the body must be JSON, or multipart/form-data with the JSON as `request` and images as files",
            headers={"Accept": "multipart/form-data, application/json"},
        )
    body = read_json(RenderBody)
    wanted = _request_of(body, {})
    answer, _ = _submit(call, _Asked(_new_id(), body, wanted, wanted), headers.idempotency_key)
    return answer


@routes.get("/api/renders", {200: RenderList}, query=ListQuery)
def search(call: Call, query: ListQuery) -> RenderList:
    """List renders, the newest first."""
    before = read_cursor(query.cursor) if query.cursor is not None else None
    wanted = Filter(state=query.state, type=TYPE, correlation_id=query.correlation_id)
    with call.system.database.connection() as conn:
        found = records.search(conn, call.sees, wanted, before=before, limit=query.limit + 1)
        page = found[: query.limit]
        asked = records.arguments(conn, call.sees, [job.id for job in page], _SHORT)
    return RenderList(
        renders=[RenderSummary(**_summary(job, asked.get(job.id, {}))) for job in page],
        next_cursor=cursor_of(page[-1].id) if len(found) > query.limit else None,
    )


@routes.get("/api/renders/<uuid:render_id>", {200: RenderView}, query=jobs.WaitQuery, problems=(404,))
def show(call: Call, render_id: UUID, query: jobs.WaitQuery) -> RenderView:
    """See how a render goes and what came out, or wait for its end."""
    job, _ = call.services.seats.wait(_find(call, render_id), query.wait)
    if job is None:
        raise _unknown(render_id)
    return _view(call, job)


def _create_form(call: Call, key: str | None) -> Answer:
    """The files first, then the job: a job whose image is not there would be an accepted render that is lost."""
    storage = call.system.storage
    with call.system.database.connection() as conn:
        conn.execute("select 1")  # better now than after the upload
    render_id = _new_id()
    home = requests.folder(call.organization_id, render_id)

    def place_of(name: str, head: bytes) -> tuple[str, str]:
        kind = pictures.media_type(head)
        if kind is None:
            raise invalid(f"images.{name[:100]}", "is no PNG, JPEG or WebP image")
        return f"{home}/inputs/{new_id()}{pictures.SUFFIXES[kind]}", kind

    form = uploads.store_files(
        storage,
        call.system.settings.render_image_max_bytes,
        place_of,
        most=MAX_IMAGES,
        fields=(_FIELD,),
        field_bytes=MAX_JSON_BYTES,
    )
    keys = [each.key for each in form.files.values()]
    try:
        if _FIELD not in form.fields:
            raise invalid(_FIELD, "is missing: the JSON of the request")
        body = parse_json(RenderBody, form.fields[_FIELD].encode())
        for name in form.files:
            if name in body.images:
                raise invalid(f"images.{name}", "is sent as a file, too: send it once")
        stored = _request_of(body, {name: each.key for name, each in form.files.items()})
        sent = _request_of(body, {name: f"sha256:{each.sha256}" for name, each in form.files.items()})
        answer, created = _submit(call, _Asked(render_id, body, stored, sent), key)
    except Unavailable:
        raise  # the commit may have been done all the same; if not, nobody names the files, and they are found by that
    except BaseException:
        uploads.drop(storage, keys)
        raise
    if not created:
        uploads.drop(storage, keys)
    return answer


def _request_of(body: RenderBody, files: dict[str, str]) -> RenderRequest:
    given = {name: getattr(body, name) for name in RenderRequest.model_fields}
    images = {**body.images, **{name: Image(artefact=key, url=None) for name, key in files.items()}}
    return validated(lambda: RenderRequest(**{**given, "images": images}), "body")


def _submit(call: Call, asked: _Asked, key: str | None) -> tuple[Answer, bool]:
    """The answer, and whether it is of a job that was not there before."""
    system, organization_id, body = call.system, call.organization_id, asked.body
    if body.callback_url is not None:
        jobs.check_url(body.callback_url, "callback_url", system.settings)
    new = NewJob(
        type=TYPE,
        payload=_payload(system, asked.sent),
        priority=body.priority,
        idempotency_key=key,
        correlation_id=body.correlation_id,
        callback_url=body.callback_url,
    )
    sent = system.prepare(organization_id, new)
    wanted = _checked(call, asked)
    # By what was sent, a repeated request is known again: its seeds are drawn anew, and its uploads lie elsewhere.
    prepared = dataclasses.replace(
        system.prepare(organization_id, dataclasses.replace(new, payload=_payload(system, wanted))),
        id=asked.id,
        known_by=sent.request_hash,
    )
    with system.transaction() as transaction:
        submitted = transaction.submit_prepared(organization_id, prepared)
    said = {"Location": f"/api/renders/{submitted.job.id}"}
    if not submitted.created:
        said["Idempotency-Replayed"] = "true"
    return Answer(_view(call, submitted.job), 202, said), submitted.created


def _checked(call: Call, asked: _Asked) -> RenderRequest:
    """The request with its version and seeds, once nothing is known to stand in its way. Raises Refused."""
    organization_id = call.organization_id
    try:
        with call.system.database.connection() as conn:
            wanted = requests.pinned(conn, organization_id, asked.request)
            prepared = requests.prepare(conn, organization_id, wanted)
    except InvalidRender as error:
        faults = [Fault(field=field, problem=problem, where="body") for field, problem in error.problems]
        raise Refused(422, str(error), errors=faults) from None
    for name, image in asked.body.images.items():  # those that were uploaded were looked at then
        _check_image(call, name, image)
    nodes = pool.known_nodes(call.system, wanted.pool, graphs.classes_of(prepared.graph))
    if nodes is not None:
        places = [(place.node, place.input) for place in prepared.images]
        _refuse(wanted, preflight.complaints(prepared.graph, nodes, places=places))
    return wanted


def _refuse(wanted: RenderRequest, found: list[Complaint]) -> None:
    """What the servers cannot run, all of it."""
    if not found:
        return
    whole = "graph" if wanted.workflow is None else "workflow"
    faults = [
        Fault(field=".".join(filter(None, (whole, each.node, each.input))), problem=each.message, where="body")
        for each in found
    ]
    more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
    said = f"the servers cannot render this: {faults[0].field}: {faults[0].problem}{more}"
    raise Refused(422, said, errors=faults)


def _check_image(call: Call, name: str, image: Image) -> None:
    system = call.system
    if image.url is not None:
        jobs.check_url(image.url, f"images.{name}.url", system.settings)
    if image.artefact is None:
        return
    field = f"images.{name}.artefact"
    stored = system.storage.stat(image.artefact)
    if stored is None:
        raise invalid(field, "is not there, or not kept any more")
    if stored.size > system.settings.render_image_max_bytes:
        raise invalid(field, f"is larger than {system.settings.render_image_max_bytes} bytes")
    try:
        head = b"".join(system.storage.read(image.artefact, end=min(stored.size, pictures.HEAD_BYTES)))
    except NotStored:
        raise invalid(field, "is not kept any more") from None
    if pictures.media_type(head) is None:
        raise invalid(field, "is no PNG, JPEG or WebP image")


def _payload(system: System, wanted: RenderRequest) -> dict[str, Any]:
    payload = wanted.model_dump(mode="json", exclude_defaults=True)
    if wanted.graph is not None and (size := graphs.size_of(wanted.graph)) > system.settings.job_payload_bytes:
        raise Refused(
            413,
            f"the graph has {size} bytes, and may have {system.settings.job_payload_bytes}; as a workflow"
            " (POST /api/workflows) it may be larger",
        )
    return payload


def _new_id() -> UUID:
    return new_id()


def _find(call: Call, render_id: UUID) -> Job:
    with call.system.database.connection() as conn:
        job = records.get(conn, call.sees, render_id)
    if job is None or job.type != TYPE:
        raise _unknown(render_id)
    return job


def _unknown(render_id: UUID) -> Refused:
    return Refused(404, f"there is no render {render_id}")


def _summary(job: Job, asked: dict[str, Any]) -> dict[str, Any]:
    error = job.error if job.state == "failed" else None
    return {
        "id": job.id,
        "organization_id": job.organization_id,
        "state": job.state,
        "workflow": asked.get("workflow"),
        "version": asked.get("version"),
        "pool": asked.get("pool") or "default",
        "progress": job.progress,
        "stage": job.stage,
        "error": JobError(code=error.get("code"), message=error.get("message", "it failed")) if error else None,
        "correlation_id": job.correlation_id,
        "created_at": job.created_at,
        "started_at": job.started_at,
        "finished_at": job.finished_at,
    }


def _view(call: Call, job: Job) -> RenderView:
    values = _summary(job, job.payload)
    if (live := call.services.seats.progress(job)) is not None:
        values["progress"], values["stage"] = live
    waiting, estimate = outlook.of(call, job, values["progress"])
    result = job.result if isinstance(job.result, dict) else {}
    said = result.get("provenance")
    return RenderView(
        **values,
        parameters=job.payload.get("parameters") or {},
        waiting=waiting,
        estimate=estimate,
        outputs=[_output(call, job, each) for each in result.get("outputs") or ()],
        provenance=ProvenanceView(**_known(said, ProvenanceView)) if said else None,
        cached=result.get("cached"),
        seconds=result.get("seconds"),
    )


def _output(call: Call, job: Job, said: dict[str, Any]) -> OutputView:
    values = _known(said, OutputView)
    for key, url in (("key", "url"), ("thumbnail_key", "thumbnail_url")):
        own = values[key] is not None and requests.is_own(job.organization_id, values[key])
        values[url] = call.system.links.sign(values[key]) if own else None
    return OutputView(**values)


def _known(said: dict[str, Any], view: type[View]) -> dict[str, Any]:
    return {name: said.get(name) for name in view.model_fields}
