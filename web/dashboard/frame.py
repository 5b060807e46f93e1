"""What every page of the dashboard has: who is signed in, the form token, language and theme, headers, errors as pages.

A page is a function that takes a Visit and answers one of its `page`, `part` or `go`:

    pages = Pages()

    @pages.get("/jobs")
    def jobs(visit: Visit) -> Response:
        return visit.page("jobs.html", found=…)

    @pages.post("/jobs/<uuid:job_id>/cancel", scope="manage")     # comes with the form token, or is 403
"""

from __future__ import annotations

import hashlib
import hmac
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeVar
from urllib.parse import quote, unquote, urlsplit

from flask import Blueprint, Flask, Response, g, make_response, redirect, render_template, request, url_for
from werkzeug.exceptions import NotFound

import agentflow
from agentflow import organizations, sessions
from agentflow.database import Unavailable
from agentflow.organizations import DEFAULT_ORGANIZATION, SCOPES, Organization
from agentflow.sessions import Session
from web import problems
from web.access import Caller, Needed
from web.api import Call, Services
from web.dashboard import shown, words
from web.problems import Refused

COOKIE: Final = "agentflow_session"
THEME_COOKIE: Final = "agentflow_theme"
LANGUAGE_COOKIE: Final = "agentflow_language"
#: What came of a change, for the page that it leads to.
SAID_COOKIE: Final = "agentflow_said"
PREFIX: Final = "/dashboard"
#: No script and no style but our files; nothing from elsewhere. Pictures come by signed links, which a store may answer itself.
POLICY: Final = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'{stores}; connect-src 'self'; font-src 'self';"
    " form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)
#: What stands in the menu, in its order: endpoint, name, icon, key.
SECTIONS: Final = (
    ("overview", "Overview", "overview", "o"),
    ("jobs", "Jobs", "jobs", "j"),
    ("dead_letters", "Dead letters", "dead", "d"),
    ("webhooks", "Webhooks", "webhooks", "w"),
    ("renders", "Renders", "renders", "i"),
    ("knowledge", "Knowledge", "knowledge", "k"),
    ("crm", "CRM", "crm", "c"),
    ("limits", "Limits", "limits", "l"),
    ("schedules", "Schedules", "schedules", "s"),
    ("runbook", "Runbook", "runbook", "r"),
)
_MOST_ORGANIZATIONS: Final = 500
_YEAR_S: Final = 365 * 86_400
_FORM_BYTES: Final = 1 << 16
_SAID_S: Final = 30

Function = TypeVar("Function", bound=Callable[..., Any])


@dataclass(frozen=True, slots=True)
class Visit(Call):
    """A request for a page by somebody who is signed in."""

    session: Session
    token: str
    organization: Organization | None = None  # the one that the operator looks at, of all

    @property
    def is_operator(self) -> bool:
        return self.session.organization_id is None

    @property
    def form_token(self) -> str:
        return sessions.form_token(self.token)

    def may(self, scope: Needed) -> bool:
        assert self.caller is not None  # noqa: S101 - every visit has one
        return scope in self.caller.scopes

    def organizations(self) -> list[Organization]:
        """To choose from; empty for who has one."""
        if not self.is_operator:
            return []
        with self.system.database.connection() as conn:
            return organizations.every(conn, limit=_MOST_ORGANIZATIONS)

    def page(self, template: str, status: int = 200, **values: Any) -> Response:
        return html(render_template(template, visit=self, **values), status)

    def part(self, template: str, **values: Any) -> Response:
        """A piece of a page. 204 where the browser has it as it is: nothing is drawn anew, and no focus is lost."""
        text = render_template(template, visit=self, **values)
        digest = hashlib.sha256(text.encode()).hexdigest()[:16]
        if request.headers.get("X-Seen") == digest:
            return Response(status=204, headers={"X-Part": digest})
        answer = html(text)
        answer.headers["X-Part"] = digest
        return answer

    def go(self, endpoint: str, said: str | None = None, **values: Any) -> Response:
        """To another page after a change; `said` is shown there once."""
        answer = to(link(endpoint, **values))
        if said is not None:
            answer.set_cookie(
                SAID_COOKIE,
                quote(said),
                max_age=_SAID_S,
                path=PREFIX,
                httponly=True,
                samesite="Strict",
                secure=is_secure(),
            )
        return answer


@dataclass(frozen=True, slots=True)
class Declared:
    method: str
    path: str
    function: Callable[..., Any]
    scope: Needed | None
    max_bytes: int | None


class Pages:
    """The pages of one module, gathered by its decorators."""

    def __init__(self) -> None:
        self.found: list[Declared] = []

    def get(self, path: str, *, scope: Needed | None = "read") -> Callable[[Function], Function]:
        """`scope` None: for whoever comes; the function takes the Services."""
        return self._add("GET", path, scope, 0)

    def post(
        self, path: str, *, scope: Needed | None, max_bytes: int | None = _FORM_BYTES
    ) -> Callable[[Function], Function]:
        """`max_bytes` None: the function reads the body itself, as it comes, and the form token comes as a header."""
        return self._add("POST", path, scope, max_bytes)

    def _add(
        self, method: str, path: str, scope: Needed | None, max_bytes: int | None
    ) -> Callable[[Function], Function]:
        def declare(function: Function) -> Function:
            self.found.append(Declared(method, path, function, scope, max_bytes))
            return function

        return declare


def install(app: Flask, services: Services, groups: Iterable[Pages]) -> None:
    blueprint = Blueprint("dashboard", __name__, url_prefix=PREFIX, static_folder="static", template_folder="templates")
    stores = _stores(services)
    for group in groups:
        for page in group.found:
            blueprint.add_url_rule(
                page.path,
                page.function.__name__,
                _view(services, page),
                methods=[page.method],
                provide_automatic_options=False,
            )

    @blueprint.route("/<path:_rest>", provide_automatic_options=False)
    def nowhere(_rest: str) -> Response:
        raise NotFound

    @blueprint.after_request
    def finish(response: Response) -> Response:
        if response.mimetype == problems.MEDIA_TYPE:
            response = _problem_page(response)
        if request.endpoint == "dashboard.static" and response.status_code < 400:
            # Named with a digest of its content, it never changes.
            response.headers["Cache-Control"] = (
                f"public, max-age={_YEAR_S}, immutable" if request.args.get("v") else "no-cache"
            )
        response.headers["Content-Security-Policy"] = POLICY.format(stores=stores)
        response.headers["Referrer-Policy"] = "same-origin"
        response.headers["Cross-Origin-Opener-Policy"] = "same-origin"
        response.headers["Permissions-Policy"] = "camera=(), microphone=(), geolocation=()"
        if g.get("said"):
            response.delete_cookie(SAID_COOKIE, path=PREFIX)
        chosen = request.args.get("language")
        if chosen in words.LANGUAGES:
            _remember(response, LANGUAGE_COOKIE, chosen)
        return response

    app.register_blueprint(blueprint)
    shown.install(app.jinja_env)
    app.jinja_env.globals.update(
        _=words.say,
        plural=words.plural,
        link=link,
        file=_file,
        sections=SECTIONS,
        version=agentflow.__version__,
        languages=words.LANGUAGES,
        language=language,
        theme=_theme,
        current=current,
        said=_said,
        now=shown.now,
    )
    app.jinja_env.trim_blocks = app.jinja_env.lstrip_blocks = True


def _view(services: Services, page: Declared) -> Callable[..., Response]:
    def view(**arguments: Any) -> Response:
        if page.method == "POST":
            request.max_content_length = page.max_bytes
            request.max_form_memory_size = page.max_bytes
        if page.scope is None:
            answer: Response = page.function(services, **arguments)
            return answer
        visit = visitor(services)
        if visit is None:
            return _to_sign_in()
        if page.method == "POST":
            given = request.headers.get("X-Form-Token", "")
            if not given and page.max_bytes is not None:
                given = request.form.get("form_token", "")
            if not hmac.compare_digest(given.encode(), visit.form_token.encode()):
                raise Refused(
                    403, words.say("This form is of another session. Load the page again, and then try once more.")
                )
        if not visit.may(page.scope):
            raise Refused(403, words.say("Your key lacks the scope {scope}.", scope=page.scope))
        made: Response = page.function(visit, **arguments)
        return made

    return view


def visitor(services: Services) -> Visit | None:
    """Who is signed in, and whose rows he looks at. None: nobody."""
    token = request.cookies.get(COOKIE, "")
    if not token:
        return None
    with services.system.database.connection() as conn:
        session = sessions.find(conn, token, services.access.operator_key)
        if session is None:
            return None
        named = request.args.get("organization") if session.organization_id is None else None
        organization = organizations.find(conn, named) if named else None
    if named and organization is None:
        raise Refused(404, words.say("There is no organization {name}.", name=named))
    if session.organization_id is None:
        number = organization.id if organization else None
        caller = Caller(number or DEFAULT_ORGANIZATION, number, frozenset((*SCOPES, "admin")))
    else:
        scopes: Any = session.scopes
        caller = Caller(session.organization_id, session.organization_id, frozenset(scopes))
    g.caller = caller
    visit = Visit(services, caller, session, token, organization)
    g.visit = visit
    return visit


def _to_sign_in() -> Response:
    if request.headers.get("HX-Request"):  # a part of a page cannot become another page by itself
        return Response(status=401, headers={"HX-Redirect": link("sign_in")})
    wanted = request.full_path.rstrip("?") if request.method == "GET" else None
    return to(link("sign_in", next=wanted if wanted != PREFIX else None))


def to(address: str) -> Response:
    if request.headers.get("HX-Request"):
        return Response(status=204, headers={"HX-Redirect": address})
    answer = redirect(address, 303)
    assert isinstance(answer, Response)  # noqa: S101 - flask's own class
    return answer


def _problem_page(answer: Response) -> Response:
    """A problem document as a page, or as one line where a part of a page was asked for."""
    document = json.loads(answer.get_data())
    template = "problem_line.html" if request.headers.get("HX-Request") else "problem.html"
    try:
        page = html(render_template(template, visit=g.get("visit"), problem=document), answer.status_code)
    except Unavailable:  # the frame names organizations
        page = html(render_template(template, visit=None, problem=document), answer.status_code)
    for name in ("Retry-After",):
        if name in answer.headers:
            page.headers[name] = answer.headers[name]
    return page


def html(text: str, status: int = 200) -> Response:
    return make_response(text, status, {"Content-Type": "text/html; charset=utf-8"})


def link(endpoint: str, **values: Any) -> str:
    """The address of a page; the organization that the operator chose goes along."""
    visit: Visit | None = g.get("visit")
    if visit is not None and visit.organization is not None and "organization" not in values:
        values["organization"] = visit.organization.slug
    return url_for(
        f"dashboard.{endpoint}", **{name: value for name, value in values.items() if value not in (None, "")}
    )


_digests: dict[str, str] = {}


def _file(name: str) -> str:
    if name not in _digests:
        _digests[name] = hashlib.sha256((Path(__file__).parent / "static" / name).read_bytes()).hexdigest()[:12]
    return f"{PREFIX}/static/{quote(name)}?v={_digests[name]}"


def _said() -> str:
    """Once."""
    g.said = unquote(request.cookies.get(SAID_COOKIE, ""))
    return str(g.said)


def current() -> str:
    """The endpoint of this page, without the blueprint's name."""
    return (request.endpoint or "").removeprefix("dashboard.")


def language() -> str:
    chosen = request.args.get("language") or request.cookies.get(LANGUAGE_COOKIE)
    if chosen in words.LANGUAGES:
        return str(chosen)
    return request.accept_languages.best_match(list(words.LANGUAGES)) or "en"


def _theme() -> str | None:
    """What was chosen; None: as the system has it."""
    found = request.cookies.get(THEME_COOKIE)
    return found if found in ("light", "dark") else None


def _remember(response: Response, name: str, value: str) -> None:
    response.set_cookie(name, value, max_age=_YEAR_S, path=PREFIX, samesite="Strict", secure=is_secure())


def is_secure() -> bool:
    """Whether the browser speaks TLS, to us or to a proxy. Who lies about it gets a cookie that he cannot use."""
    return request.is_secure or request.headers.get("X-Forwarded-Proto", "").split(",")[0].strip() == "https"


def _stores(services: Services) -> str:
    """Where signed links to files may lead: a store of the installation that hands out addresses of its own."""
    settings = services.system.settings
    url = urlsplit(settings.supabase_url or "")
    return f" https://{url.netloc}" if settings.supabase_key is not None and url.scheme == "https" else ""
