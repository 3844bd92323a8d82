"""Where it fits: lists of addresses to files on this disk, without being a burden to anyone.

In: addresses, and manners (`data.fetch`). Out: a journal: a folder with each file under its digest, and a line for each address.
How: each host has a queue of its own, from which no more is taken at once, and no sooner, than manners allow; so a slow host holds up
nobody else, and what waits for a second try holds up no thread.
Gotchas: what the journal has a line for is not asked for again. Killed at any moment, the same call asks again only for what was under way.
"""

import heapq
import json
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from queue import SimpleQueue
from typing import Self

from mezzotint.data.fetch import Again, Fetched, Manners, RefusedError, fetch, host_of, our_disk, write

WINDOW = 4096  # addresses that wait at the same time
BATCH = 64  # lines of the journal that a power cut may cost
SILENT = 10  # requests in a row that a host leaves without an answer before it is given up
GIVEN_UP = f"connection: the host left {SILENT} requests without an answer"


@dataclass(frozen=True, slots=True)
class Result:
    """What became of an address: a file by its digest, or the reason why there is none. opt_out: the owner said so."""

    url: str
    sha256: str = ""
    length: int = 0
    fault: str = ""
    opt_out: bool = False


Results = SimpleQueue[Result | BaseException]


class Journal:
    """Results by address, on the disk."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.results, self.unsafe = folder, dict[str, Result](), 0
        folder.mkdir(parents=True, exist_ok=True)
        for left in folder.glob("*.part"):
            left.unlink()
        self.file = open(folder / "journal.jsonl", "a+b", buffering=0)  # noqa: SIM115  # closed by `__exit__`
        self._read()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        os.fsync(self.file.fileno())
        self.file.close()

    def _read(self) -> None:
        """Take over what an earlier call noted, up to a line that was cut off, with which the file ends from now on."""
        end = 0
        with open(self.file.name, "rb") as lines:
            for line in lines:
                try:
                    result = Result(**json.loads(line))
                except (ValueError, TypeError):
                    break
                if not line.endswith(b"\n"):
                    break
                end += len(line)
                if not result.sha256 or self._holds(result):
                    self.results[result.url] = result
        self.file.truncate(end)

    def _holds(self, result: Result) -> bool:
        try:
            return self.path(result).stat().st_size == result.length
        except OSError:
            return False

    def path(self, result: Result) -> Path:
        """Where the file of a result lies."""
        return self.folder / result.sha256[:2] / result.sha256

    def keep(self, url: str, fetched: Fetched) -> Result:
        """Put a file in its place."""
        result = Result(url, fetched.sha256, fetched.length)
        with our_disk(self.path(result)):
            self.path(result).parent.mkdir(exist_ok=True)
            fetched.path.replace(self.path(result))
        return result

    def note(self, result: Result) -> None:
        """Remember a result."""
        self.results[result.url] = result
        self.unsafe += 1
        with our_disk(self.folder):
            write(self.file, json.dumps(asdict(result)).encode() + b"\n")
            if self.unsafe >= BATCH:
                os.fsync(self.file.fileno())
                self.unsafe = 0


def download(urls: Iterable[str], folder: Path, manners: Manners | None = None, progress: Callable[[int], None] | None = None) -> Journal:
    """Ask for each address that the journal in `folder` has no line for. `progress` is told how many have one."""
    manners = manners or Manners()
    results: Results = SimpleQueue()
    pending: set[str] = set()
    with Journal(folder) as journal:
        queue = _Queue(manners, results)

        def collect() -> None:
            result = results.get()
            if isinstance(result, BaseException):
                raise result
            pending.discard(result.url)
            journal.note(result)
            if progress:
                progress(len(journal.results))

        for number in range(manners.threads):
            threading.Thread(target=_work, args=(queue, journal, manners, folder / f"{number}.part"), daemon=True).start()
        try:
            for url in urls:
                if url not in journal.results and url not in pending:
                    pending.add(url)
                    queue.put(_Job(url, url))
                    while len(pending) >= WINDOW:
                        collect()
            while pending:
                collect()
        finally:
            queue.close()
    return journal


@dataclass
class _Job:
    """origin: the address in the list. url: where it leads by now, after so many hops and tries."""

    origin: str
    url: str
    hops: int = 0
    tries: int = 0


@dataclass
class _Host:
    waiting: deque[_Job] = field(default_factory=deque)
    active: int = 0
    free: float = 0.0  # when it may be asked again
    listed: bool = False  # among those that are ready
    silent: int = 0  # requests since it last answered

    @property
    def in_use(self) -> bool:
        return bool(self.active or self.waiting or self.listed)


class _Queue:
    """Jobs by host; gives out those whose host may be asked, and says of those that no one need be asked for what became of them."""

    def __init__(self, manners: Manners, results: Results) -> None:
        self.manners, self.results = manners, results
        self.condition, self.closed, self.number = threading.Condition(), False, 0
        self.hosts: dict[str, _Host] = {}
        self.ready: list[tuple[float, int, str]] = []  # hosts with jobs, by when they are free
        self.later: list[tuple[float, int, str, _Job]] = []  # jobs that wait for a second try

    def put(self, job: _Job, after: float = 0.0, rests: bool = False) -> None:
        """Add a job, due at once or after so many seconds; `rests`: until then the host is not asked for anything."""
        try:
            host = host_of(job.url)
        except RefusedError as error:
            self.results.put(Result(job.origin, fault=str(error)))
            return
        with self.condition:
            now = time.monotonic()
            if len(self.hosts) > 4 * WINDOW:
                self.hosts = {name: state for name, state in self.hosts.items() if state.in_use or state.free > now}
            state = self.hosts.setdefault(host, _Host())
            if rests:
                state.free = max(state.free, now + after)
            if after:
                self.number += 1
                heapq.heappush(self.later, (now + after, self.number, host, job))
            elif state.silent >= SILENT:
                self.results.put(Result(job.origin, fault=GIVEN_UP))
            else:
                state.waiting.append(job)
                self._list(host)
            self.condition.notify()

    def take(self) -> tuple[str, _Job] | None:
        """The next job with its host, when it may be asked; None when there will be no more."""
        with self.condition:
            while not self.closed:
                now = time.monotonic()
                while self.later and self.later[0][0] <= now:
                    _, _, host, job = heapq.heappop(self.later)
                    self.hosts.setdefault(host, _Host()).waiting.append(job)
                    self._list(host)
                if self.ready and self.ready[0][0] <= now:
                    found = self._first(now)
                    if found:
                        return found
                    continue
                times = [entries[0][0] for entries in (self.ready, self.later) if entries]
                self.condition.wait(min(times) - now if times else None)
        return None

    def done(self, host: str, silent: bool) -> None:
        """A request has ended. What waits for a host that has been silent for too long is given up."""
        with self.condition:
            state = self.hosts[host]
            state.active -= 1
            state.silent = state.silent + 1 if silent else 0
            if state.silent >= SILENT:
                for job in state.waiting:
                    self.results.put(Result(job.origin, fault=GIVEN_UP))
                state.waiting.clear()
            self._list(host)
            self.condition.notify()

    def close(self) -> None:
        """No more jobs are given out."""
        with self.condition:
            self.closed = True
            self.condition.notify_all()

    def _first(self, now: float) -> tuple[str, _Job] | None:
        """A job of the host that is ready first, if it still has one and was not told to rest since."""
        _, _, host = heapq.heappop(self.ready)
        state = self.hosts[host]
        state.listed = False
        if not state.waiting or state.free > now:
            self._list(host)
            return None
        state.active += 1
        state.free = now + self.manners.delay
        job = state.waiting.popleft()
        self._list(host)
        return host, job

    def _list(self, host: str) -> None:
        state = self.hosts[host]
        if state.waiting and state.active < self.manners.hosts and not state.listed:
            state.listed = True
            self.number += 1
            heapq.heappush(self.ready, (state.free, self.number, host))


def _work(queue: _Queue, journal: Journal, manners: Manners, part: Path) -> None:
    """What each thread does, until the queue is closed."""
    while taken := queue.take():
        host, job = taken
        try:
            answer = _ask(job, journal, manners, part)
        except BaseException as error:  # no server's fault: the call ends with it
            queue.results.put(error)
            return
        queue.done(host, isinstance(answer, Again) and answer.silent)
        if isinstance(answer, Again):
            _follow(queue, job, answer, manners)
        else:
            queue.results.put(answer)


def _ask(job: _Job, journal: Journal, manners: Manners, part: Path) -> Result | Again:
    try:
        answer = fetch(job.url, part, manners)
    except RefusedError as error:
        return Result(job.origin, fault=str(error), opt_out=error.opt_out)
    return answer if isinstance(answer, Again) else journal.keep(job.origin, answer)


def _follow(queue: _Queue, job: _Job, again: Again, manners: Manners) -> None:
    """Ask again, there or then, unless that was done often enough."""
    if not again.reason:
        if job.hops < manners.redirects:
            queue.put(_Job(job.origin, again.url, job.hops + 1))
        else:
            queue.results.put(Result(job.origin, fault=f"more than {manners.redirects} redirects"))
    elif job.tries == manners.retries or again.after > manners.patience:
        wanted = f", and it asks for {again.after:,.0f} s of patience" if again.after > manners.patience else ""
        queue.results.put(Result(job.origin, fault=f"{again.reason}{wanted}"))
    else:
        after = max(again.after, manners.backoff * 2**job.tries)
        queue.put(_Job(job.origin, job.url, job.hops, job.tries + 1), after, rests=not again.silent)
