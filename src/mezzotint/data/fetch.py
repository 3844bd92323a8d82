"""Where it fits: one request for a file of a stranger's server.

In: an address. Out: the file on the disk, or an `Again` (another address, or the same one later), or a `RefusedError` with the reason.
How: the name is resolved here, the address is checked here, and the connection goes to that very address: a name that resolves to another
one a moment later (DNS rebinding) gains nothing. Every read ends by one deadline, however the server spaces its bytes.
Gotchas: proxies that the environment names are not used: they would resolve names themselves.
"""

import email.utils
import errno
import hashlib
import http.client
import io
import ipaddress
import os
import re
import socket
import ssl
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from email.message import Message
from functools import lru_cache
from pathlib import Path
from typing import Any
from urllib.parse import SplitResult, quote, urljoin, urlsplit

from mezzotint.data.header import too_large
from mezzotint.errors import UserError

AGENT = "mezzotint"
OPTED_OUT = {"noai", "noimageai"}
# What may follow a colon in X-Robots-Tag though the word before it is no one's name.
RULES = {"unavailable_after", "max-snippet", "max-image-preview", "max-video-preview"}
# Not for the public, though some versions of Python take them for it: a cloud's metadata at an address like any other, then ranges.
NOT_PUBLIC = [ipaddress.ip_network(text) for text in ("168.63.129.16/32", "192.0.0.0/24", "192.88.99.0/24", "fec0::/10")]
TRANSLATED = ipaddress.ip_network("64:ff9b::/96")  # IPv4 within IPv6 (NAT64)
FILES = re.compile(r"(image|video)/|(application|binary)/octet-stream", re.IGNORECASE)
CHUNK = 1 << 16

Network = ipaddress.IPv4Network | ipaddress.IPv6Network
Address = ipaddress.IPv4Address | ipaddress.IPv6Address


@dataclass(frozen=True)
class Manners:
    """How the downloader behaves.

    hosts: requests at one host at the same time; delay: seconds from the start of one to the start of the next. threads: requests at
    the same time in all. timeout: seconds to connect, and between bytes; deadline: of a whole request. limit: bytes of a file.
    redirects: how many are followed. retries: how often an address is asked again that was busy or failed; backoff: seconds before the
    first time, doubled each time; patience: a server that asks for more seconds than that is left alone. agent: how we call ourselves.
    allowed: networks that may be asked although they are not public; for tests.
    """

    hosts: int = 2
    delay: float = 0.1
    threads: int = 16
    timeout: float = 10.0
    deadline: float = 60.0
    limit: int = 1 << 26
    redirects: int = 5
    retries: int = 3
    backoff: float = 2.0
    patience: float = 120.0
    agent: str = f"{AGENT}/0.1"
    allowed: Sequence[Network] = ()


class RefusedError(Exception):
    """A file that is not taken; the message is the reason. `opt_out`: because its owner said so."""

    def __init__(self, reason: str, opt_out: bool = False) -> None:
        super().__init__(reason)
        self.opt_out = opt_out


@dataclass(frozen=True)
class Again:
    """What to ask next, and not before so many seconds; without a reason it is a redirect. silent: nobody answered."""

    url: str
    after: float = 0.0
    reason: str = ""
    silent: bool = False


@dataclass(frozen=True)
class Fetched:
    """A file that came: its digest and length in bytes, at `path`."""

    path: Path
    sha256: str
    length: int


def host_of(url: str) -> str:
    """Whom an address asks. `RefusedError` if it is none that may be asked."""
    return _split(url)[1]


def fetch(url: str, to: Path, manners: Manners) -> Fetched | Again:
    """Ask once. The file comes to `to`, which is not there if it does not come whole."""
    parts, host = _split(url)
    end = time.monotonic() + manners.deadline
    try:
        with _asked(parts, host, end, manners) as response:
            if opted_out(response.headers):
                raise RefusedError("opted out: X-Robots-Tag", opt_out=True)
            if response.status in (301, 302, 303, 307, 308):
                return Again(urljoin(url, _printable(response.headers.get("Location") or "")))
            if response.status == 429 or response.status >= 500:
                return Again(url, _retry_after(response.headers), f"status {response.status}")
            _check(response, manners)
            return _save(response, to, manners.limit)
    except TimeoutError:
        return Again(url, reason=f"no answer in {manners.timeout:g} s, or no end in {manners.deadline:g} s", silent=True)
    except ssl.SSLCertVerificationError as error:
        raise RefusedError(f"certificate: {error.verify_message}") from None
    except (OSError, ValueError, http.client.HTTPException) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else repr(error)
        return Again(url, reason=f"connection: {' '.join(reason.split())[:200]}", silent=True)


def opted_out(headers: Message, agent: str = AGENT) -> bool:
    """Whether `X-Robots-Tag` says noai or noimageai, to all or to us by name."""
    for value in headers.get_all("X-Robots-Tag", []):
        name = re.match(r"\s*([\w*.-]+)\s*:(.*)", value, re.DOTALL)
        if name and name[1].lower() not in RULES:
            if name[1].lower() not in ("*", agent):
                continue
            value = name[2]
        if OPTED_OUT & {word.strip().lower() for word in value.split(",")}:
            return True
    return False


def is_public(address: Address) -> bool:
    """Whether an address is one of the open Internet, also where one of IPv4 is hidden in one of IPv6."""
    if isinstance(address, ipaddress.IPv6Address):
        translated = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF) if address in TRANSLATED else None
        hidden = address.ipv4_mapped or address.sixtofour or translated
        if hidden or address.teredo:
            return hidden is not None and is_public(hidden)
    if address.is_multicast or address.is_reserved or any(address in network for network in NOT_PUBLIC):
        return False
    return address.is_global


def resolve(host: str, port: int, allowed: Sequence[Network] = ()) -> list[str]:
    """The addresses of a host, all of which may be asked; `RefusedError` if one may not."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except UnicodeError:
        raise RefusedError("refused: not an address") from None
    except socket.gaierror as error:
        if error.errno == socket.EAI_NONAME:
            raise RefusedError(f"no host of the name {host!r}") from None
        raise
    addresses = list(dict.fromkeys(str(entry[4][0]) for entry in found))
    for text in addresses:
        address = ipaddress.ip_address(text.partition("%")[0])
        if not is_public(address) and not any(address in network for network in allowed):
            raise RefusedError(f"refused: {host!r} is at {address}, which is not public")
    return addresses


class _Timed(io.RawIOBase):
    """What a socket sends, no later than a deadline."""

    def __init__(self, sock: socket.socket, timeout: float, end: float) -> None:
        self.sock, self.timeout, self.end = sock, timeout, end

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int:
        self.sock.settimeout(_remaining(self.timeout, self.end))
        return self.sock.recv_into(buffer)


class _Socket:
    """What http.client needs of a socket, with the deadline."""

    def __init__(self, sock: socket.socket, timeout: float, end: float) -> None:
        self.sock, self.timeout, self.end = sock, timeout, end

    def sendall(self, data: bytes) -> None:
        self.sock.settimeout(_remaining(self.timeout, self.end))
        self.sock.sendall(data)

    def makefile(self, mode: str) -> io.BufferedReader:
        return io.BufferedReader(_Timed(self.sock, self.timeout, self.end))

    def close(self) -> None:
        """Nothing: http.client closes when the headers are read, and `_asked` when the file is."""


def _remaining(timeout: float, end: float) -> float:
    left = end - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return min(timeout, left)


def _printable(url: str) -> str:
    """An address as a request may hold it: what is not ASCII in percent."""
    return quote(url.encode("utf-8", "surrogateescape"), safe="/%:=&?~#+!$,;'@()*[]|")


def _split(url: str) -> tuple[SplitResult, str]:
    """The parts of an address and its host."""
    try:
        parts = urlsplit(url.strip())
        host, _ = parts.hostname, parts.port
    except ValueError:
        raise RefusedError("refused: not an address") from None
    if parts.scheme not in ("http", "https"):
        raise RefusedError(f"refused: {parts.scheme[:20] or 'no scheme'!r} is neither http nor https")
    if not host or parts.username is not None:
        raise RefusedError("refused: an address without a host" if not host else "refused: an address with a password")
    return parts, host


@contextmanager
def _asked(parts: SplitResult, host: str, end: float, manners: Manners) -> Iterator[http.client.HTTPResponse]:
    """The answer to a request, its headers read."""
    secure = parts.scheme == "https"
    port = parts.port or (443 if secure else 80)
    addresses = resolve(host, port, manners.allowed)
    sock = _connected(addresses, port, end, manners)
    try:
        if secure:
            sock.settimeout(_remaining(manners.timeout, end))
            sock = _context().wrap_socket(sock, server_hostname=host)
        connection = http.client.HTTPConnection(host, port)  # for the form of the request alone: it has its socket already
        connection.sock = _Socket(sock, manners.timeout, end)
        target = _printable(parts.path or "/") + (f"?{_printable(parts.query)}" if parts.query else "")
        connection.putrequest("GET", target, skip_host=True, skip_accept_encoding=True)
        name = f"[{host}]" if ":" in host else host.encode("idna").decode()
        connection.putheader("Host", name if parts.port is None else f"{name}:{port}")
        wishes = {"User-Agent": manners.agent, "Accept": "image/*,video/*", "Accept-Encoding": "identity", "Connection": "close"}
        for key, value in wishes.items():
            connection.putheader(key, value)
        connection.endheaders()
        with connection.getresponse() as response:
            yield response
    except (UnicodeError, http.client.InvalidURL):
        raise RefusedError("refused: not an address") from None
    finally:
        with suppress(OSError):
            sock.close()


@lru_cache(maxsize=1)
def _context() -> ssl.SSLContext:
    return ssl.create_default_context()  # which reads all certificates


def _connected(addresses: list[str], port: int, end: float, manners: Manners) -> socket.socket:
    """A connection to the first of these addresses that takes one."""
    for number, address in enumerate(addresses, 1):
        try:
            return socket.create_connection((address, port), _remaining(manners.timeout, end))
        except OSError:
            if number == len(addresses):
                raise
    raise OSError("no address")


def _retry_after(headers: Message) -> float:
    """Seconds that a server asks for, 0 if it does not. A time of day is compared with the server's own, since clocks differ."""
    value = (headers.get("Retry-After") or "").strip()
    if re.fullmatch(r"\d{1,9}", value):
        return float(value)
    with suppress(TypeError, ValueError, OverflowError):
        then, now = (email.utils.parsedate_to_datetime(text) for text in (value, headers.get("Date") or ""))
        return max(0.0, (then - now).total_seconds())
    return 0.0


def _check(response: http.client.HTTPResponse, manners: Manners) -> None:
    """Refuse by the headers what need not be read."""
    if response.status != 200:
        raise RefusedError(f"status {response.status}")
    kind = response.headers.get("Content-Type")
    if kind and not FILES.match(kind):
        raise RefusedError(f"not an image by its type: {kind.partition(';')[0].strip()[:60]}")
    coded = response.headers.get("Content-Encoding", "identity")
    if coded.lower() not in ("identity", ""):
        raise RefusedError(f"coded, which was not asked for: {coded[:20]}")
    if response.length is not None and response.length > manners.limit:
        raise RefusedError(too_large(manners.limit))


def _save(response: http.client.HTTPResponse, to: Path, limit: int) -> Fetched:
    """Write what comes, until it is whole, and until the disk has it."""
    digest, length = hashlib.sha256(), 0
    try:
        with our_disk(to):
            file = open(to, "wb", buffering=0)  # noqa: SIM115  # closed below
        with file:
            while part := response.read(CHUNK):
                length += len(part)
                if length > limit:
                    raise RefusedError(too_large(limit))
                digest.update(part)
                with our_disk(to):
                    write(file, part)
            if response.length:
                raise http.client.IncompleteRead(b"", response.length)
            with our_disk(to):
                os.fsync(file.fileno())
    except BaseException:
        with suppress(OSError):
            os.unlink(to)
        raise
    return Fetched(to, digest.hexdigest(), length)


def write(file: io.FileIO, data: bytes) -> None:
    """Write all of it: a disk that is nearly full may take a part, and say so only by the count."""
    if file.write(data) != len(data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@contextmanager
def our_disk(path: Path) -> Iterator[None]:
    """A fault of the disk must not be taken for one of the server."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{str(path.parent)!r} cannot be written, {error.strerror}; make room and give the same command again") from error
