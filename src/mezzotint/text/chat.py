"""OpenAI's chat protocol from the client's side, as servers of one's own (vLLM, llama.cpp, ...) and paid ones speak it.

One request, one answer: a `ChatError` says whether asking again could help, and the caller knows how often it may. The key goes to one
address alone: redirections are errors, only a server on this machine is spoken to without encryption, and that one never through a
proxy. Of an answer no more than `BODY` bytes are read, and no message has a server's own words in it.
"""

import ipaddress
import json
import queue
import threading
import urllib.error
import urllib.request
from dataclasses import dataclass, field
from http.client import HTTPException
from typing import Any, Self
from urllib.parse import urlsplit, urlunsplit

from mezzotint.errors import UserError

BODY = 1 << 20
PASSING = (408, 409, 425, 429)  # and all from 500 on: another time the answer may be another


class ChatError(Exception):
    """No text came; the message goes on after the name of the server. code: of HTTP, 0 where there is none. again: whether it may come
    later. wait: seconds until then that the server asks for.
    """

    def __init__(self, reason: str, code: int = 0, again: bool = False, wait: float = 0.0) -> None:
        super().__init__(reason)
        self.code, self.again, self.wait = code, again, wait


@dataclass(frozen=True)
class Server:
    """url: of its completions. key: "" where it needs none."""

    url: str
    key: str = field(default="", repr=False)

    @classmethod
    def at(cls, place: str, key: str = "", variable: str = "") -> Self:
        """The server at "https://HOST/v1", or at "http://localhost:PORT/v1" without encryption.

        variable: of the environment, where the key is from. UserError for another place, and for what cannot be a key.
        """
        try:
            parts = urlsplit(place)
            host, _ = parts.hostname or "", parts.port
        except ValueError:
            raise UserError("the address of a chat server is no URL; it is as in https://HOST/v1") from None
        if not host or parts.username is not None or not (parts.scheme == "https" or (parts.scheme == "http" and _is_local(host))):
            raise UserError(
                "the address of a chat server must begin with https://, or be on this machine, as in https://HOST/v1, without a key"
            )
        if not key.isascii() or not key.isprintable():
            raise UserError(f"the key in the variable {variable} has letters that no key has")
        path = parts.path.rstrip("/")
        path = path if path.endswith("/chat/completions") else f"{path}/chat/completions"
        return cls(urlunsplit((parts.scheme, parts.netloc, path, parts.query, "")), key)

    def ask(self, body: dict[str, Any], seconds: float) -> str:
        """The text of the answer to a request, within so many seconds for everything. `ChatError` where there is none."""
        answers: queue.SimpleQueue[str | ChatError] = queue.SimpleQueue()
        # A thread of its own, since no timeout of a socket ends a name that is not resolved, or an answer byte by byte.
        threading.Thread(target=self._ask, args=(body, seconds, answers), daemon=True).start()
        try:
            answer = answers.get(timeout=seconds)
        except queue.Empty:
            raise ChatError(f"did not answer within {seconds:.3g} seconds", again=True) from None
        if isinstance(answer, ChatError):
            raise answer
        return answer

    def _ask(self, body: dict[str, Any], seconds: float, answers: "queue.SimpleQueue[str | ChatError]") -> None:
        try:
            answers.put(_content(self._post(body, seconds)))
        except ChatError as error:
            answers.put(error)
        except urllib.error.HTTPError as error:
            with error:
                after = error.headers.get("Retry-After", "")
            wait = float(after) if after.isascii() and after.isdecimal() else 0.0
            again = error.code in PASSING or error.code >= 500
            answers.put(ChatError(f"answered with the error {error.code}", error.code, again, wait))
        except (OSError, HTTPException, ValueError) as error:  # the last of a name that cannot be one, or of half an answer
            answers.put(ChatError(f"cannot be reached ({_reason(error)})", again=True))

    def _post(self, body: dict[str, Any], seconds: float) -> bytes:
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {self.key}"} if self.key else {})
        request = urllib.request.Request(self.url, json.dumps(body).encode(), headers)
        # A server on this machine is never asked through a proxy.
        proxies = [urllib.request.ProxyHandler({})] if self.url.startswith("http:") else []
        with urllib.request.build_opener(_Here, *proxies).open(request, timeout=seconds) as answer:
            found: bytes = answer.read(BODY + 1)
        if len(found) > BODY:
            raise ChatError(f"answered more than {BODY >> 20} MB")
        return found


class _Here(urllib.request.HTTPRedirectHandler):
    """Redirections are errors: a key is not carried to where a server points."""

    def redirect_request(self, *args: Any) -> None:
        return None


def _is_local(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _content(body: bytes) -> str:
    """The text in an answer."""
    try:
        text = json.loads(body)["choices"][0]["message"]["content"]
    except (ValueError, RecursionError, LookupError, TypeError):
        text = None
    if not isinstance(text, str):
        raise ChatError("answered something that is no chat completion")
    return text


def _reason(error: OSError | HTTPException | ValueError) -> str:
    """Why there is no connection, in our words: a server's own may be anything."""
    cause = error.reason if isinstance(error, urllib.error.URLError) else error
    return (isinstance(cause, OSError) and cause.strerror) or type(cause).__name__
