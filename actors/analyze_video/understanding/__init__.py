"""What a video is about, by models: captions, text on the screen, the transcript, chapters, summary, tags.

Runs in the worker after the child has found the shots. Each part is a field of the result with a `status`:

    done             all of it is there
    partial          some of its items failed; each says why
    failed           `reason` says why; the other parts are there
    none             there is nothing of that kind (a video without sound has no transcript)
    not_configured   `reason` says what to set

A limit with a time parks the job; a failure that may pass fails the attempt, as long as there is another one. Neither asks
again for what was answered: answers are kept by what was asked.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from actors.analyze_video.understanding import captions, story, transcript
from agentflow.models import Models, NotConfigured
from agentflow.models.asking import Asking
from agentflow.worker.running import JobContext

#: The parts, and how much of this stage's time each may take.
_SHARES: Final = {"transcript": 0.4, "captions": 0.4, "story": 0.2}


def wanted(models: Models) -> bool:
    """Whether any model is configured."""
    return _missing(models, "chat") is None or wants_speech(models)


def wants_speech(models: Models) -> bool:
    return _missing(models, "transcription") is None


def understand(
    context: JobContext,
    analysis: dict[str, Any],
    fetch: Callable[[dict[str, Any], Path], Path],
    store: Callable[[str, bytes, str], str],
    *,
    share_done: float,
) -> dict[str, Any]:
    """The fields captions, screen_text, transcript, chapters, summary and tags of an analysis.

    `fetch(file, folder)` gives the local path of one of the analysis' files, `store(name, data, content_type)` keeps a new
    one and returns its key. Progress goes on from `share_done`. Raises `Wait` and `Transient` as the module says.
    """
    models = context.system.models
    asking = Asking(context, models)

    def report(part: str) -> Callable[[float], None]:
        before = sum(share for name, share in _SHARES.items() if list(_SHARES).index(name) < list(_SHARES).index(part))
        return lambda done: context.progress(share_done + (1 - share_done) * (before + _SHARES[part] * done), part)

    with tempfile.TemporaryDirectory(prefix="agentflow-understanding-") as name:
        folder = Path(name)
        heard, seen = _missing(models, "transcription"), _missing(models, "vision")
        fields = {"transcript": heard or transcript.transcript(asking, analysis, fetch, folder, report("transcript"))}
        fields |= seen or captions.captions(asking, analysis, fetch, folder, report("captions"))
        if seen is not None:
            fields = {"transcript": fields["transcript"], "captions": seen, "screen_text": seen}
    asking.try_again_if_it_may_help()
    told = _missing(models, "chat")
    fields |= dict.fromkeys(story.PARTS, told) if told else story.story(asking, analysis, fields, report("story"))
    asking.try_again_if_it_may_help()
    if fields["transcript"]["status"] in ("done", "partial"):
        fields["transcript"] |= transcript.files(fields["transcript"], store)
    return fields


def _missing(models: Models, kind: Any) -> dict[str, Any] | None:
    try:
        models.endpoint(kind)
    except NotConfigured as error:
        return {"status": "not_configured", "reason": str(error)}
    return None
