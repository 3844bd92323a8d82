"""Captions by a model that looks: several of each picture, short and long.

DALL-E 3 (Betker et al. 2023, section 2) is trained on long captions of a model and a few of those that were found; which of them a sample
gets is decided when it is drawn (`data.captions.choose`), so all are kept. A captioner is a network of transformers, or whatever speaks
OpenAI's protocol (`curation.endpoint`): a server of one's own for many pictures, or a paid one, whose price is told before.
"""

import hashlib
import io
import json
import os
import threading
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeVar

from PIL import Image

from mezzotint import config
from mezzotint.curation.stage import Compute, EngineName, Progress, Stage, run
from mezzotint.data.decode import UnusableError, decode
from mezzotint.data.table import NOTES, Table
from mezzotint.errors import UserError

if TYPE_CHECKING:
    import pyarrow as pa

JOURNAL = "captions"  # folder in a table's notes: what was paid for, until it is in the table


@dataclass
class Said:
    """What is said of a picture; or why nothing is, in `error`."""

    short: list[str] = field(default_factory=list)
    long: list[str] = field(default_factory=list)
    error: str = ""


Say = Callable[[Image.Image], Said]
In = TypeVar("In")
Out = TypeVar("Out")


@dataclass(frozen=True)
class Estimate:
    """What captions will take. rows: pictures to do. tokens_in, tokens_out: read and written by the model. price: in dollars."""

    rows: int
    tokens_in: int
    tokens_out: int
    price: float


@dataclass
class Captioner(config.Config, ABC, kind="captioner"):
    """short, long: how many captions of each kind. short_tokens, long_tokens: how long each may be. seed: of what is drawn."""

    short: int = 2
    long: int = 1
    short_tokens: int = 24
    long_tokens: int = 160
    seed: int = 0
    free: ClassVar[tuple[str, ...]] = ()  # settings that do not change what is said
    at_once: ClassVar[int] = 1  # pictures

    def __post_init__(self) -> None:
        if min(self.short, self.long) < 0 or self.short + self.long == 0:
            raise ValueError(f"short and long must be at least 0, one of them above, got {self.short} and {self.long}")

    @abstractmethod
    def build(self) -> Say:
        """What says them, made once in each worker."""

    def estimate(self, rows: int) -> Estimate:
        """For so many pictures, at most."""
        return Estimate(rows, 0, rows * (self.short * self.short_tokens + self.long * self.long_tokens), 0.0)

    @property
    def identity(self) -> dict[str, Any]:
        """What decides what is said."""
        return {name: value for name, value in self.to_data().items() if name not in self.free}


@dataclass
class Network(Captioner, kind="network captioner"):
    """A network of transformers that reads a picture: BLIP, GIT, encoder and decoder, or a language model that sees (LLaVA, Qwen-VL, ...).

    path: a folder or hub id; only safetensors are read. Those that follow instructions are given them, others are only held to the lengths.
    One picture at a time, so that what is said of it does not depend on its neighbours.
    """

    path: str = ""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    temperature: float = 0.8
    short_instruction: str = "Describe this picture in one short sentence."
    long_instruction: str = "Describe everything that is visible in this picture, in a few sentences, without guessing."
    free = ("device",)

    def build(self) -> Say:
        if not self.path:
            raise UserError("a captioner needs a model; set path to a folder with an image-to-text network of transformers")
        from mezzotint.pipeline import find_device
        from mezzotint.rewards.published import network

        model = network("AutoModelForImageTextToText", self.path).to(find_device(self.device))
        prepare, write = _processor(self.path)

        def say(image: Image.Image) -> Said:
            def some(count: int, instruction: str, least: int, most: int) -> list[str]:
                if not count:
                    return []
                inputs = prepare(image, instruction).to(model.device)
                known = inputs["input_ids"].shape[1] if "input_ids" in inputs and not model.config.is_encoder_decoder else 0
                found = _drawn(model, inputs, count, (least, most), self.temperature, f"{self.seed} {instruction}")
                return tidy(write(found[:, known:]))

            short = some(self.short, self.short_instruction, 0, self.short_tokens)
            return Said(short, some(self.long, self.long_instruction, min(self.short_tokens, self.long_tokens - 1), self.long_tokens))

        return say


def _drawn(model: Any, inputs: Any, count: int, tokens: tuple[int, int], temperature: float, seed: str) -> Any:
    """(count, L) tokens, the same for the same picture."""
    import torch

    how = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
    with torch.no_grad(), torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []):
        torch.manual_seed(int.from_bytes(hashlib.sha256(seed.encode()).digest()[:6]))
        return model.generate(
            **inputs, **how, min_new_tokens=tokens[0], max_new_tokens=tokens[1], num_return_sequences=count if temperature > 0 else 1
        )


def _processor(path: str) -> tuple[Callable[[Image.Image, str], Any], Callable[[Any], list[str]]]:
    """How a picture (and an instruction, for those that take one) becomes a network's inputs, and tokens become texts."""
    from mezzotint.rewards.published import pretrained

    pictures, tokenizer = pretrained("AutoImageProcessor", path), pretrained("AutoTokenizer", path)

    def write(tokens: Any) -> list[str]:
        found: list[str] = tokenizer.batch_decode(tokens, skip_special_tokens=True)
        return found

    if tokenizer.chat_template is None:
        return lambda image, instruction: pictures(image, return_tensors="pt"), write
    whole = pretrained("AutoProcessor", path)

    def prepare(image: Image.Image, instruction: str) -> Any:
        said = [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": instruction}]}]
        return whole.apply_chat_template(said, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt")

    return prepare, write


def tidy(texts: Sequence[str]) -> list[str]:
    """Texts in one line each, without repetitions and blank ones."""
    return list(dict.fromkeys(line for line in (" ".join(text.split()) for text in texts) if line))


@dataclass
class Captions(Stage, kind="captions"):
    """captions_short, captions_long: null where nothing was said, for the reason in caption_error ("" where it was).

    journal: a folder where what was said of a picture is kept at once, so that nothing is asked twice after a kill but what was under
    way; "" for none. Rows that have a fault are not asked about.
    """

    captioner: Captioner
    journal: str = ""
    reads: ClassVar[tuple[str, ...]] = ("content", "fault")

    @property
    def writes(self) -> "pa.Schema":
        import pyarrow as pa

        texts = pa.list_(pa.string())
        return pa.schema([("captions_short", texts), ("captions_long", texts), ("caption_error", pa.string())])

    @property
    def stamp(self) -> dict[str, Any]:
        return {"stage": {"kind": self.kind, "captioner": self.captioner.identity}, "revision": self.revision}

    def open(self) -> Compute:
        import pyarrow as pa

        say = self.captioner.build()
        say_of = Journal(Path(self.journal), self.captioner.identity).kept(say) if self.journal else partial(_seen, say=say)

        def compute(batch: pa.RecordBatch) -> pa.RecordBatch:
            contents = [
                content if not fault else None
                for content, fault in zip(batch["content"].to_pylist(), batch["fault"].to_pylist(), strict=True)
            ]
            different = list(dict.fromkeys(content for content in contents if content))
            of = dict(zip(different, in_order(say_of, different, self.captioner.at_once), strict=True))
            said = [of[content] if content else Said(error="not asked: the row has no picture that can be used") for content in contents]
            columns = [[x.short if not x.error else None for x in said], [x.long if not x.error else None for x in said]]
            arrays = [pa.array(column, pa.list_(pa.string())) for column in columns]
            return pa.record_batch([*arrays, pa.array([x.error for x in said], pa.string())], schema=self.writes)

        return compute


def _seen(content: bytes, say: Say) -> Said:
    try:
        image = decode(content)
    except UnusableError as error:
        return Said(error=str(error))
    return say(image)


class Journal:
    """What was said of pictures, one line of JSON each, every worker in its own file. A line that a kill tore is passed over."""

    def __init__(self, folder: Path, identity: dict[str, Any]) -> None:
        self.folder, self.identity = folder, json.dumps(identity, sort_keys=True).encode()
        folder.mkdir(parents=True, exist_ok=True)
        self.said = {key: Said(**said) for key, said in self._read()}
        self.file: io.TextIOWrapper | None = None
        self.lock = threading.Lock()

    def _read(self) -> Iterator[tuple[str, dict[str, Any]]]:
        for file in sorted(self.folder.glob("*.jsonl")):
            for line in file.read_bytes().splitlines():
                try:
                    entry = json.loads(line)
                except ValueError:
                    continue
                yield entry["key"], entry["said"]

    def key(self, content: bytes) -> str:
        """Of a picture, asked about by this captioner."""
        return hashlib.sha256(self.identity + hashlib.sha256(content).digest()).hexdigest()

    def kept(self, say: Say) -> Callable[[bytes], Said]:
        """`say`, which is asked about the bytes of a picture once."""

        def say_of(content: bytes) -> Said:
            key = self.key(content)
            if key not in self.said:
                said = _seen(content, say)
                self._note(key, said)
            return self.said[key]

        return say_of

    def _note(self, key: str, said: Said) -> None:
        with self.lock:
            if self.file is None:
                self.file = open(self.folder / f"{uuid.uuid4().hex}.jsonl", "w")  # noqa: SIM115  # as long as the worker lives
            self.file.write(json.dumps({"key": key, "said": vars(said)}) + "\n")
            self.file.flush()
            os.fsync(self.file.fileno())
            self.said[key] = said


def in_order(work: Callable[[In], Out], items: Sequence[In], at_once: int) -> list[Out]:
    """What `work` makes of each item. Where one fails, those under way are ended, no other is begun, and that error is raised."""
    if at_once == 1:
        return [work(item) for item in items]
    with ThreadPoolExecutor(at_once) as pool:
        futures = [pool.submit(work, item) for item in items]
        try:
            return [future.result() for future in futures]
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def estimate(table: Table, captioner: Captioner) -> Estimate:
    """What the pictures of a table will take that are not in its journal, each different one once."""
    journal, todo = Journal(_journal(table), captioner.identity), set()
    for batch in table.batches(["content", "fault"], rows=64):
        for content, fault in zip(batch["content"].to_pylist(), batch["fault"].to_pylist(), strict=True):
            if content and not fault and (key := journal.key(content)) not in journal.said:
                todo.add(key)
    return captioner.estimate(len(todo))


def caption(table: Table, captioner: Captioner, engine: EngineName = "native", workers: int = 1, progress: Progress | None = None) -> Table:
    """The table with captions; what is said of a picture is on the disk before the next one is asked about. The caller holds its lock."""
    return run(table, Captions(captioner, str(_journal(table))), engine, workers, progress)


def _journal(table: Table) -> Path:
    return table.path / NOTES / JOURNAL
