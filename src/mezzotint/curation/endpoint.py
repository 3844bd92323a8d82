"""Captions by a server that speaks OpenAI's protocol of chat: one's own (vLLM, llama.cpp, ...) or a paid one.

One request asks for all captions of a picture, so its pixels are read once. Whatever a server sends back is a caption, or an error in the
row's column, or ends the run in one line: it never raises anything else, and what came before it is kept.
"""

import base64
import io
import json
import os
import random
import threading
import time
from dataclasses import dataclass
from typing import Any

from PIL import Image

from mezzotint.curation.caption import Captioner, Estimate, Said, Say, tidy
from mezzotint.errors import UserError
from mezzotint.text.chat import ChatError, Server

LONGEST_WAIT = 60.0  # seconds between two tries
TOKENS_A_WORD = 1.4
UNFIT = (400, 413, 415, 422)  # codes of HTTP that speak of one picture, not of the server
JUNK = 2  # answers without captions, each of which is paid, until a picture is given up


@dataclass
class Endpoint(Captioner, kind="endpoint captioner"):
    """url: up to and without /chat/completions, https unless it is this machine. key: the environment variable that holds it, "" for none.

    side: pixels of the longer side of the picture that is sent. timeout: seconds for an answer. tries: of one picture; the first wait
    between two is `wait` seconds, and doubles. per_minute: requests of one worker. requests: how many at once. picture_tokens: what a
    picture counts for; input_price, output_price: dollars for a million tokens, of the provider's list.
    """

    url: str = ""
    model: str = ""
    key: str = "OPENAI_API_KEY"
    instruction: str = (
        "Describe this picture, and only what is visible in it. Answer with JSON alone: "
        '{{"short": [{short} different captions of at most ten words], "long": [{long} different captions of a few sentences]}}'
    )
    side: int = 512
    temperature: float = 0.8
    timeout: float = 60.0
    tries: int = 5
    wait: float = 1.0
    per_minute: float = 600.0
    requests: int = 8
    picture_tokens: int = 800
    input_price: float = 0.0
    output_price: float = 0.0
    free = ("key", "timeout", "tries", "wait", "per_minute", "requests", "picture_tokens", "input_price", "output_price")

    @property
    def at_once(self) -> int:  # type: ignore[override]
        return self.requests

    def build(self) -> Say:
        self._check()
        key = os.environ.get(self.key, "") if self.key else ""
        if self.key and not key:
            raise UserError(f"the environment variable {self.key!r} holds no key; set it, or set key to '' for a server that needs none")
        server, pace = Server.at(self.url, key, self.key), Pace(self.per_minute)

        def say(image: Image.Image) -> Said:
            junk, failed = 0, ChatError("was not asked")
            for tried in range(self.tries):
                pace.wait()
                try:
                    return _read(server.ask(_body(self, image), self.timeout), self)
                except ChatError as error:
                    failed = error
                if failed.code and failed.code not in UNFIT and not failed.again:
                    raise UserError(f"{self.url} {failed}; check url, model, and the key in {self.key!r}")
                junk += not failed.again
                if failed.code in UNFIT or junk == JUNK:
                    return Said(error=f"the server {failed}")
                if tried + 1 < self.tries:
                    time.sleep(min(LONGEST_WAIT, max(failed.wait, self.wait * 2**tried)) * random.uniform(1.0, 1.2))
            raise UserError(f"{self.url} {failed}; the same command goes on from here")

        return say

    def estimate(self, rows: int) -> Estimate:
        read = rows * (self.picture_tokens + round(TOKENS_A_WORD * len(self.instruction.split())))
        written = super().estimate(rows).tokens_out
        return Estimate(rows, read, written, (read * self.input_price + written * self.output_price) / 1e6)

    def _check(self) -> None:
        if not self.model:
            raise UserError("a server needs the name of a model; set model")
        if self.tries < 1 or self.per_minute <= 0 or self.requests < 1 or self.timeout <= 0:
            raise ValueError("tries and requests must be at least 1, per_minute and timeout above 0")


class Pace:
    """At most so many turns a minute, evenly spaced, for all threads."""

    def __init__(self, per_minute: float) -> None:
        self.every, self.next, self.lock = 60 / per_minute, 0.0, threading.Lock()

    def wait(self) -> None:
        """Until it is one's turn."""
        with self.lock:
            now = time.monotonic()
            turn = max(now, self.next)
            self.next = turn + self.every
        time.sleep(turn - now)


def _body(to: Endpoint, image: Image.Image) -> dict[str, Any]:
    small, file = image.copy(), io.BytesIO()
    small.thumbnail((to.side, to.side), Image.Resampling.LANCZOS)
    small.save(file, "JPEG", quality=90)
    picture = f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"
    text = to.instruction.format(short=to.short, long=to.long)
    content = [{"type": "image_url", "image_url": {"url": picture}}, {"type": "text", "text": text}]
    return {
        "model": to.model,
        "messages": [{"role": "user", "content": content}],
        "max_tokens": 2 * to.estimate(1).tokens_out,  # JSON takes some
        "temperature": to.temperature,
        "seed": to.seed,
        "response_format": {"type": "json_object"},
    }


def _read(text: str, to: Endpoint) -> Said:
    """The captions in an answer, as many as were asked for. `ChatError` where there are none."""
    try:
        found = json.loads(text[text.index("{") : text.rindex("}") + 1])
        short, long = (tidy([x for x in found.get(kind, []) if isinstance(x, str)])[:most] for kind, most in _kinds(to))
    except (ValueError, TypeError, AttributeError, RecursionError):
        raise ChatError("answered without captions") from None
    if (to.short and not short) or (to.long and not long):
        raise ChatError("answered with too few captions")
    return Said(short, long)


def _kinds(to: Endpoint) -> tuple[tuple[str, int], ...]:
    return ("short", to.short), ("long", to.long)
