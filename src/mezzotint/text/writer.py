"""A writer of longer prompts that is trained here: a small causal transformer over bytes (Radford et al. 2019).

    short, line feed, long, zero

is one text; a network says of every byte what the next one is, p(y_i | y_<i), and what is learned and drawn is what follows the line feed.
There is no vocabulary but the 256 bytes, so that any text in any language can be read and written, and no tokenizer file is needed.

Where we differ: what the first block sees of a place are its byte and the `NEAR` before it, so that a single block can find where these
stood before and what followed (as the smeared keys of Olsson et al. 2022 do), and copying is learned sooner; positions are rotations,
queries and keys are normalised per head, no layer has a bias, and blocks start as identities.

B batch, L bytes, D width.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mezzotint import config
from mezzotint.errors import UserError
from mezzotint.models.attention import QKV, attend
from mezzotint.models.blocks import MLP
from mezzotint.models.embed import rope, rotate

BYTES, END, BREAK = 256, 0, 10
NEAR = 3  # bytes before each that are seen with it
CONFIG_FILE, WEIGHTS_FILE = "writer.json", "writer.safetensors"

Seen = tuple[Tensor, Tensor]  # keys and values of a block, (B, heads, L, d) each
Past = tuple[Tensor, list[Seen]]  # bytes (B, L), and what every block has seen of them


@dataclass
class ByteWriterConfig(config.Config, kind="byte_writer"):
    """Sizes. length: most bytes of a short text, a long one and what is between and behind them."""

    width: int = 128
    depth: int = 4
    heads: int = 4
    length: int = 384

    def build(self) -> "ByteWriter":
        return ByteWriter(self)


class CausalBlock(nn.Module):
    """A pre-norm transformer block whose places see those before them. It starts as the identity."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim, bias=False)
        self.qkv = QKV(dim, heads, bias=False, norm="head")
        self.out = nn.Linear(dim, dim, bias=False)
        self.norm_mlp = nn.LayerNorm(dim, bias=False)
        self.mlp = MLP(dim, bias=False)
        for last in (self.out, self.mlp[-1]):
            assert isinstance(last, nn.Linear)
            nn.init.zeros_(last.weight)

    def forward(self, x: Tensor, rotation: Tensor, mask: Tensor, past: Seen | None) -> tuple[Tensor, Seen]:
        q, k, v = self.qkv(self.norm(x))
        q, k = rotate(q, rotation), rotate(k, rotation)
        if past is not None:
            k, v = torch.cat([past[0], k], dim=2), torch.cat([past[1], v], dim=2)
        x = x + self.out(attend(q, k, v, mask))
        return x + self.mlp(self.norm_mlp(x)), (k, v)


class ByteWriter(nn.Module):
    """Bytes (B, L) int64 -> logits (B, L, 256) of the byte after each. All bytes are equally likely at first."""

    def __init__(self, config: ByteWriterConfig) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.ModuleList(nn.Embedding(BYTES, config.width) for _ in range(1 + NEAR))
        self.blocks = nn.ModuleList(CausalBlock(config.width, config.heads) for _ in range(config.depth))
        self.norm = nn.LayerNorm(config.width, bias=False)
        self.head = nn.Linear(config.width, BYTES, bias=False)
        nn.init.zeros_(self.head.weight)

    def forward(self, tokens: Tensor, past: Past | None = None) -> tuple[Tensor, Past]:
        """Logits, and what a call that goes on from here is to be given as `past`."""
        known, seen = (tokens, None) if past is None else (torch.cat([past[0], tokens], dim=1), past[1])
        whole, start = known.shape[1], known.shape[1] - tokens.shape[1]
        place = torch.arange(whole, device=tokens.device)
        rotation = rope(place[start:, None].float(), (self.config.width // self.config.heads,))
        mask = (place <= place[start:, None]).expand(len(tokens), -1, -1)
        x, now = self._embedded(known, start), []
        for number, block in enumerate(self.blocks):
            x, of_block = block(x, rotation, mask, seen[number] if seen else None)
            now.append(of_block)
        return self.head(self.norm(x)), (known, now)

    def _embedded(self, known: Tensor, start: int) -> Tensor:
        """(B, L - start, D) of bytes (B, L) from `start` on, each with those before it; before the first there are zeros."""
        padded, length = F.pad(known, (NEAR, 0)), known.shape[1]
        return torch.stack([embed(padded[:, start + NEAR - back : length + NEAR - back]) for back, embed in enumerate(self.embed)]).sum(0)

    def texts(self, short: Sequence[str], long: Sequence[str]) -> tuple[Tensor, Tensor]:
        """B pairs as bytes (B, L), padded with zeros, and where each has what is to be learned: the long text and its end.

        ValueError for a pair of more than `length` bytes.
        """
        asked, told = [[*_bytes(text), BREAK] for text in short], [[*_bytes(text), END] for text in long]
        lengths = [(len(a), len(a) + len(b)) for a, b in zip(asked, told, strict=True)]
        most = max(end for _, end in lengths)
        if most > self.config.length:
            raise ValueError(f"texts must have at most the writer's length of {self.config.length} bytes, got one of {most}")
        device = self.norm.weight.device
        padded = [a + b + [END] * (most - len(a) - len(b)) for a, b in zip(asked, told, strict=True)]
        tokens, bounds = (torch.tensor(rows, device="cpu").to(device, non_blocking=True) for rows in (padded, lengths))
        place = torch.arange(most, device=device)
        return tokens, (place >= bounds[:, :1]) & (place < bounds[:, 1:])

    def log_prob(self, tokens: Tensor, temperature: float = 1.0) -> Tensor:
        """(B, L) log p(y_i | y_<i) of the bytes of texts (B, L), in float32; 0 for the first."""
        logits, _ = self(tokens[:, :-1])
        of_next = (logits.float() / temperature).log_softmax(-1).gather(2, tokens[:, 1:, None])[..., 0]
        return F.pad(of_next, (1, 0))

    @torch.no_grad()
    def draw(self, short: Sequence[str], temperature: float = 1.0, steady: bool = False) -> tuple[Tensor, Tensor]:
        """Texts that go on from B short ones, as `texts` gives them; one that would become too long has no end.

        temperature: 0 takes the likeliest byte, otherwise torch's global generator draws. steady: call the network `length` - 1 times
        whatever is written, as ranks that share its weights must; on one byte, once all texts have ended. ValueError as in `texts`.
        """
        given, unknown = self.texts(short, [""] * len(short))
        tokens = F.pad(given, (0, self.config.length - given.shape[1]))
        written = torch.ones_like(tokens, dtype=torch.bool)
        written[:, : given.shape[1]] = unknown.cummax(1).values
        done, past, start = torch.zeros(len(tokens), dtype=torch.bool, device=tokens.device), None, 0
        for place in range(1 if steady else int(written.int().argmax(1).min()), self.config.length):
            logits, past = self(tokens[:, start:place], past)
            byte = _drawn(logits[:, -1].float(), temperature)
            own = written[:, place] & ~done
            tokens[:, place] = torch.where(own, byte, tokens[:, place])
            written[:, place] = own
            done = done | (own & (byte == END))
            start = place
            if done.all():
                written[:, place + 1 :] = False
                for _ in range(place + 1, self.config.length if steady else 0):
                    self(tokens[:1, :1])
                break
        most = int(written.any(0).nonzero().max()) + 1
        return tokens[:, :most], written[:, :most]

    def write(self, short: Sequence[str], temperature: float = 0.0) -> list[str]:
        """The long texts of B short ones."""
        return read(*self.draw(short, temperature))

    def save(self, folder: Path) -> None:
        """Write the writer as JSON and safetensors; `load_writer` reads it."""
        folder.mkdir(parents=True, exist_ok=True)
        save_file({name: x.detach().cpu().contiguous() for name, x in self.state_dict().items()}, folder / WEIGHTS_FILE)
        (folder / CONFIG_FILE).write_text(json.dumps(self.config.to_data(), indent=2) + "\n")


def read(tokens: Tensor, written: Tensor) -> list[str]:
    """What is written in texts (B, L), without its end; bytes that are no UTF-8 are replaced."""
    rows = (row[there].tolist() for row, there in zip(tokens.cpu(), written.cpu(), strict=True))
    return [bytes(row).split(b"\0")[0].decode("utf-8", errors="replace") for row in rows]


def writer_folder(place: str) -> Path | None:
    """Where a writer lies that is at `place`: the folder it was saved in, or of the run that trained it. None where there is none."""
    return next((f for f in (Path(place), Path(place) / "export" / "writer") if (f / CONFIG_FILE).is_file()), None)


def load_writer(place: str) -> ByteWriter:
    """A writer that was saved. UserError in one line where there is none, or a damaged one."""
    folder = writer_folder(place)
    if not place or folder is None:
        raise UserError(f"no writer at {place!r}: expected {CONFIG_FILE} there; `mezzotint train tiny.enhance` makes one")
    try:
        writer = ByteWriterConfig.from_data(json.loads((folder / CONFIG_FILE).read_text())).build()
        writer.load_state_dict(load_file(folder / WEIGHTS_FILE))
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise UserError(f"cannot read the writer in {folder}: {' '.join(str(error).split())}") from error
    return writer.requires_grad_(False).eval()


def _bytes(text: str) -> list[int]:
    """The UTF-8 of a text in one line."""
    return list(" ".join(text.replace("\0", " ").split()).encode("utf-8", errors="replace"))


def _drawn(logits: Tensor, temperature: float) -> Tensor:
    """(B,) bytes from logits (B, 256)."""
    if not temperature:
        return logits.argmax(1)
    return torch.multinomial((logits / temperature).softmax(1), 1)[:, 0]
