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
from urllib import error as errors
from urllib import parse, request

from PIL import Image

from mezzotint.curation.caption import Captioner, Estimate, Said, Say, tidy
from mezzotint.errors import UserError

HERE = ("localhost", "127.0.0.1", "::1")
LONGEST = 1 << 20  # bytes of an answer
LONGEST_WAIT = 60.0  # seconds between two tries
TOKENS_A_WORD = 1.4
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
        pace = Pace(self.per_minute)

        def say(image: Image.Image) -> Said:
            junk = 0
            for tried in range(self.tries):
                pace.wait()
                try:
                    return _read(_ask(self, key, image), self)
                except _UselessError as useless:
                    junk += 1
                    if useless.final or junk == JUNK:
                        return Said(error=str(useless))
                    reason, least = str(useless), 0.0
                except _AgainError as again:
                    reason, least = str(again), again.wait
                if tried + 1 < self.tries:
                    time.sleep(min(LONGEST_WAIT, max(least, self.wait * 2**tried)) * random.uniform(1.0, 1.2))
            raise UserError(f"{self.url} does not answer ({reason}); the same command goes on from here")

        return say

    def estimate(self, rows: int) -> Estimate:
        read = rows * (self.picture_tokens + round(TOKENS_A_WORD * len(self.instruction.split())))
        written = super().estimate(rows).tokens_out
        return Estimate(rows, read, written, (read * self.input_price + written * self.output_price) / 1e6)

    def _check(self) -> None:
        url = parse.urlsplit(self.url)
        if url.scheme != "https" and not (url.scheme == "http" and url.hostname in HERE):
            raise UserError(f"the address of a captioner must begin with https://, or be on this machine, not {self.url!r}; set url")
        if not self.model:
            raise UserError("a server needs the name of a model; set model")
        if self.tries < 1 or self.per_minute <= 0 or self.requests < 1 or self.timeout <= 0:
            raise ValueError("tries and requests must be at least 1, per_minute and timeout above 0")


class _AgainError(Exception):
    """The server is not at fault for good; wait: seconds that it asks for."""

    def __init__(self, reason: str, wait: float = 0.0) -> None:
        super().__init__(reason)
        self.wait = wait


class _UselessError(Exception):
    """The server answered, without captions of this picture; final: and will again."""

    def __init__(self, reason: str, final: bool = False) -> None:
        super().__init__(reason)
        self.final = final


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


class _Stay(request.HTTPRedirectHandler):
    """A key is not carried to where a server points."""

    def redirect_request(self, *arguments: Any) -> None:
        return None


_OPENER = request.build_opener(_Stay)


def _ask(to: Endpoint, key: str, image: Image.Image) -> bytes:
    """The server's answer to a picture."""
    heads = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
    asked = request.Request(f"{to.url.rstrip('/')}/chat/completions", json.dumps(_body(to, image)).encode(), heads, method="POST")
    try:
        with _OPENER.open(asked, timeout=to.timeout) as answer:
            found: bytes = answer.read(LONGEST + 1)
    except errors.HTTPError as error:
        with error:
            raise _refusal(to, error) from None
    except Exception as error:  # no connection, a timeout, half an answer, not HTTP at all
        raise _AgainError(" ".join(str(error).split()) or type(error).__name__) from None
    if len(found) > LONGEST:
        raise _UselessError("the answer is too long")
    return found


def _refusal(to: Endpoint, error: errors.HTTPError) -> Exception:
    """What an HTTP status means for this picture, or for the run."""
    if error.code in (400, 413, 415, 422):
        return _UselessError(f"refused with HTTP {error.code}", final=True)
    if error.code in (408, 409, 425, 429) or error.code >= 500:
        after = error.headers.get("Retry-After", "")
        return _AgainError(f"HTTP {error.code}", wait=float(after) if after.isdecimal() else 0.0)
    return UserError(f"{to.url} answers HTTP {error.code}; check url, model, and the key in {to.key!r}")


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


def _read(answer: bytes, to: Endpoint) -> Said:
    """The captions in an answer, as many as were asked for."""
    try:
        text = json.loads(answer.decode("utf-8", "replace"))["choices"][0]["message"]["content"]
        found = json.loads(text[text.index("{") : text.rindex("}") + 1])
        short, long = (tidy([x for x in found.get(kind, []) if isinstance(x, str)])[:most] for kind, most in _kinds(to))
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError):
        raise _UselessError("the answer holds no captions") from None
    if (to.short and not short) or (to.long and not long):
        raise _UselessError("the answer lacks captions")
    return Said(short, long)


def _kinds(to: Endpoint) -> tuple[tuple[str, int], ...]:
    return ("short", to.short), ("long", to.long)
