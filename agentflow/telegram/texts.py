"""What the bot says. Russian to who has Telegram in Russian, English to everybody else."""

from __future__ import annotations

import json
from typing import Any, Final
from uuid import UUID

from agentflow.telegram.updates import Language

_SAID: Final[dict[str, tuple[str, str]]] = {
    "help": (
        "Send me a picture, and write under it what to make of it, such as “make it snow”. I show how far it is, and put the"
        " result in its place. As a file a picture comes to me uncompressed; several at once are one request.",
        "Пришлите картинку и подпишите, что с ней сделать, например «пусть пойдёт снег». Я покажу, как идут дела, и поставлю"
        " результат на место этого сообщения. Файлом картинка приходит ко мне без сжатия; несколько сразу — один запрос.",
    ),
    "ask": ("What shall I do with it? Write it to me, please.", "Что с ней сделать? Напишите, пожалуйста."),
    "dropped": ("Forgotten. Send another picture whenever you like.", "Забыто. Присылайте другую картинку."),
    "nothing_to_drop": ("There is nothing that waits for you.", "Ничего не ждёт вашего ответа."),
    "limit": (
        "I am working on {n} of your pictures already. Send me this one again when one of them is ready, please.",
        "Я уже работаю над вашими картинками ({n}). Пришлите эту ещё раз, когда одна из них будет готова, пожалуйста.",
    ),
    "too_large": (
        "This file is larger than the 20 MB that Telegram gives to bots. A smaller one, please.",
        "Этот файл больше 20 МБ: столько Telegram ботам не отдаёт. Пришлите поменьше, пожалуйста.",
    ),
    "too_many": (
        "Of an album I take the first pictures, no more than {n}.",
        "Из альбома я беру первые картинки, не больше {n}.",
    ),
    "not_a_picture": (
        "This is no picture that I can read. I take JPEG, PNG and WebP.",
        "Это не картинка, которую я могу прочесть. Я понимаю JPEG, PNG и WebP.",
    ),
    "queued_at": ("In the queue, place {n}.", "В очереди, место {n}."),
    "away": (
        "The renderer is away. Your picture is kept: it will be rendered as soon as it is back.",
        "Сервис рендеринга сейчас недоступен. Ваша картинка сохранена: она будет готова, как только он вернётся.",
    ),
    "rendering": ("Rendering …", "Рисую …"),
    "rendering_at": ("Rendering: {n} %", "Рисую: {n} %"),
    "sending": ("Ready: the picture is on its way.", "Готово: картинка уже в пути."),
    "done": ("Ready.", "Готово."),
    "failed": ("This did not work out. You may try again.", "Не получилось. Можно попробовать ещё раз."),
    "failed_memory": (
        "The renderer had too little memory for this. A smaller picture may work.",
        "Рендереру не хватило памяти. Попробуйте картинку поменьше.",
    ),
    "failed_timeout": ("This took too long, and was stopped.", "Это заняло слишком много времени и было остановлено."),
    "failed_refused": (
        "The renderer does not take this request. Whoever runs this bot has to look at it.",
        "Рендерер не принимает такой запрос. Это должен посмотреть владелец бота.",
    ),
    "too_large_to_send": (
        "Ready, but the result is larger than Telegram takes from bots ({n} MB).",
        "Готово, но результат больше, чем Telegram принимает от ботов ({n} МБ).",
    ),
    "cancelled": ("Cancelled.", "Отменено."),
    "too_late": ("Too late: it is over already.", "Поздно: уже всё."),
    "not_yours": ("This is somebody else's picture.", "Это чужая картинка."),
    "forgotten": ("This is not kept any more.", "Это больше не хранится."),
    "again_taken": ("Once more, with another seed.", "Ещё раз, с другим зерном."),
    "file_coming": ("The file is on its way.", "Файл уже в пути."),
    "button_again": ("Again", "Ещё раз"),
    "button_cancel": ("Cancel", "Отменить"),
    "button_file": ("As a file", "Файлом"),
}

_OF_ERRORS: Final = {
    "render_out_of_memory": "failed_memory",
    "render_timeout": "failed_timeout",
    "time_limit": "failed_timeout",
    "render_refused": "failed_refused",
    "render_invalid": "failed_refused",
    "not_configured": "failed_refused",
    "render_bad_image": "not_a_picture",
    "render_image_gone": "forgotten",
}


def say(name: str, language: Language, **values: object) -> str:
    return _SAID[name][language == "ru"].format(**values)


def failure(error: dict[str, Any] | None, language: Language) -> str:
    """Of a job's error: what people can do about it."""
    return say(_OF_ERRORS.get(str((error or {}).get("code")), "failed"), language)


def buttons(request_id: UUID, language: Language, *actions: str) -> dict[str, Any]:
    """An inline keyboard of one row; none: one without a button. `again`, `cancel`, `file`."""
    row = [{"text": say(f"button_{each}", language), "callback_data": f"{each}:{request_id.hex}"} for each in actions]
    return {"inline_keyboard": [row] if row else []}


def as_shown(text: str, markup: dict[str, Any]) -> str:
    """What tells two states of a message apart."""
    return json.dumps([text, markup], sort_keys=True)
