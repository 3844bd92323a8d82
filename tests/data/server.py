"""A server that behaves as badly as those of strangers do, on this machine."""

import contextlib
import socket
import ssl
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator

from heaps import drawn, encoded

PNG = encoded(drawn())
OK = b"HTTP/1.1 200 OK\r\nContent-Type: image/png\r\n"

Answer = Callable[[socket.socket, str, int], None]  # the connection, the path, and how often it was asked for


def whole(content: bytes = PNG, kind: bytes = b"image/png", *headers: bytes) -> bytes:
    lines = [b"HTTP/1.1 200 OK", b"Content-Type: " + kind, b"Content-Length: %d" % len(content), *headers]
    return b"\r\n".join(lines) + b"\r\n\r\n" + content


def says(answer: bytes) -> Answer:
    return lambda client, path, count: client.sendall(answer)


def status(number: int, *headers: bytes) -> bytes:
    return b"\r\n".join([b"HTTP/1.1 %d Nope" % number, *headers, b"Content-Length: 0", b"", b""])


def at_last(*answers: bytes) -> Answer:
    """One answer after another; the last one from then on."""
    return lambda client, path, count: client.sendall(answers[min(count, len(answers)) - 1])


def hang(client: socket.socket, path: str, count: int) -> None:
    client.recv(1)  # until the other side gives up


def drip(start: bytes, part: bytes) -> Answer:
    """Bytes that come just often enough for a timeout never to strike."""

    def answer(client: socket.socket, path: str, count: int) -> None:
        client.sendall(start)
        for _ in range(200):
            client.sendall(part)
            time.sleep(0.05)

    return answer


def endless(start: bytes, part: bytes) -> Answer:
    def answer(client: socket.socket, path: str, count: int) -> None:
        client.sendall(start)
        while True:
            client.sendall(part)

    return answer


class Server:
    """asked: how often each path was; times: when; agents: by whom. One thread a connection."""

    def __init__(self, answers: dict[str, Answer]) -> None:
        self.answers, self.asked, self.times = answers, Counter[str](), list[float]()
        self.context: ssl.SSLContext | None = None
        self.agents, self.lock = set[str](), threading.Lock()
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.port = self.socket.getsockname()[1]

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.port}{path}"

    def serve(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                threading.Thread(target=self.answer, args=(self.socket.accept()[0],), daemon=True).start()

    def answer(self, client: socket.socket) -> None:
        with contextlib.suppress(OSError), self.context.wrap_socket(client, server_side=True) if self.context else client as client:
            head = b""
            while b"\r\n\r\n" not in head and (part := client.recv(4096)):
                head += part
            path = head.split(b" ")[1].decode()
            with self.lock:
                self.asked[path] += 1
                self.times.append(time.monotonic())
                self.agents |= {line[12:].decode() for line in head.split(b"\r\n") if line.startswith(b"User-Agent: ")}
                count = self.asked[path]
            self.answers.get(path, says(whole()))(client, path, count)
            client.shutdown(socket.SHUT_WR)


@contextlib.contextmanager
def served(answers: dict[str, Answer] | None = None) -> Iterator[Server]:
    server = Server(answers or {})
    threading.Thread(target=server.serve, daemon=True).start()
    yield server
    server.socket.close()
