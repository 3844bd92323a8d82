"""Longer prompts: what may not get lost, and that no endpoint, however it behaves, stops a picture from being drawn."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mezzotint.cli import main
from mezzotint.errors import UserError
from mezzotint.pipeline import Pipeline
from mezzotint.text.chat import BODY
from mezzotint.text.chat import Server as Chat
from mezzotint.text.enhance import KEY, LONGEST, Endpoint, Enhanced, Failed, endpoint, enhance, lost_words, plain, source
from mezzotint.text.writer import ByteWriterConfig
from mezzotint.worlds.caption import lost

ASKED = "a red star above a blue circle"
LONGER = "a small red star above a large blue circle, in flat colours on a grey background, lit from the left"
AS_GIVEN = "the prompt is drawn as it was given"

# The check


@pytest.mark.parametrize(
    ("asked", "longer", "missing"),
    [
        ("a cat", "A fluffy cat on a sofa.", ""),
        ("The cat's two hats", "the CAT'S two tall hats", ""),
        ("3 cats at 16:9", "3 grey cats, 16:9, at dusk", ""),
        ('a sign that says "Open 24h"', "a neon sign that says “Open 24h”, at night", ""),
        ("a cat without a hat", "a cat with a hat", "without"),
        ("a cat on a box", "a cat in a box", "on"),
        ("3 cats", "4 cats", "3"),
        ("1.5 apples", "15 apples", "1.5"),
        ("a red cube and a red ball", "a red cube and a ball", "red"),
        ('a sign that says "Open"', 'a sign that says "open"', '"Open"'),
        ('a sign that says "Open"', "a sign that says Open", '"Open"'),
        ("a cat", "a dog", "cat"),
    ],
)
def test_what_was_asked_for_must_still_be_there(asked: str, longer: str, missing: str) -> None:
    assert lost_words(asked, longer) == missing


WORDS = st.lists(st.sampled_from(["cat", "red", "under", "not", "7", "3.5", "tête", "猫", "mirror", "o'clock"]), min_size=1, max_size=8)


@settings(deadline=None, max_examples=30)
@given(WORDS, WORDS, st.integers(0, 100))
def test_more_words_lose_nothing_and_fewer_lose_what_went(asked: list[str], more: list[str], place: int) -> None:
    assert lost_words(" ".join(asked), " ".join([*more, *asked])) == ""
    at = place % len(asked)
    assert lost_words(" ".join(asked), " ".join(asked[:at] + asked[at + 1 :])) == asked[at]


def test_scenes_are_compared_where_both_are_captions_of_worlds() -> None:
    assert lost("a disc", "a red circle, drawn flat") == "", "another word for the same thing"
    assert lost(ASKED, LONGER) == ""
    assert lost(ASKED, LONGER.replace("above", "below"))
    assert lost(ASKED, "a large blue circle under a small red star") == ""
    assert lost(ASKED, "a dreamy photograph of a red star above a blue circle") == "", "words, where one is none"


# Answers


def test_an_answer_is_one_line_of_text() -> None:
    assert plain(" <think>hm\n\n</think>\n a\n red  star \n") == "a red star"
    assert plain('"a red star"') == plain("“a red star”") == "a red star"
    assert plain('"Hi" and "bye"') == '"Hi" and "bye"'
    for nonsense in ("", " \n", '""', "x" * (LONGEST + 1), "a \x1b[31mred star", "a \ufffd star", "\0"):
        with pytest.raises(Failed):
            plain(nonsense)


def test_a_source_that_is_no_use_leaves_the_prompt_as_it_was() -> None:
    def failing(prompt: str) -> str:
        raise Failed("the enhancer sleeps")

    assert enhance(ASKED, failing) == Enhanced(ASKED, f"the enhancer sleeps; {AS_GIVEN}")
    assert enhance(ASKED, lambda _: LONGER) == Enhanced(LONGER)
    assert enhance(ASKED, lambda _: "a green star") == Enhanced(ASKED, f"the longer prompt lost red, above, blue, circle; {AS_GIVEN}")
    assert enhance('a sign "a\nb"', lambda _: "a sign").note == f'the longer prompt lost "a b", b; {AS_GIVEN}'
    for prompt in ("", " ", "x" * (LONGEST + 1)):
        found = enhance(prompt, lambda _: LONGER)
        assert found.prompt == prompt
        assert found.note


# Endpoints


def said(text: object) -> bytes:
    return json.dumps({"choices": [{"message": {"role": "assistant", "content": text}}]}).encode()


class Server(ThreadingHTTPServer):
    """A server that does with every request what it is told to, and remembers them."""

    daemon_threads = True
    block_on_close = False

    def __init__(self) -> None:
        self.does: Callable[[Any], None] = lambda handler: None
        self.seen: list[tuple[str, dict[str, str], dict[str, Any]]] = []

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:  # the name is http.server's
                assert isinstance(self.server, Server)
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                self.server.seen.append((self.path, dict(self.headers), body))
                self.server.does(self)

            def do_GET(self) -> None:
                assert isinstance(self.server, Server)
                self.server.seen.append((self.path, dict(self.headers), {}))

            def log_message(self, *args: object) -> None:
                pass

        super().__init__(("127.0.0.1", 0), Handler)

    @property
    def place(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    def answers(self, body: bytes, code: int = 200, **headers: str) -> None:
        def answer(handler: BaseHTTPRequestHandler) -> None:
            handler.send_response(code)
            for name, value in {"Content-Length": str(len(body)), **headers}.items():
                handler.send_header(name, value)
            handler.end_headers()
            handler.wfile.write(body)

        self.does = answer


@pytest.fixture(scope="module")
def one_server() -> Iterator[Server]:
    server = Server()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def server(one_server: Server) -> Server:
    one_server.seen.clear()
    return one_server


def asking(server: Server, **changes: Any) -> Endpoint:
    key = changes.pop("key", "")
    return Endpoint(Chat.at(server.place, key), **{"seconds": 20.0, "pause": 0.01, **changes})


def test_an_endpoint_is_asked_once_with_model_and_key(server: Server) -> None:
    server.answers(said(LONGER))
    assert enhance(ASKED, endpoint(f"{server.place}#some-model", "secret")) == Enhanced(LONGER)
    ((path, headers, body),) = server.seen
    assert path == "/v1/chat/completions"
    assert headers["Authorization"] == "Bearer secret"
    assert body["model"] == "some-model"
    assert body["messages"][-1] == {"role": "user", "content": ASKED}
    assert endpoint(f"{server.place}/chat/completions/") == endpoint(server.place)
    assert "secret" not in repr(endpoint(server.place, "secret"))


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"\xff\xfe\x00",
        b"<html>hello</html>",
        b"[" * 100_000,
        b"null",
        b'{"choices": []}',
        b'{"choices": [{"message": {"content": null}}]}',
        b'{"error": {"message": "no such model"}}',
        said(["a", "list"]),
        said(""),
        said("x" * (LONGEST + 1)),
        said("a \x1b[2J star"),
        said("Sorry, I cannot help with that."),
        b" " * (BODY + 1),
    ],
    ids=range(14),
)
def test_garbage_leaves_the_prompt_as_it_was(server: Server, body: bytes) -> None:
    server.answers(body)
    found = enhance(ASKED, asking(server))
    assert found.prompt == ASKED
    assert found.note.endswith(AS_GIVEN)
    assert "\n" not in found.note
    assert len(server.seen) == 1, "nonsense is not asked for again"


def test_errors_of_the_server_are_tried_again_and_ours_are_not(server: Server) -> None:
    for code, times in ((500, 3), (503, 3), (429, 3), (400, 1), (401, 1), (404, 1)):
        server.seen.clear()
        server.answers(b"no", code)
        assert enhance(ASKED, asking(server)) == Enhanced(ASKED, f"the enhancer answered with the error {code}; {AS_GIVEN}")
        assert len(server.seen) == times
    failing = iter([500, 429])

    def recovers(handler: Any) -> None:
        server.answers(said(LONGER), next(failing, 200))
        recovering, server.does = server.does, recovers
        recovering(handler)

    server.does = recovers
    assert enhance(ASKED, asking(server)) == Enhanced(LONGER)


def test_redirections_are_not_followed(server: Server) -> None:
    for code in (301, 302, 303, 307, 308):
        server.seen.clear()
        server.answers(b"", code, Location=f"{server.place}/elsewhere")
        assert f"the error {code}" in enhance(ASKED, asking(server, key="secret")).note
        assert len(server.seen) == 1


def test_slow_servers_are_left_behind(server: Server) -> None:
    release = threading.Event()

    def hangs(handler: Any) -> None:
        release.wait(20)

    def drips(handler: Any) -> None:
        handler.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n")
        while not release.wait(0.05):
            handler.wfile.write(b" ")
            handler.wfile.flush()

    for behaviour in (hangs, drips):
        server.does = behaviour
        start = time.monotonic()
        found = enhance(ASKED, asking(server, seconds=0.4))
        assert found.prompt == ASKED
        assert "within 0.4 seconds" in found.note or "cannot be reached (TimeoutError)" in found.note or "timed out" in found.note
        assert time.monotonic() - start < 10
    release.set()


def test_broken_connections_are_told(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    def hangs_up(handler: Any) -> None:
        handler.close_connection = True
        handler.connection.close()

    server.does = hangs_up
    assert "the enhancer cannot be reached" in enhance(ASKED, asking(server)).note
    assert len(server.seen) == 3
    server.does = lambda handler: handler.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nshort")
    assert enhance(ASKED, asking(server)).prompt == ASKED
    with ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as gone:
        port = gone.server_address[1]
    found = enhance(ASKED, Endpoint(Chat.at(f"http://localhost:{port}/v1"), pause=0.01))
    assert found == Enhanced(ASKED, f"the enhancer cannot be reached (Connection refused); {AS_GIVEN}")
    monkeypatch.setenv("no_proxy", "*")
    found = enhance(ASKED, Endpoint(Chat.at(f"https://{'x' * 70}.org/v1"), pause=0.01))
    assert found == Enhanced(ASKED, f"the enhancer cannot be reached (UnicodeError); {AS_GIVEN}")


@pytest.mark.parametrize(
    "place",
    [
        "http://example.org/v1",
        "http://localhost@example.org/v1",
        "http://localhost.example.org/v1",
        "http://10.0.0.1/v1",
        "ftp://localhost/v1",
        "file:///etc/passwd",
        "https:///v1",
        "https://user:password@example.org/v1",
        "http://localhost:99999/v1",
        "http://[::1/v1",
    ],
)
def test_prompts_and_keys_go_nowhere_else(place: str) -> None:
    with pytest.raises(UserError):
        endpoint(place)


def test_where_prompts_may_go() -> None:
    for place in ("https://example.org/v1", "http://localhost:1/v1", "http://127.0.0.2/v1", "http://[::1]:8080/v1"):
        assert endpoint(place).server.url == f"{place}/chat/completions"
    with pytest.raises(UserError, match=KEY):
        endpoint("https://example.org/v1", "a\nb")


# A language model, our own writer, and the command


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama over words, in a folder."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("llm")
    known = ("<end>", "<unknown>", "a", "red", "blue", "star", "circle", "above", "Prompt", "Longer", "prompt", ":")
    words = {word: number for number, word in enumerate(known)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unknown>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", unk_token="<unknown>").save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 128}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(words), eos_token_id=0, bos_token_id=0, **sizes)).save_pretrained(folder)
    return folder


def test_a_random_language_model_is_caught(llm: Path) -> None:
    writer = source(str(llm))
    found = enhance(ASKED, writer)
    assert found.prompt == ASKED
    assert found.note.endswith(AS_GIVEN)
    assert "too long for the language model" in enhance("star " * 200, writer).note
    writer.tokenizer.chat_template = "{% for turn in messages %}{{ turn.content }}{% endfor %} <end>"  # type: ignore[attr-defined]
    assert ASKED in writer._asked(ASKED)  # type: ignore[attr-defined]
    assert enhance(ASKED, writer).prompt == ASKED


def test_places_without_an_enhancer_are_one_line(tmp_path: Path) -> None:
    for place in (str(tmp_path / "nowhere"), str(tmp_path)):
        with pytest.raises(UserError) as error:
            source(place)
        assert "\n" not in str(error.value)
    ByteWriterConfig(width=16, depth=1, heads=2).build().save(tmp_path)
    assert callable(source(str(tmp_path)))
    whole = (tmp_path / "writer.safetensors").read_bytes()
    (tmp_path / "writer.safetensors").write_bytes(whole[:-8])
    with pytest.raises(UserError, match="cannot read the writer") as error:
        source(str(tmp_path))
    assert "\n" not in str(error.value)


def test_sample_prints_the_longer_prompt_and_draws_it(
    server: Server, pipeline: Pipeline, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pipeline.save(tmp_path / "model")
    ByteWriterConfig(width=16, depth=1, heads=2, length=80).build().save(tmp_path / "writer")
    words = ["sample", ASKED, "--model", str(tmp_path / "model"), "--steps", "1"]
    drawn = {}
    for name, place, answer in (("longer", server.place, LONGER), ("same", server.place, "a dog"), ("own", str(tmp_path / "writer"), "")):
        server.answers(said(answer))
        assert main([*words, "--out", str(tmp_path / f"{name}.png"), "--enhance", place]) == 0
        out, err = capsys.readouterr()
        assert out.splitlines()[0] == f"prompt: {LONGER if name == 'longer' else ASKED}"
        assert ("note: " in err) is (name != "longer")
        drawn[name] = (tmp_path / f"{name}.png").read_bytes()
    assert drawn["same"] == drawn["own"] != drawn["longer"]
    assert LONGER.encode() in drawn["longer"], "the picture remembers what it was drawn from"
    assert main([*words, "--enhance", "http://example.org/v1"]) == 2
