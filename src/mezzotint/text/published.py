"""The text encoders of published models: CLIP, T5 and language models such as Gemma, through transformers.

A pipeline has one or several. Each gives features of tokens, one vector for the whole prompt, what is in all of its layers, or the
numbers of its tokens, and `FAMILIES` says how they are put together. The encoders are frozen: they are never trained here, belong to no
optimizer and no checkpoint, and copies of a pipeline share them. Their files are safetensors, and stay in the format of transformers.

Where we differ: with a negative prompt of its own, SANA and Lumina 2 leave their instruction out; here only the empty prompt goes
without, which is their default.

B batch, L tokens, D width.
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from mezzotint import config
from mezzotint.errors import UserError, listed
from mezzotint.models.cond import Cond
from mezzotint.text.encoder import TextConfig, TextEncoder
from mezzotint.text.layers import keys_and_values

FILES = "text"  # folder of the encoders in a pipeline's

# What SANA (Xie et al. 2024) and Lumina-Image 2.0 (Qin et al. 2025) say to their language models before every prompt, word by word.
SANA_INSTRUCTION = "\n".join(
    (
        "Given a user prompt, generate an 'Enhanced prompt' that provides detailed visual descriptions suitable for image generation. "
        "Evaluate the level of detail in the user prompt:",
        "- If the prompt is simple, focus on adding specifics about colors, shapes, sizes, textures, and spatial relationships to create "
        "vivid and concrete scenes.",
        "- If the prompt is already detailed, refine and enhance the existing details slightly without overcomplicating.",
        "Here are examples of how to transform or refine prompts:",
        "- User Prompt: A cat sleeping -> Enhanced: A small, fluffy white cat curled up in a round shape, sleeping peacefully on a warm "
        "sunny windowsill, surrounded by pots of blooming red flowers.",
        "- User Prompt: A busy city street -> Enhanced: A bustling city street scene at dusk, featuring glowing street lamps, a diverse "
        "crowd of people in colorful clothing, and a double-decker bus passing by towering glass skyscrapers.",
        "Please generate only the enhanced description for the prompt below and avoid including any additional commentary or evaluations:",
        "User Prompt: ",
    )
)
LUMINA2_INSTRUCTION = (
    "You are an assistant designed to generate superior images with the superior degree of image-text alignment based on textual "
    "prompts or user prompts. <Prompt Start> "
)


@dataclass
class EncoderConfig(config.Config, kind="encoder"):
    """One encoder, and what is taken from it.

    family: which class of transformers reads the files. weights, tokenizer: each a folder, or a hub's id, which may go on into a
    folder there; without weights the encoder is left out, and what it would give is zeros of `width` and `pooled_width`. length:
    tokens of a prompt, to which all are padded; longer ones are cut, with a warning. text: whether the features stand after those of
    the encoder before, beside them channel by channel, or are not taken. layer: of which hidden state; -1 is the last, normalised.
    pooled: the vector of the whole prompt, with CLIP's projection or without. states: whether the hidden states of all layers are
    taken; keys: whether their keys and values are (`text.layers`). tokens: whether their numbers are taken, which need no weights.
    masked: who does not see padding. lower: whether prompts are written small. instruction: what is said before every prompt but the
    empty one; apart: whether it does not count as part of the length, nor is it taken.
    """

    family: Literal["clip", "t5", "llm"] = "clip"
    weights: str = ""
    tokenizer: str = ""
    length: int = 77
    text: Literal["after", "beside", "none"] = "after"
    layer: int = -1
    pooled: Literal["projected", "plain", "none"] = "none"
    states: bool = False
    keys: bool = False
    tokens: bool = False
    masked: Literal["nobody", "encoder", "all"] = "nobody"
    lower: bool = False
    instruction: str = ""
    apart: bool = False
    width: int = 0
    pooled_width: int = 0


@dataclass
class PublishedConfig(TextConfig, kind="published"):
    """Encoders in their order. zeros: whether the empty prompt is zeros, instead of what the encoders say of it."""

    encoders: tuple[EncoderConfig, ...] = field(default_factory=tuple)
    zeros: bool = False

    def build(self) -> "Published":
        return Published(self)

    def found_in(self, folder: Path) -> Self:
        """Its places are folders inside `folder`, or it is a UserError."""

        def found(place: str) -> str:
            inside = config.inside(folder, place)
            if not inside.is_dir():  # what is no folder would be looked for on a hub
                raise UserError(f"{folder} has lost its folder {place}, a text encoder; put it back, or import the model again")
            return str(inside) if place else ""

        return self.at([(found(e.weights), found(e.tokenizer)) for e in self.encoders])

    def at(self, places: Sequence[tuple[str, str]]) -> Self:
        """The same with the weights and the tokenizer of each encoder at these places. An encoder at ("", "") is left out."""
        placed = [e.replace(weights=weights, tokenizer=tokenizer) for e, (weights, tokenizer) in zip(self.encoders, places, strict=True)]
        return self.replace(encoders=tuple(placed))


class Tokenizer:
    """A tokenizer alone, which says the numbers of tokens. Copies share it."""

    def __init__(self, config: EncoderConfig) -> None:
        import transformers

        self.config = config
        self.tokenizer: Any = pretrained(transformers.AutoTokenizer, config.tokenizer)
        self.tokenizer.padding_side = "right"
        if self.tokenizer.pad_token is None:  # Llama's
            self.tokenizer.pad_token = self.tokenizer.eos_token

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self

    def store(self, folder: Path) -> None:
        """Write what there is."""
        with quiet():
            self.tokenizer.save_pretrained(folder)

    def read(self, prompts: Sequence[str]) -> "Said":
        """What is said of B prompts."""
        tokens = self.tokens(prompts, self.config.length)
        mask = tokens.attention_mask
        return Said(torch.zeros(*mask.shape, 0), mask.bool(), numbers=_numbers(tokens))

    def tokens(self, texts: Sequence[str], length: int) -> Any:
        """input_ids and attention_mask (B, length) of texts, on the CPU; what is longer is cut, with a warning."""
        with quiet():  # which warns of what is cut below
            whole = self.tokenizer(texts).input_ids
        for text, ids in zip(texts, whole, strict=True):
            if len(ids) > length:
                warnings.warn(f"prompt cut from {len(ids)} to {length} tokens: {text[:60]!r}...", stacklevel=2)
        with torch.device("cpu"):
            return self.tokenizer(texts, padding="max_length", max_length=length, truncation=True, return_tensors="pt")


class Encoder(Tokenizer):
    """An encoder and its tokenizer. It is frozen and no part of any module."""

    def __init__(self, config: EncoderConfig) -> None:
        import transformers

        super().__init__(config)
        heads = {"projected": transformers.CLIPTextModelWithProjection, "plain": transformers.CLIPTextModel}
        clip = heads.get(config.pooled, transformers.CLIPTextModel)
        model: Any = {"clip": clip, "t5": transformers.T5EncoderModel, "llm": transformers.AutoModel}[config.family]
        with torch.device("cpu"):
            self.model: Any = network(model, config.weights)

    def store(self, folder: Path) -> None:
        super().store(folder)
        with quiet():
            self.model.save_pretrained(folder)

    def read(self, prompts: Sequence[str]) -> "Said":
        if self.config.lower:
            prompts = [prompt.lower().strip() for prompt in prompts]
        if not self.config.instruction:
            return self._read(prompts, "")
        told, untold = ([row for row, prompt in enumerate(prompts) if bool(prompt) == given] for given in (True, False))
        runs = [(rows, instruction) for rows, instruction in ((told, self.config.instruction), (untold, "")) if rows]
        parts = [self._read([prompts[row] for row in rows], instruction) for rows, instruction in runs]
        place = torch.tensor(told + untold, device="cpu").argsort().to(self.model.device, non_blocking=True)
        joined: Any = (None if x[0] is None else torch.cat(x)[place] for x in zip(*(vars(part).values() for part in parts), strict=True))
        return Said(*joined)

    @torch.no_grad()
    def _read(self, prompts: Sequence[str], instruction: str) -> "Said":
        config, length = self.config, self.config.length
        if instruction and config.apart:
            length += len(self.tokenizer.encode(instruction)) - 2
        tokens = self.tokens([instruction + prompt for prompt in prompts], length)
        tokens = tokens.to(self.model.device, non_blocking=True)
        mask = None if config.masked == "nobody" else tokens.attention_mask
        out = self.model(tokens.input_ids, attention_mask=mask, output_hidden_states=True)
        features = out.last_hidden_state if config.layer == -1 else out.hidden_states[config.layer]
        pooled = {"projected": "text_embeds", "plain": "pooler_output"}.get(config.pooled)
        # Of an instruction apart, the first token is taken, on which language models rest their attention, and the end.
        last = torch.arange(length - config.length + 1, length, device=features.device)
        taken = torch.cat([last.new_zeros(1), last])
        return Said(
            features[:, taken],
            mask[:, taken].bool() if mask is not None and config.masked == "all" else None,
            None if pooled is None else getattr(out, pooled),
            self._states(tokens, out),
            _numbers(tokens) if config.tokens else None,
        )

    def _states(self, tokens: Any, out: Any) -> Tensor | None:
        """What is taken of all layers."""
        if self.config.keys:
            return keys_and_values(self.model, tokens.input_ids, tokens.attention_mask)
        return torch.stack(out.hidden_states[1:], dim=1) if self.config.states else None


def _numbers(tokens: Any) -> Tensor:
    numbers: Tensor = tokens.input_ids.masked_fill(tokens.attention_mask == 0, -1)
    return numbers


class Absent:
    """What stands for an encoder that is left out: it says zeros."""

    def __init__(self, config: EncoderConfig) -> None:
        self.config = config

    def store(self, folder: Path) -> None:
        """There is nothing to write."""

    def read(self, prompts: Sequence[str]) -> "Said":
        """Zeros of the shapes that the encoder would give."""
        config, rows = self.config, len(prompts)
        mask = torch.zeros(rows, config.length, dtype=torch.bool) if config.masked == "all" else None
        pooled = None if config.pooled == "none" else torch.zeros(rows, config.pooled_width)
        return Said(torch.zeros(rows, config.length, config.width), mask, pooled)


@dataclass
class Said:
    """What one encoder says: features (B, L, D), mask (B, L), pooled (B, D'), states (B, layers, L, D), numbers of tokens (B, L)."""

    features: Tensor
    mask: Tensor | None = None
    pooled: Tensor | None = None
    states: Tensor | None = None
    numbers: Tensor | None = None

    def to(self, device: torch.device) -> "Said":
        """The same on another device."""
        return Said(*(None if x is None else x.to(device) for x in vars(self).values()))  # type: ignore[arg-type]


def pretrained(kind: Any, place: str, what: str = "text encoder", **options: Any) -> Any:
    """A model or tokenizer of transformers from a folder or a hub's id. UserError in one line where that fails."""
    if Path(place).is_dir():
        options["local_files_only"] = True
    elif place.count("/") > 1:
        owner, name, subfolder = place.split("/", 2)
        place, options["subfolder"] = f"{owner}/{name}", subfolder
    try:
        with quiet():
            return kind.from_pretrained(place, **options)
    except (OSError, ValueError, ImportError) as error:
        reason = " ".join(str(error).split("\n")[0].split())
        raise UserError(f"cannot read a {what} from {place} ({reason}); only safetensors and tokenizer files are read") from error


def network(kind: Any, place: str, what: str = "text encoder") -> Any:
    """A frozen model of transformers, as `pretrained` reads it. UserError for files without some of its weights, which would be noise."""
    model, told = pretrained(kind, place, what, use_safetensors=True, dtype="auto", output_loading_info=True)
    if missing := sorted(told["missing_keys"]):
        raise UserError(f"{place} lacks {len(missing)} weights of a {what}: {listed(missing)}")
    return model.requires_grad_(False).eval()


@contextmanager
def quiet() -> Iterator[None]:
    """transformers without its bars, and without its notes: what matters in them is an error of ours."""
    from transformers.utils import logging

    bars, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


class Published(TextEncoder):
    """Prompts -> Cond with what `PublishedConfig` takes from its encoders; text is as wide as the widest, others padded with zeros."""

    here: Tensor

    def __init__(self, config: PublishedConfig) -> None:
        super().__init__()
        self.config = config
        self.encoders = tuple(Encoder(e) if e.weights else Tokenizer(e) if e.tokens else Absent(e) for e in config.encoders)
        self.register_buffer("here", torch.zeros(0, device="cpu"), persistent=False)  # moves with the pipeline, and tells where it is

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Encoders follow the pipeline to its device, in their own precision."""
        super()._apply(fn, recurse)
        for encoder in self.encoders:
            if isinstance(encoder, Encoder):
                encoder.model.to(self.here.device)
        return self

    def forward(self, prompts: Sequence[str]) -> Cond:
        device = self.here.device
        said = [encoder.read(prompts).to(device) for encoder in self.encoders]
        runs: list[list[Said]] = []
        for encoder, one in zip(self.config.encoders, said, strict=True):
            if encoder.text == "after":
                runs.append([one])
            elif encoder.text == "beside":
                runs[-1].append(one)
        tokens = [torch.cat([one.features.float() for one in run], dim=2) for run in runs]
        width = max((x.shape[2] for x in tokens), default=1)
        nothing = torch.zeros(len(prompts), 0, device=device)
        text = torch.cat([nothing.new_zeros(len(prompts), 0, width), *(F.pad(x, (0, width - x.shape[2])) for x in tokens)], dim=1)
        masks = [torch.ones_like(run[0].features[..., 0], dtype=torch.bool) if run[0].mask is None else run[0].mask for run in runs]
        mask = torch.cat(masks, dim=1) if any(run[0].mask is not None for run in runs) else None
        cond = Cond(text, mask, torch.cat([nothing, *(one.pooled.float() for one in said if one.pooled is not None)], dim=1))
        for one in said:
            if one.states is not None:
                cond.states, cond.states_mask = one.states.float(), one.mask
            if one.numbers is not None:
                cond.tokens = one.numbers
        if self.config.zeros:
            given = torch.tensor([bool(prompt) for prompt in prompts], device="cpu").to(device, non_blocking=True)
            cond.text, cond.pooled = cond.text * given[:, None, None], cond.pooled * given[:, None]
        return cond

    def store(self, folder: Path) -> PublishedConfig:
        places = [f"{FILES}/{number}" for number in range(len(self.encoders))]
        for place, encoder in zip(places, self.encoders, strict=True):
            encoder.store(folder / place)
        return self.config.at(
            [(place if e.weights else "", place if e.tokenizer else "") for place, e in zip(places, self.config.encoders, strict=True)]
        )


CLIP = EncoderConfig(layer=-2, pooled="projected")
T5 = EncoderConfig(family="t5", length=512)
LLM = EncoderConfig(family="llm", length=300, masked="all")

FAMILIES: dict[str, PublishedConfig] = {
    "sd1.5": PublishedConfig((EncoderConfig(),)),
    "sdxl": PublishedConfig((CLIP.replace(pooled="none"), CLIP.replace(text="beside")), zeros=True),
    "sd3": PublishedConfig((CLIP, CLIP.replace(text="beside"), T5.replace(length=256))),
    "flux": PublishedConfig((EncoderConfig(text="none", pooled="plain"), T5)),
    "pixart-alpha": PublishedConfig((T5.replace(length=120, masked="all", lower=True),)),
    "pixart": PublishedConfig((T5.replace(length=300, masked="all", lower=True),)),
    "sana": PublishedConfig((LLM.replace(lower=True, instruction=SANA_INSTRUCTION, apart=True),)),
    "lumina2": PublishedConfig((LLM.replace(length=256, layer=-2, instruction=LUMINA2_INSTRUCTION),)),
    "hidream": PublishedConfig(
        (
            CLIP.replace(length=128, text="none"),
            CLIP.replace(length=128, text="none"),
            T5.replace(length=128, masked="encoder"),
            LLM.replace(length=128, masked="encoder", text="none", states=True),
        )
    ),
    "transfusion": PublishedConfig((LLM.replace(length=64, text="none", tokens=True),)),
    "fuse-dit": PublishedConfig((LLM.replace(length=256, text="none", keys=True),)),
}
"""How the encoders of each family of models are read; `at` says where they are."""
