"""The documentation page: Swagger UI from files of a package, so that it works without the internet."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Final

from flask import Flask, Response, abort

from web import openapi
from web.api import Routes

#: Of the package only these files are used: importing it would load 9 MB of three such pages into memory.
_FILES: Final = {"swagger_bundle.js": "text/javascript", "swagger_style.css": "text/css"}
_START: Final = """\
window.onload = () => SwaggerUIBundle({url: "/openapi.json", dom_id: "#docs", deepLinking: true, validatorUrl: null});
"""
_PAGE: Final = """\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>AgentFlow API</title>
<link rel="icon" href="data:,">
<link rel="stylesheet" href="/docs/swagger_style.css">
</head>
<body>
<div id="docs">
<noscript>This page needs JavaScript; the document itself is <a href="/openapi.json">/openapi.json</a>.</noscript>
</div>
<script src="/docs/swagger_bundle.js"></script>
<script src="/docs/start.js"></script>
</body>
</html>
"""
_POLICY: Final = "default-src 'self'; img-src 'self' data:; style-src 'self' 'unsafe-inline'; frame-ancestors 'none'"


def install(app: Flask, routes: Iterable[Routes]) -> None:
    groups = list(routes)
    made: list[str] = []

    def document() -> Response:
        if not made:  # types of jobs do not stand in it: it is the same for the life of the process
            made.append(json.dumps(openapi.document(groups)))
        return Response(made[0], content_type="application/json")

    def page() -> Response:
        return Response(_PAGE, content_type="text/html; charset=utf-8", headers={"Content-Security-Policy": _POLICY})

    def file(name: str) -> Response:
        if name == "start.js":
            return Response(_START, content_type="text/javascript")
        if name not in _FILES:
            abort(404)
        data = (_folder() / name).read_bytes()
        return Response(data, content_type=f"{_FILES[name]}; charset=utf-8", headers={"Cache-Control": "max-age=86400"})

    for path, view in (("/openapi.json", document), ("/docs", page), ("/docs/<name>", file)):
        app.add_url_rule(path, view_func=view, methods=["GET"], provide_automatic_options=False)


@cache
def _folder() -> Path:
    spec = importlib.util.find_spec("offapi")
    if spec is None or spec.origin is None:
        abort(404)
    return Path(spec.origin).parent
