"""What is said: each chunk of sound to a recogniser, and its words put on the time line of the video.

Chunks end in pauses, so mostly they are put one behind the other. Where there was no pause, the next chunk begins a little
before the end of this one, and both have the words in between: they are matched, and the seam goes through a word that both
heard alike, so that none is lost or doubled though the two disagree about its time.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any, Final

from agentflow.models import Transcription, Word, answers
from agentflow.models.asking import Answer, Asking, status_of

#: How far two hearings of a word may lie apart; and how far outside of what both chunks have one may seem to lie.
_APART_S: Final = 0.6
_BESIDE_S: Final = 0.3
#: A segment, as a subtitle is read: ends with a sentence or in a pause, and lasts at most so long.
_PAUSE_S: Final = 0.8
_LONGEST_S: Final = 8.0
_SENTENCE_END: Final = (".", "?", "!", "…", "。", "？", "！")
_WITHOUT_SPACES: Final = frozenset({"zh", "chinese", "ja", "japanese", "th", "thai", "yue", "cantonese"})
_NOT_OF_WORDS: Final = re.compile(r"[^\w']+")


@dataclass(frozen=True)
class Heard:
    """A chunk's place in the video and its words in the video's time. Its first `overlap_s` are the end of the one before."""

    start_s: float
    end_s: float
    overlap_s: float
    words: tuple[Word, ...]


def transcript(
    asking: Asking,
    analysis: dict[str, Any],
    fetch: Callable[[dict[str, Any], Path], Path],
    folder: Path,
    report: Callable[[float], None],
) -> dict[str, Any]:
    """The field `transcript`, from the chunks in the analysis' field `speech`. Raises Wait."""
    chunks = (analysis.get("speech") or {}).get("chunks")
    if not chunks:
        return {"status": "none", "reason": "the video has no sound"}
    model = asking.models.endpoint("transcription").model

    def ask(chunk: dict[str, Any]) -> Answer:
        path = fetch(chunk, folder)
        key = answers.key_of("heard", model, path.read_bytes())
        answer = asking.one(key, lambda: _plain(asking.models.transcribe(asking.context, path)))
        if path.parent == folder:  # fetched for this
            path.unlink()
        return answer

    found = asking.each(chunks, ask, report)
    status = status_of(found)
    if status == "failed":
        return found[0].failed
    language = next((a.value["language"] for a in found if a.error is None and a.value["language"]), None)
    heard = [_heard(chunk, answer.value) for chunk, answer in zip(chunks, found, strict=True) if answer.error is None]
    words = stitch(heard)
    said: dict[str, Any] = {"status": status, "language": language}
    if status == "partial":
        failed = [(chunk, answer) for chunk, answer in zip(chunks, found, strict=True) if answer.error]
        said["reason"] = failed[0][1].failed["reason"]
        said["missing"] = [
            {"start_s": chunk["start_s"], "end_s": chunk["end_s"], **answer.failed} for chunk, answer in failed
        ]
    joint = "" if language in _WITHOUT_SPACES else " "
    said["segments"] = [
        {
            "start_s": round(group[0].start_s, 3),
            "end_s": round(group[-1].end_s, 3),
            "text": joint.join(word.text for word in group),
        }
        for group in grouped(words)
    ]
    said["words"] = [[round(word.start_s, 3), round(word.end_s, 3), word.text] for word in words]
    return said


def _plain(heard: Transcription) -> dict[str, Any]:
    return {
        "text": heard.text,
        "language": heard.language,
        "segments": [[s.start_s, s.end_s, s.text] for s in heard.segments],
        "words": [[w.start_s, w.end_s, w.text] for w in heard.words],
    }


def _heard(chunk: dict[str, Any], answer: dict[str, Any]) -> Heard:
    lasts_s = chunk["end_s"] - chunk["start_s"]
    words = timed_words(
        answer["text"],
        [Word(text, start, end) for start, end, text in answer["segments"]],
        [Word(text, start, end) for start, end, text in answer["words"]],
        lasts_s,
    )
    # Recognisers now and then put a word behind the end of what they heard.
    placed = tuple(
        Word(word.text, chunk["start_s"] + min(word.start_s, lasts_s), chunk["start_s"] + min(word.end_s, lasts_s))
        for word in words
    )
    return Heard(chunk["start_s"], chunk["end_s"], chunk["overlap_s"], placed)


def timed_words(text: str, segments: Sequence[Word], words: Sequence[Word], lasts_s: float) -> list[Word]:
    """The words of the text with their times, from whatever the recogniser gave: times of words (which come without the
    text's punctuation), of segments, or none."""
    if not words:
        spans = [span for span in segments if span.text] or ([Word(text, 0.0, lasts_s)] if text else [])
        return [word for span in spans for word in _spread(span.text.split(), span.start_s, span.end_s)]
    tokens = text.split()
    if len(tokens) * 2 < len(words):  # a script without spaces, or no text
        return [word for word in words if word.text]
    timed: list[Word] = []
    matcher = SequenceMatcher(
        None, [_bare(word.text) for word in words], [_bare(token) for token in tokens], autojunk=False
    )
    for _, from_word, to_word, from_token, to_token in matcher.get_opcodes():
        if to_word - from_word == to_token - from_token:
            timed += [
                replace(word, text=token)
                for word, token in zip(words[from_word:to_word], tokens[from_token:to_token], strict=True)
            ]
        elif from_token < to_token:
            start_s = words[from_word].start_s if from_word < to_word else words[max(0, from_word - 1)].end_s
            end_s = words[to_word - 1].end_s if from_word < to_word else words[min(to_word, len(words) - 1)].start_s
            timed += _spread(tokens[from_token:to_token], start_s, max(start_s, end_s))
    return timed


def _spread(tokens: Sequence[str], start_s: float, end_s: float) -> list[Word]:
    """Words without times share a span by their length."""
    letters = sum(len(token) for token in tokens)
    spread, at_s = [], start_s
    for token in tokens:
        until_s = at_s + (end_s - start_s) * len(token) / letters
        spread.append(Word(token, at_s, until_s))
        at_s = until_s
    return spread


def stitch(chunks: Sequence[Heard]) -> list[Word]:
    """The words of all chunks in order, each once."""
    words: list[Word] = []
    for chunk in chunks:
        if chunk.overlap_s > 0 and words:
            left, right = _seam(words, chunk)
            words = [*words[:left], *chunk.words[right:]]
        else:
            words += chunk.words
    return words


def _seam(before: Sequence[Word], chunk: Heard) -> tuple[int, int]:
    """How many of the words before stay, and from which of the chunk's words on it goes on."""
    until_s = chunk.start_s + chunk.overlap_s
    middle_s = chunk.start_s + chunk.overlap_s / 2
    first = next((i for i, word in enumerate(before) if _middle(word) >= chunk.start_s - _BESIDE_S), len(before))
    ours = before[first:]
    theirs = [word for word in chunk.words if _middle(word) <= until_s + _BESIDE_S]
    if pairs := _pairs(ours, theirs):
        a, b = min(pairs, key=lambda pair: abs(_middle(ours[pair[0]]) - middle_s))
        return first + a + 1, b + 1
    left = next((i for i, word in enumerate(before) if _middle(word) >= middle_s), len(before))
    right = next((i for i, word in enumerate(chunk.words) if _middle(word) >= middle_s), len(chunk.words))
    return left, right


def _pairs(ours: Sequence[Word], theirs: Sequence[Word]) -> list[tuple[int, int]]:
    """Which words are the same ones: the common subsequence of the greatest weight, where what is closer in time counts more; so
    a word that is said three times is not taken for its neighbour."""
    best: dict[tuple[int, int], tuple[float, list[tuple[int, int]]]] = {}
    nothing: tuple[float, list[tuple[int, int]]] = (0.0, [])
    for i, ours_one in enumerate(ours):
        for j, theirs_one in enumerate(theirs):
            found = max(best.get((i - 1, j), nothing), best.get((i, j - 1), nothing), key=lambda each: each[0])
            apart_s = abs(_middle(ours_one) - _middle(theirs_one))
            if apart_s < _APART_S and _bare(ours_one.text) == _bare(theirs_one.text):
                score, before = best.get((i - 1, j - 1), nothing)
                weight = score + 1 - apart_s / _APART_S
                if weight > found[0]:
                    found = (weight, [*before, (i, j)])
            best[i, j] = found
    return best.get((len(ours) - 1, len(theirs) - 1), nothing)[1]


def _middle(word: Word) -> float:
    return (word.start_s + word.end_s) / 2


def _bare(text: str) -> str:
    return _NOT_OF_WORDS.sub("", text.casefold()) or text


def grouped(words: Sequence[Word]) -> list[list[Word]]:
    """Words as they are shown together."""
    groups: list[list[Word]] = []
    for word in words:
        last = groups[-1] if groups else None
        if (
            last is None
            or word.start_s - last[-1].end_s > _PAUSE_S
            or word.end_s - last[0].start_s > _LONGEST_S
            or last[-1].text.endswith(_SENTENCE_END)
        ):
            groups.append([word])
        else:
            last.append(word)
    return groups


def files(said: dict[str, Any], store: Callable[[str, bytes, str], str]) -> dict[str, Any]:
    """Moves the words out of the result, which has a limit, into a file; and the segments into one for players, too."""
    words = json.dumps({"language": said["language"], "words": said.pop("words")}, ensure_ascii=False).encode()
    return {
        "words": {"file": "transcript.json", "key": store("transcript.json", words, "application/json")},
        "subtitles": {
            "file": "transcript.vtt",
            "key": store("transcript.vtt", webvtt(said["segments"]).encode(), "text/vtt"),
        },
    }


def webvtt(segments: Sequence[dict[str, Any]]) -> str:
    """https://www.w3.org/TR/webvtt1/"""
    cues = [
        f"{_clock(segment['start_s'])} --> {_clock(max(segment['end_s'], segment['start_s'] + 0.001))}\n"
        + segment["text"].replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
        for segment in segments
    ]
    return "\n\n".join(["WEBVTT", *cues]) + "\n"


def _clock(seconds: float) -> str:
    thousandths = max(0, round(seconds * 1000))
    return f"{thousandths // 3_600_000:02}:{thousandths // 60_000 % 60:02}:{thousandths // 1000 % 60:02}.{thousandths % 1000:03}"
