"""Captions: what is asked, what is kept, and what a server may do without harm."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from drawn import Row, make, png
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from rewards.published import clip, trocr

from mezzotint import config
from mezzotint.curation.caption import Captions, Network, caption, estimate
from mezzotint.curation.caption_faults import CaptionFaults, fault, language_of
from mezzotint.curation.embed import Embed
from mezzotint.curation.endpoint import Endpoint
from mezzotint.curation.stage import run
from mezzotint.data.captions import choose
from mezzotint.data.table import NOTES, Table
from mezzotint.errors import UserError

GOOD = {"short": ["a red square", "red"], "long": ["A square that is red all over."]}


def answer(said: Any) -> bytes:
    return json.dumps({"choices": [{"message": {"content": said if isinstance(said, str) else json.dumps(said)}}]}).encode()


@dataclass
class Server:
    """A server of captions. act: what it does with its n-th request."""

    act: Callable[[int, BaseHTTPRequestHandler], None]
    asked: list[dict[str, Any]] = field(default_factory=list)
    url: str = ""


def reply(handler: BaseHTTPRequestHandler, body: bytes, code: int = 200, **heads: str) -> None:
    handler.send_response(code)
    for name, value in {"Content-Length": str(len(body)), **heads}.items():
        handler.send_header(name.replace("_", "-"), value)
    handler.end_headers()
    handler.wfile.write(body)


@pytest.fixture
def server() -> Iterator[Server]:
    made = Server(lambda number, handler: reply(handler, answer(GOOD)))

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            made.asked.append({"key": self.headers["Authorization"], "path": self.path, "body": body})
            made.act(len(made.asked) - 1, self)

        def log_message(self, *arguments: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        made.url = f"http://127.0.0.1:{http.server_address[1]}/v1"
        threading.Thread(target=http.serve_forever, args=(0.01,), daemon=True).start()
        yield made
        http.shutdown()


def rows(count: int) -> list[Row]:
    return [Row(str(k), png(Image.new("RGB", (8, 8), (k, 0, 0)))) for k in range(count)]


def endpoint(server: Server, **changes: Any) -> Endpoint:
    settings: dict[str, Any] = {"model": "m", "key": "", "wait": 0.001, "timeout": 5.0, "per_minute": 1e6, "requests": 1} | changes
    return Endpoint(url=server.url, **settings)


def said(table: Table) -> list[Any]:
    return table.read(["captions_short", "captions_long", "caption_error"]).to_pylist()


def test_captions_come_in_columns(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("A_KEY", "secret")
    broken = [Row("none", None, fault="gone"), Row("junk", b"junk"), Row("again", rows(1)[0].content)]
    table = make(tmp_path / "t.lance", rows(3) + broken)
    asking = endpoint(server, key="A_KEY", requests=4)
    planned = estimate(table, asking)
    table = caption(table, asking)
    assert said(table)[0] == {"captions_short": GOOD["short"], "captions_long": GOOD["long"], "caption_error": ""}
    assert said(table)[3]["caption_error"].startswith("not asked")
    assert said(table)[4]["captions_short"] is None
    assert said(table)[4]["caption_error"].startswith("not an image")
    assert said(table)[5] == said(table)[0]
    assert len(server.asked) == 3  # the same picture once
    assert planned.rows == 4  # of which one is junk, as only its pixels tell
    assert {asked["key"] for asked in server.asked} == {"Bearer secret"}
    assert "secret" not in json.dumps(table.stamp("captions_short"))
    assert caption(table, asking.replace(timeout=9.0, per_minute=5.0)).version == table.version


BAD: dict[str, Callable[[BaseHTTPRequestHandler], None]] = {
    "not JSON": lambda h: reply(h, b"<html>"),
    "not UTF-8": lambda h: reply(h, b"\xff\xfe{"),
    "no choices": lambda h: reply(h, b"{}"),
    "another type": lambda h: reply(h, b"[1]"),
    "prose": lambda h: reply(h, answer("I cannot see it.")),
    "a list": lambda h: reply(h, answer("[1, 2]")),
    "numbers": lambda h: reply(h, answer({"short": [1], "long": [2]})),
    "null": lambda h: reply(h, b'{"choices": [{"message": {"content": null}}]}'),
    "too few": lambda h: reply(h, answer({"short": ["x"]})),
    "blank": lambda h: reply(h, answer({"short": [" "], "long": ["\n"]})),
    "deep": lambda h: reply(h, b"[" * 100_000),
    "too long": lambda h: reply(h, b" " * (1 << 21)),
    "HTTP 400": lambda h: reply(h, b"", 400),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_answer_costs_one_row_and_is_given_up(server: Server, tmp_path: Path, kind: str) -> None:
    good, first = server.act, {"row": png(Image.new("RGB", (8, 8)))}
    bad_picture: list[str] = []

    def act(number: int, handler: BaseHTTPRequestHandler) -> None:
        picture = server.asked[number]["body"]["messages"][0]["content"][0]["image_url"]["url"]
        bad_picture[:] = bad_picture or [picture]
        BAD[kind](handler) if picture == bad_picture[0] else good(number, handler)

    server.act = act
    table = caption(make(tmp_path / "t.lance", [Row("bad", first["row"]), *rows(3)[2:]]), endpoint(server))
    assert said(table)[0]["captions_short"] is None
    assert said(table)[0]["caption_error"]
    assert said(table)[1]["captions_short"] == GOOD["short"]
    assert len(server.asked) <= 3


def close(handler: BaseHTTPRequestHandler) -> None:
    handler.close_connection = True
    handler.connection.close()


def half(handler: BaseHTTPRequestHandler) -> None:
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    handler.wfile.write(b"{")
    handler.wfile.flush()
    handler.connection.shutdown(2)


PASSING: dict[str, Callable[[BaseHTTPRequestHandler], None]] = {
    "HTTP 500": lambda h: reply(h, b"", 500),
    "HTTP 429": lambda h: reply(h, b"", 429, Retry_After="0"),
    "HTTP 429, later": lambda h: reply(h, b"", 429, Retry_After="Wed, 21 Oct 2026 07:28:00 GMT"),
    "no answer": close,
    "half an answer": half,
    "not HTTP": lambda h: (h.wfile.write(b"what?\r\n\r\n"), h.wfile.flush(), close(h))[2],
    "too slow": lambda h: time.sleep(0.6),
}


@pytest.mark.parametrize("kind", PASSING)
def test_what_may_pass_is_tried_again(server: Server, tmp_path: Path, kind: str) -> None:
    good = server.act
    server.act = lambda number, handler: PASSING[kind](handler) if number == 0 else good(number, handler)
    table = caption(make(tmp_path / "t.lance", rows(1)), endpoint(server, timeout=0.3))
    assert said(table)[0]["captions_short"] == GOOD["short"]
    assert len(server.asked) == 2


def test_what_does_not_pass_ends_the_run_and_nothing_is_paid_twice(server: Server, tmp_path: Path) -> None:
    good = server.act
    server.act = lambda number, handler: good(number, handler) if number < 3 else reply(handler, b"", 503)
    table, asking = make(tmp_path / "t.lance", rows(6)), endpoint(server, tries=2)
    with pytest.raises(UserError, match="answered with the error 503; the same command goes on from here"):
        caption(table, asking)
    assert len(server.asked) == 5
    (journal,) = (table.path / NOTES / "captions").glob("*.jsonl")
    journal.write_bytes(journal.read_bytes() + b'{"key": "torn')
    assert estimate(table, asking).rows == 3
    server.act = good
    assert [row["caption_error"] for row in said(caption(table, asking))] == [""] * 6
    assert len(server.asked) == 8


@pytest.mark.parametrize("code", [401, 403, 404])
def test_a_server_that_refuses_all_is_not_asked_on(server: Server, tmp_path: Path, code: int) -> None:
    server.act = lambda number, handler: reply(handler, b"", code)
    with pytest.raises(UserError, match=f"answered with the error {code}; check url, model"):
        caption(make(tmp_path / "t.lance", rows(4)), endpoint(server))
    assert len(server.asked) == 1


def test_a_key_is_not_carried_elsewhere(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("A_KEY", "secret")
    server.act = lambda number, handler: reply(handler, b"", 302, Location=f"{server.url}/elsewhere")
    with pytest.raises(UserError, match="answered with the error 302"):
        caption(make(tmp_path / "t.lance", rows(1)), endpoint(server, key="A_KEY"))
    assert len(server.asked) == 1


@pytest.mark.parametrize("url", ["http://example.org/v1", "file:///etc/passwd", "http://127.0.0.1.example.org", "", "localhost"])
def test_pictures_and_keys_go_out_encrypted(url: str) -> None:
    with pytest.raises(UserError, match="must begin with https://, or be on this machine"):
        Endpoint(url=url, model="m", key="").build()


def test_a_key_that_is_missing_is_named() -> None:
    with pytest.raises(UserError, match="'NO_SUCH_KEY' holds no key"):
        Endpoint(url="https://example.org", model="m", key="NO_SUCH_KEY").build()


def test_requests_are_spaced(server: Server, tmp_path: Path) -> None:
    start = time.perf_counter()
    caption(make(tmp_path / "t.lance", rows(6)), endpoint(server, per_minute=1200, requests=6))
    assert time.perf_counter() - start >= 5 * 0.05


def test_the_price_is_told_before(tmp_path: Path) -> None:
    table = make(tmp_path / "t.lance", rows(10))
    asking = Endpoint(short=2, long=1, short_tokens=20, long_tokens=100, picture_tokens=1000, input_price=1.0, output_price=10.0)
    found = estimate(table, asking)
    assert (found.rows, found.tokens_out) == (10, 10 * 140)
    assert 10_000 < found.tokens_in < 11_000
    assert found.price == pytest.approx(found.tokens_in / 1e6 + found.tokens_out / 1e5)


KILLED = """
import sys
from mezzotint.curation.caption import caption
from mezzotint.curation.endpoint import Endpoint
from mezzotint.data.table import Table
caption(Table.open(sys.argv[1]), Endpoint(url=sys.argv[2], model="m", key="", requests=2))
"""


def test_a_kill_costs_what_was_under_way(server: Server, tmp_path: Path) -> None:
    good = server.act
    server.act = lambda number, handler: (time.sleep(0.1), good(number, handler))[1]
    table = make(tmp_path / "t.lance", rows(12))
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(table.path), server.url], env=dict(os.environ))
    while len(server.asked) < 5:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    server.act = good
    table = caption(table.latest, endpoint(server, requests=2))
    assert [row["caption_error"] for row in said(table)] == [""] * 12
    assert 12 <= len(server.asked) <= 12 + 2


# Networks.


def test_a_network_says_several_captions(tmp_path: Path) -> None:
    trocr(tmp_path / "model")
    table = make(tmp_path / "t.lance", [*rows(2), Row("none", None, fault="gone"), Row("cut", png(Image.new("RGB", (8, 8)))[:-30])])
    asking = Network(short=3, long=1, short_tokens=6, long_tokens=12, path=str(tmp_path / "model"))
    found = said(caption(table, asking))
    assert 1 <= len(found[0]["captions_short"]) <= 3
    assert len(found[0]["captions_long"]) == 1
    assert found[2]["captions_short"] is None
    alone = said(run(make(tmp_path / "one.lance", rows(2)[1:]), Captions(asking), workers=1))
    assert alone[0] == found[1]
    assert estimate(table, asking).tokens_out == 0  # all of it is in the journal


def test_a_captioner_is_described_by_data() -> None:
    stage = Captions(Endpoint(url="https://example.org", model="m"))
    assert config.Config.from_data(json.loads(json.dumps(stage.to_data()))) == stage
    with pytest.raises(UserError, match="set path to a folder"):
        Network().build()
    with pytest.raises(ValueError, match="short and long must be at least 0"):
        Network(short=0, long=0)


def test_embeddings_are_those_of_the_network(tmp_path: Path) -> None:
    clip(tmp_path / "clip")
    given = [*rows(2), Row("none", None, fault="gone"), Row("junk", b"junk")]
    table = run(make(tmp_path / "t.lance", given), Embed(str(tmp_path / "clip")), workers=1)
    found = table.read(["embedding"])["embedding"].to_pylist()
    assert found[2] is None
    assert found[3] is None
    assert len(found[0]) == 12
    assert sum(x * x for x in found[0]) == pytest.approx(1, abs=0.01)
    other = run(table, Embed(str(tmp_path / "clip"), device="cpu"), workers=1)
    assert other.version == table.version


def test_a_network_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot read"):
        Network(path=str(tmp_path / "nowhere")).build()


# Faults.


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("a red star above a blue circle", ""),
        ("an eight-bit cat, 3.5 metres tall", ""),
        ("", "too short"),
        ("x" * 2001, "too long: 2001 characters"),
        ("IMG_2041.JPG", "file name"),
        ("photo 000123", "file name"),
        ("see https://example.org/a", "address"),
        ("mail me@example.org", "address"),
        ("I'm sorry, but I can't help with that.", "refusal"),
        ("As an AI language model, I cannot see pictures", "refusal"),
        ("a caf\u00c3\u00a9 in Paris", "mangled text"),
        ("it\u00e2\u20ac\u2122s a dog", "mangled text"),
        ("a dog \ufffd", "mangled text"),
        ("a caf\u00e9 in Paris, \u00c5ngstr\u00f6m", ""),
        ("cats &amp; dogs", "markup"),
        ("1234 5678", "no words"),
        ("a cat a cat a cat a cat", "repetition"),
        ("very very very very good", "repetition"),
        ("ein Hund und eine Katze auf der Wiese", "language: de"),
        ("\u0441\u043e\u0431\u0430\u043a\u0430", "language: ru"),
        ("\u732b\u304c\u3044\u308b", "language: ja"),
    ],
)
def test_a_fault_is_named(text: str, found: str) -> None:
    assert fault(text, "en") == found


@given(st.text(max_size=80))
@settings(max_examples=40, deadline=None)
def test_any_text_has_a_fault_or_none(text: str) -> None:
    assert isinstance(fault(text, "en"), str)
    assert language_of(text) in ("", *["en", "de", "fr", "es", "it", "pt", "nl", "ru", "el", "ar", "he", "hi", "th", "ko", "ja", "zh"])


def test_faults_stand_beside_their_captions(tmp_path: Path) -> None:
    given = [Row("a", b"", ["a cat", "IMG_2041.JPG"]), Row("b", None, [])]
    table = run(make(tmp_path / "t.lance", given), CaptionFaults(), workers=1)
    assert table.read(["caption_faults"])["caption_faults"].to_pylist() == [["", "file name"], []]


# The mix.

KINDS = st.dictionaries(st.sampled_from("abc"), st.lists(st.sampled_from(["", " ", "x", "y", "z"]), max_size=3))


@given(KINDS, st.dictionaries(st.sampled_from("abcd"), st.floats(0.1, 5), min_size=1), st.integers(), st.integers(0))
@settings(max_examples=60, deadline=None)
def test_a_choice_is_a_caption_of_the_mix(captions: dict[str, list[str]], mix: dict[str, float], seed: int, position: int) -> None:
    chosen = choose(captions, mix, seed, position)
    there = [text for kind in mix for text in captions.get(kind, []) if text.strip()]
    assert chosen in there if there else chosen == ""
    assert choose(dict(reversed(captions.items())), dict(reversed(mix.items())), seed, position) == chosen


def test_kinds_are_drawn_as_often_as_the_mix_says() -> None:
    captions = {"captions": ["found"], "captions_long": ["long"], "captions_short": []}
    drawn = [choose(captions, {"captions": 1, "captions_long": 3, "captions_short": 6}, 0, k) for k in range(2000)]
    assert abs(drawn.count("long") / 2000 - 0.75) < 0.04
    with pytest.raises(ValueError, match="mix must have shares"):
        choose(captions, {"captions": -1.0}, 0, 0)
