"""Where it fits: what frozen networks made of rows, kept in columns of the table beside them (`curation.cache` makes them).

In: latents of pictures and states of texts, and which weights made them. Out: their stored form and back, and a refusal where they are not
what the networks of this run would make.
Gotchas: a value is the bytes of a safetensors file of its own. States are found by their text, so that captions that changed are missed.
"""

import hashlib
import json
from dataclasses import fields
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor, nn

from mezzotint.codecs.cached import Cached, CachedConfig
from mezzotint.data.table import Table
from mezzotint.errors import UserError
from mezzotint.models.cond import Cond
from mezzotint.pipeline import Pipeline
from mezzotint.text.published import Encoder, Published, PublishedConfig

LATENTS, STATES = "latents", "states"


def pack(tensors: dict[str, Tensor]) -> bytes:
    """Tensors in their stored form."""
    return save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})


def unpack(value: bytes) -> dict[str, Tensor]:
    """The inverse of `pack`."""
    return load(value)


def pack_states(conds: dict[str, Cond], dtype: torch.dtype) -> bytes:
    """The conditions of some prompts, each of one row, in a precision."""
    said = {name: cond.in_precision(dtype) for name, cond in conds.items()}
    return pack(
        {
            f"{_key(prompt)}.{f.name}": value
            for prompt, cond in said.items()
            for f in fields(cond)
            if (value := getattr(cond, f.name)) is not None
        }
    )


def states_of(value: bytes | None, prompt: str) -> Cond:
    """The condition of a prompt, (1, ...), in float32. UserError where it is not there."""
    stored, beginning = load(value) if value else {}, f"{_key(prompt)}."
    own = {name.removeprefix(beginning): tensor for name, tensor in stored.items() if name.startswith(beginning)}
    if not own:
        raise UserError(f"no states are stored of the caption {prompt[:60]!r}; make them again with the captions as they are now")
    return Cond(**{"mask": None, **own}).in_precision(torch.float32)  # type: ignore[arg-type]


def _key(prompt: str) -> str:
    return hashlib.sha256(prompt.encode()).hexdigest()[:16]


def codec_stamp(pipeline: Pipeline) -> dict[str, Any]:
    """What is the same exactly if a pipeline's codec is: its settings and a digest of its weights."""
    codec, config = pipeline.codec, pipeline.config.codec
    if isinstance(codec, Cached) and isinstance(config, CachedConfig):
        codec, config = codec.inner, config.codec
    return {"codec": config.to_data(), "weights": digest(codec)}


def text_stamp(pipeline: Pipeline) -> dict[str, Any]:
    """The same of its text encoder. The places of files do not matter, what is in them does."""
    text, config = pipeline.text, pipeline.config.text
    if isinstance(config, PublishedConfig):
        config = config.at([("", "")] * len(config.encoders))
    models = [e.model for e in text.encoders if isinstance(e, Encoder)] if isinstance(text, Published) else [text]
    return {"text": config.to_data(), "weights": [digest(model) for model in models]}


def digest(module: nn.Module) -> str:
    """What tells the weights of a module from others."""
    total = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        total.update(f"{name} {tuple(tensor.shape)}".encode())
        total.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return total.hexdigest()[:16]


def check_latents(table: Table, column: str, pipeline: Pipeline, size: int, multiple: int) -> None:
    """UserError where a column's latents are not those that the codec makes of pictures of these shapes."""
    _compare(table, column, {**codec_stamp(pipeline), "size": size, "multiple": multiple})


def check_states(table: Table, column: str, pipeline: Pipeline, captions: list[str]) -> None:
    """UserError where a column's states are not those that the text encoder makes of captions, or will not stay so."""
    if any(parameter.requires_grad for parameter in pipeline.text.parameters()):
        raise UserError("this run trains its text encoder, so states cannot be made beforehand; leave states empty")
    stored = _made(table, column).get("captions", [])
    if missing := [name for name in captions if name not in stored]:
        raise UserError(f"the column {column!r} of {str(table.path)!r} has no states of {missing[0]!r}; make it again with these captions")
    _compare(table, column, text_stamp(pipeline))


def _made(table: Table, column: str) -> dict[str, Any]:
    stamp = table.stamp(column)
    if stamp is None:
        raise UserError(f"the column {column!r} of {str(table.path)!r} does not say what made it, or rows came since; make it again")
    return stamp


def _compare(table: Table, column: str, wanted: dict[str, Any]) -> None:
    stamp = _made(table, column)
    for name, value in wanted.items():
        if stamp.get(name) != json.loads(json.dumps(value)):
            shown = f"{stamp.get(name)}, and this run has {value}" if name in ("size", "multiple", "weights") else "others"
            raise UserError(
                f"the column {column!r} of {str(table.path)!r} was made with another {name} ({shown}); make it again for this run, or "
                "train without it"
            )
