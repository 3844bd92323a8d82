"""The downloader is polite, trusts nobody, and asks for nothing twice."""

import hashlib
import io
import ipaddress
import json
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from dataclasses import replace
from email.message import Message
from pathlib import Path

import pytest
from server import OK, PNG, Answer, at_last, drip, endless, hang, says, served, status, whole

from mezzotint.data import download as downloads
from mezzotint.data import fetch as fetches
from mezzotint.data.download import Journal, Result, download
from mezzotint.data.fetch import Again, Fetched, Manners, RefusedError, fetch, is_public, opted_out, resolve
from mezzotint.data.ingest import ingest
from mezzotint.errors import UserError

LOCAL = [ipaddress.ip_network("127.0.0.1/32")]
HASTY = Manners(
    hosts=40, delay=0.0, threads=40, timeout=10, deadline=20, limit=100_000, redirects=3, retries=2, backoff=0.01, allowed=LOCAL
)
IMPATIENT = replace(HASTY, timeout=0.4, deadline=0.8)
LARGE = b"x" * 65536
SLOW = "no answer in {} s, or no end in {} s"
DIGEST = hashlib.sha256(PNG).hexdigest()
REDIRECT = b"HTTP/1.1 302 Found\r\nContent-Length: 0\r\nLocation: "

BAD: dict[str, tuple[Answer, str, int]] = {  # what is asked for: the answer, the reason, and how often it is asked for
    "/hang": (hang, "no answer in 0.4 s", 3),
    "/drip-head": (drip(b"HTTP/1.1 200 OK\r\nX: ", b"a"), "no answer in 0.4 s", 3),
    "/drip-body": (drip(OK + b"Content-Length: 5000\r\n\r\n", b"a"), "no answer in 0.4 s", 3),
    "/continue": (endless(b"", b"HTTP/1.1 100 Continue\r\n\r\n"), "no answer in 0.4 s", 3),
    "/headers": (endless(b"HTTP/1.1 200 OK\r\n", b"X: a\r\n"), "connection: HTTPException", 3),
    "/line": (endless(b"HTTP/1.1 200 OK\r\nX: ", LARGE), "connection: LineTooLong", 3),
    "/garbage": (says(b"\0\1\2\3" * 10), "connection: BadStatusLine", 3),
    "/closed": (says(b""), "connection: RemoteDisconnected", 3),
    "/short": (says(OK + b"Content-Length: 5000\r\n\r\nabc"), "connection: IncompleteRead", 3),
    "/long": (says(OK + b"Content-Length: 1000000000000\r\n\r\nabc"), "too large: more than 0.1 megabytes", 1),
    "/endless": (endless(OK + b"\r\n", LARGE), "too large: more than 0.1 megabytes", 1),
    "/chunks": (endless(OK + b"Transfer-Encoding: chunked\r\n\r\n", b"10000\r\n" + LARGE + b"\r\n"), "too large", 1),
    "/no-chunk": (says(OK + b"Transfer-Encoding: chunked\r\n\r\nzz\r\nabc"), "connection: ", 3),
    "/bomb": (says(whole(b"\x1f\x8b" * 9, b"image/png", b"Content-Encoding: gzip")), "coded, which was not asked for: gzip", 1),
    "/page": (says(whole(b"<html>", b"text/html; charset=utf-8")), "not an image by its type: text/html", 1),
    "/missing": (says(status(404)), "status 404", 1),
    "/500": (says(status(500)), "status 500", 3),
    "/patience": (says(status(503, b"Retry-After: 3600")), "status 503, and it asks for 3,600 s of patience", 1),
    "/date": (
        says(status(429, b"Date: Fri, 01 Jan 2100 00:00:00 GMT\r\nRetry-After: Fri, 01 Jan 2100 01:00:00 GMT")),
        "status 429, and it asks for",
        1,
    ),
    "/loop": (says(REDIRECT + b"/loop\r\n\r\n"), "more than 3 redirects", 4),
    "/nowhere": (says(b"HTTP/1.1 302 Found\r\nContent-Length: 0\r\n\r\n"), "more than 3 redirects", 4),
    "/inside": (says(REDIRECT + b"http://127.0.0.2/secret\r\n\r\n"), "refused: '127.0.0.2' is at 127.0.0.2, which is not public", 1),
    "/metadata": (says(REDIRECT + b"http://169.254.169.254/\r\n\r\n"), "refused: '169.254.169.254' is at", 1),
    "/file": (says(REDIRECT + b"file:///etc/passwd\r\n\r\n"), "refused: 'file' is neither http nor https", 1),
    "/noai": (says(whole(PNG, b"image/png", b"X-Robots-Tag: noindex, NoAI")), "opted out: X-Robots-Tag", 1),
    "/noai-moved": (says(REDIRECT + b"/good\r\nX-Robots-Tag: noai\r\n\r\n"), "opted out: X-Robots-Tag", 1),
}
GOOD: dict[str, Answer] = {
    "/good": says(whole()),
    "/plain": says(b"HTTP/1.0 200 OK\r\n\r\n" + PNG),
    "/chunked": says(OK + b"Transfer-Encoding: chunked\r\n\r\n%x\r\n%b\r\n0\r\n\r\n" % (len(PNG), PNG)),
    "/busy": at_last(status(429, b"Retry-After: 0"), status(503), whole()),
    "/moved": says(REDIRECT + b"busy/../good?a=b c\r\n\r\n"),
    "/others": says(whole(PNG, b"image/png", b"X-Robots-Tag: otherbot: noai", b"X-Robots-Tag: noindex")),
}


def test_what_servers_do_wrong_is_a_reason_and_no_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(downloads, "SILENT", 1000)
    slow = [path for path in BAD if "no answer" in BAD[path][1]]
    quick = [path for path in BAD if path not in slow]
    with served({path: answer for path, (answer, _, _) in BAD.items()} | GOOD) as server:
        start = time.monotonic()
        download(map(server.url, slow), tmp_path, IMPATIENT)
        journal = download(map(server.url, [*quick, *GOOD]), tmp_path, HASTY)
        assert time.monotonic() - start < 30
        for path, (_, reason, asked) in BAD.items():
            result = journal.results[server.url(path)]
            assert result.fault.startswith(reason), path
            assert (result.sha256, result.length, result.opt_out) == ("", 0, path.startswith("/noai"))
            assert server.asked[path] == asked, path
        for path in GOOD:
            result = journal.results[server.url(path)]
            assert result == Result(server.url(path), DIGEST, len(PNG)), path
            assert journal.path(result).read_bytes() == PNG
        assert server.agents == {Manners().agent}
        assert not list(tmp_path.glob("*.part"))
        asked = server.asked.copy()
        assert download(map(server.url, (*BAD, *GOOD)), tmp_path, HASTY).results == journal.results
        assert server.asked == asked


NO_ADDRESSES = ["", "a.png", "ftp://a/b", "http://", "http:///a", "http://a:b/", "http://a:99999/", "http://[::1/", "http://me:word@a/"]


@pytest.mark.parametrize("url", [*NO_ADDRESSES, "http://a..b/", f"http://{'a' * 70}.com/"])
def test_what_is_no_address_is_refused(url: str, tmp_path: Path) -> None:
    with pytest.raises(RefusedError, match="refused: "):
        fetch(url, tmp_path / "a", HASTY)
    assert "refused" in download([url], tmp_path / "j", HASTY).results[url].fault


# Where it may go.


INSIDE = """
127.0.0.1 0.0.0.0 10.1.2.3 172.16.0.1 192.168.1.1 169.254.169.254 100.100.100.200 168.63.129.16 192.0.0.192 224.0.0.1 240.0.0.1
255.255.255.255 ::1 :: fe80::1 fec0::1 fd00:ec2::254 ff02::1 2001:db8::1 ::ffff:127.0.0.1 ::ffff:10.0.0.1 2002:7f00:1:: 64:ff9b::7f00:1
64:ff9b::a9fe:a9fe 2001:0:1:2:3:4:80ff:fffe
"""


@pytest.mark.parametrize("address", INSIDE.split())
def test_addresses_that_are_not_public_are_refused(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not is_public(ipaddress.ip_address(address))
    entries = [(0, 0, 0, "", ("93.184.216.34", 80)), (0, 0, 0, "", (address, 80))]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *arguments, **options: entries)
    with pytest.raises(RefusedError, match="which is not public"):
        resolve("innocent.example", 80)


@pytest.mark.parametrize("address", ["93.184.216.34", "1.1.1.1", "2606:4700::1111", "::ffff:1.1.1.1", "64:ff9b::101:101"])
def test_public_addresses_are_not(address: str) -> None:
    assert is_public(ipaddress.ip_address(address))


@pytest.mark.parametrize("host", ["localhost", "127.1", "2130706433", "0x7f000001", "[::1]"])
def test_other_ways_to_say_here_are_refused(host: str, tmp_path: Path) -> None:
    with pytest.raises(RefusedError, match=r"which is not public|no host of the name"):
        fetch(f"http://{host}/", tmp_path / "a", Manners(timeout=1))


def test_a_name_is_resolved_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """DNS rebinding: the second answer would be another address. The connection goes to the one that was checked."""
    asked: list[str] = []

    def getaddrinfo(host: str, port: int, *arguments: object, **options: object) -> list[object]:
        asked.append(host)
        return [
            (
                socket.AF_INET,
                socket.SOCK_STREAM,
                6,
                "",
                ("127.0.0.1" if host != "rebinds.example" or len(asked) == 1 else "127.0.0.9", port),
            )
        ]

    with served() as server:
        monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
        fetched = fetch(f"http://rebinds.example:{server.port}/a", tmp_path / "a", HASTY)
        assert isinstance(fetched, Fetched)
        assert fetched.sha256 == DIGEST
        assert asked.count("rebinds.example") == 1


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (["noai"], True),
        (["noindex, noimageai"], True),
        (["noindex"], False),
        (["otherbot: noai"], False),
        (["otherbot: noai", "MEZZOTINT: noimageai"], True),
        (["*: noai"], True),
        (["noai, unavailable_after: 25 Jun 2010 15:00:00 PST"], True),
        (["unavailable_after: 25 Jun 2010 15:00:00 PST, noai"], True),
        (["max-snippet: 20, noai"], True),
        ([], False),
    ],
)
def test_owners_say_no_in_many_ways(values: list[str], expected: bool) -> None:
    headers = Message()
    for value in values:
        headers["X-Robots-Tag"] = value
    assert opted_out(headers) is expected


# Manners.


def test_a_host_is_asked_no_more_than_manners_allow(tmp_path: Path) -> None:
    lock, active, most = threading.Lock(), 0, 0

    def slow(client: socket.socket, path: str, count: int) -> None:
        nonlocal active, most
        with lock:
            active += 1
            most = max(most, active)
        time.sleep(0.2)
        with lock:
            active -= 1
        client.sendall(whole())

    paths = [f"/{number}" for number in range(6)]
    with served(dict.fromkeys(paths, slow)) as server:
        download(map(server.url, paths), tmp_path / "few", Manners(hosts=2, delay=0, timeout=5, allowed=LOCAL))
        assert most <= 2
    with served() as server:
        download(map(server.url, paths), tmp_path / "spaced", Manners(hosts=6, delay=0.1, timeout=5, allowed=LOCAL))
        assert max(server.times) - min(server.times) > 0.1 * 5 * 0.5
        assert len(server.times) == 6


def test_a_host_that_asks_for_a_rest_is_given_it(tmp_path: Path) -> None:
    with served({"/a": at_last(status(429, b"Retry-After: 1"), whole())}) as server:
        journal = download(map(server.url, ("/a", "/b", "/c")), tmp_path, Manners(hosts=1, delay=0, threads=2, timeout=5, allowed=LOCAL))
        assert not any(result.fault for result in journal.results.values())
        assert server.times[1] - server.times[0] > 0.9  # the others wait too


def test_a_silent_host_holds_up_nobody_and_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(downloads, "SILENT", 3)
    allowed = [ipaddress.ip_network("127.0.0.0/8")]
    with served() as server, socket.create_server(("127.0.0.3", 0)) as silent:  # which never accepts
        dead = [f"http://127.0.0.3:{silent.getsockname()[1]}/{number}" for number in range(60)]
        live = [server.url(f"/{number}") for number in range(20)]
        manners = Manners(hosts=2, delay=0, threads=4, timeout=0.5, deadline=5, retries=3, backoff=0.01, allowed=allowed)
        start = time.monotonic()
        journal = download([*dead, *live], tmp_path, manners)
        assert time.monotonic() - start < 20  # not 60 times 4 times 0.5 over 2
        assert all(journal.results[url].sha256 for url in live)
        assert all(journal.results[url].fault for url in dead)
        assert sum("without an answer" in journal.results[url].fault for url in dead) > 40


@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs a certificate")
def test_certificates_are_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    key, certificate = str(tmp_path / "key"), str(tmp_path / "certificate")
    names = ["-subj", "/CN=a", "-addext", "subjectAltName=DNS:localhost"]
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", key, "-out", certificate, *names]
    subprocess.run(command, check=True, capture_output=True)
    manners = replace(HASTY, allowed=[*LOCAL, ipaddress.ip_network("::1/128")], timeout=5, deadline=5)
    with served({"/hang": hang}) as server:
        server.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        server.context.load_cert_chain(certificate, key)
        url = f"https://localhost:{server.port}"
        with pytest.raises(RefusedError, match="certificate: self"):
            fetch(f"{url}/a", tmp_path / "a", manners)
        monkeypatch.setattr(fetches, "_context", lambda: ssl.create_default_context(cafile=certificate))
        fetched = fetch(f"{url}/a", tmp_path / "a", manners)
        assert isinstance(fetched, Fetched)
        assert fetched.sha256 == DIGEST
        assert fetch(f"{url}/hang", tmp_path / "a", replace(manners, deadline=1)) == Again(f"{url}/hang", 0, SLOW.format(5, 1), True)
        with pytest.raises(RefusedError, match=r"certificate: .*127\.0\.0\.1"):
            fetch(server.url("/a").replace("http:", "https:"), tmp_path / "a", manners)


# What is kept.


KILLED = """
import ipaddress, sys
from pathlib import Path
from mezzotint.data.ingest import ingest
from mezzotint.data.fetch import Manners
manners = Manners(hosts=1, delay=0.03, threads=2, allowed=[ipaddress.ip_network("127.0.0.1/32")])
ingest(sys.argv[1], sys.argv[2], manners, progress=lambda what, count: print(count, flush=True))
"""


def test_a_killed_download_goes_on_and_asks_for_nothing_twice(tmp_path: Path) -> None:
    with served({"/7": says(status(404)), "/8": BAD["/noai"][0]}) as server:
        paths = [f"/{number}" for number in range(40)]
        (tmp_path / "list.csv").write_text("url,caption\n" + "".join(f"{server.url(path)},number {path[1:]}\n" for path in [*paths, "/3"]))
        arguments = [sys.executable, "-c", KILLED, str(tmp_path / "list.csv"), str(tmp_path / "t.lance")]
        process = subprocess.Popen(arguments, stdout=subprocess.PIPE)
        assert process.stdout is not None
        while int(process.stdout.readline()) < 12:
            pass
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert sum(server.asked.values()) < 40
        time.sleep(0.1)
        with open(tmp_path / "t.lance.part" / "fetched" / "journal.jsonl", "ab") as file:
            file.write(b'{"url": "cut o')
        table, report = ingest(str(tmp_path / "list.csv"), tmp_path / "t.lance", HASTY)
        assert sum(count > 1 for count in server.asked.values()) <= 1  # what was under way
        rows = {row["id"]: row for row in table.read(table.columns).to_pylist()}
        assert list(rows) == [server.url(path) for path in paths]
        assert [bad.reason for bad in report.aside] == ["a second item of this id"]
        for path in paths:
            row = rows[server.url(path)]
            fault = {"/7": "status 404", "/8": "opted out: X-Robots-Tag"}.get(path, "")
            assert (row["fault"], row["opt_out"], row["content"]) == (fault, True if path == "/8" else None, None if fault else PNG)
            assert (row["url"], row["captions"], row["source"]) == (server.url(path), [f"number {path[1:]}"], "list.csv")
        assert not (tmp_path / "t.lance.part").exists()
        before = server.asked.copy()
        _, report = ingest(str(tmp_path / "list.csv"), tmp_path / "t.lance", HASTY)
        assert (report.rows, report.known, server.asked) == (0, 41, before)


def test_a_journal_takes_over_only_what_is_whole(tmp_path: Path) -> None:
    with served() as server:
        journal = download(map(server.url, ("/a", "/b")), tmp_path, HASTY)
        (tmp_path / "0.part").write_bytes(b"left")
        lines = (tmp_path / "journal.jsonl").read_bytes()
        (tmp_path / "journal.jsonl").write_bytes(lines[:-5])
        with Journal(tmp_path) as again:
            assert len(again.results) == 1
            assert (tmp_path / "journal.jsonl").read_bytes() == lines[: lines.index(b"\n") + 1]
            assert not (tmp_path / "0.part").exists()
        (result,) = again.results.values()
        journal.path(result).write_bytes(b"cut")
        with Journal(tmp_path) as again:
            assert again.results == {}
    assert [json.loads(line)["sha256"] for line in lines.splitlines()] == [DIGEST, DIGEST]


def test_a_full_disk_is_not_the_servers_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(file: int) -> None:
        raise OSError(28, "No space left on device")

    with served() as server:
        monkeypatch.setattr(fetches.os, "fsync", full)
        with pytest.raises(UserError, match="No space left on device; make room"):
            fetch(server.url("/a"), tmp_path / "a", HASTY)
        assert not (tmp_path / "a").exists()


def test_a_disk_that_takes_a_part_is_full(tmp_path: Path) -> None:
    class Nearly(io.FileIO):
        def write(self, data: object, /) -> int:
            return 2

    with Nearly(tmp_path / "a", "w") as file, pytest.raises(OSError, match="No space left"):
        fetches.write(file, b"abc")
