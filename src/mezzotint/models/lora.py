"""Low-rank adapters on any network: LoRA (Hu et al. 2021) and DoRA (Liu et al. 2024), by peft.

An adapter adds to the weights W of some layers a product of two thin matrices (eq. 3 of LoRA):

    W x  ->  W x + s (alpha / r) B A x,        A (r, in), B (out, r)

A starts random and B at zero, so a fresh adapter changes nothing. s is a strength that is set when drawing and stored nowhere. DoRA
also learns the length of every row: m (W + s (alpha / r) B A) / |W + s (alpha / r) B A|, with m the lengths at the start; where
rows are zero it is not defined. The A and B of a convolution are one with its kernel and one with a kernel of 1 x 1.

Where we differ: nothing that changes a number. A layer that a network keeps as one (queries, keys and values) has one A for all of
it, where others keep three; `weights.lora` goes both ways.

A state is a dictionary of tensors under peft's names, and alpha: for every layer "X.lora_A.weight" (r, in, ...), "X.lora_B.weight"
(out, r, ...), "X.alpha" (), and "X.lora_magnitude_vector" (out,) where there is a DoRA.
"""

import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from mezzotint import config
from mezzotint.errors import listed

LEAF = re.compile(r"\.(lora_[AB]\.weight|alpha|lora_magnitude_vector)$")
# What turns the condition into shifts, scales and gates, or tokens over to experts.
CONDITION = re.compile(r"(.*\.)?(modulation\.linear|film|time|gate)")


@dataclass
class LoRAConfig(config.Config, kind="lora"):
    """What a fresh adapter is.

    rank: r. alpha: over rank, the weight of the change; kept when the rank changes, a learning rate stays right. targets: names of
    linear layers and convolutions as in ``layers``, with ``*`` for anything; none stands for the linear layers of all blocks, but
    for those that read the time (of FLUX dev at rank 16, 56.0M weights beside 11.9B, 0.47%). dropout: of what A reads, in methods that
    compare the student with data alone. dora: DoRA.
    """

    rank: int = 16
    alpha: float = 16.0
    targets: tuple[str, ...] = ()
    dropout: float = 0.0
    dora: bool = False


def add(module: nn.Module, config: LoRAConfig, name: str = "default") -> None:
    """A fresh adapter on the layers that `config` targets, beside those that are there. Only its weights are trainable then.

    Its weights are float32, whatever the network's. Layers with adapters are wrapped: their own weights are called
    "X.base_layer.weight" until the last adapter is removed or merged. ValueError where the name is taken, the rank is no positive
    number, or a target fits no layer.
    """
    if config.rank < 1:
        raise ValueError(f"rank must be at least 1, got {config.rank}")
    chosen = _targets(module, config.targets)
    settings = adapter_config(dict.fromkeys(chosen, config.rank), dict.fromkeys(chosen, config.alpha), config.dora)
    _inject(module, settings | {"lora_dropout": config.dropout}, name)


def load(module: nn.Module, state: Mapping[str, Tensor], name: str = "default") -> None:
    """An adapter with the weights of `state` beside those that are there; else as `add`.

    ValueError where the network has no such layer or one of another size, or where a layer lacks a tensor; it lists them all.
    """
    parts: dict[str, dict[str, Tensor]] = {}
    for key, x in state.items():
        layer = LEAF.sub("", key)
        parts.setdefault(layer, {})[key[len(layer) + 1 :]] = x
    known, dora = layers(module), any("lora_magnitude_vector" in part for part in parts.values())
    if wrong := [layer for layer, part in parts.items() if layer not in known or not _fits(part, known[layer].weight, dora)]:
        raise ValueError(f"{len(wrong)} layers of the adapter are not the network's, or of another size: {listed(wrong)}")
    ranks = {layer: len(part["lora_A.weight"]) for layer, part in parts.items()}
    _inject(module, adapter_config(ranks, {layer: float(part["alpha"]) for layer, part in parts.items()}, dora), name)
    with torch.no_grad():
        for key, x in _tensors(module, name).items():
            x.copy_(state[key])


def state(module: nn.Module, name: str = "default") -> dict[str, Tensor]:
    """The weights of an adapter, under the names of the module's docstring; they share memory with the network's."""
    _known(module, name)
    return {key: x.detach() for key, x in _tensors(module, name).items()}


def scale(module: nn.Module, name: str, value: float) -> None:
    """The strength s of an adapter: 1 as it was trained, 0 without it."""
    _known(module, name)
    for layer in _wrapped(module).values():
        layer.set_scale(name, value)


def remove(module: nn.Module, name: str = "default") -> None:
    """Take an adapter off. The network's own weights stay frozen."""
    _known(module, name)
    for path, layer in _wrapped(module).items():
        layer.delete_adapter(name)
        if not layer.lora_A:
            _put(module, path, layer.get_base_layer())
    adapters = names(module)
    del adapters[name]
    if not adapters:
        del module.peft_config


def merge(module: nn.Module) -> None:
    """Add what all adapters change, at their strengths, to the network's own weights, and take them off.

    The sum is of float32, then rounded to the type of the weights. Weights stay frozen.
    """
    for layer in _wrapped(module).values():
        layer.merge(adapter_names=list(layer.lora_A))
    for path, layer in _wrapped(module).items():
        _put(module, path, layer.get_base_layer())
    if names(module):
        del module.peft_config


def names(module: nn.Module) -> dict[str, Any]:
    """The adapters of a network, in the order of their coming, with peft's description of each."""
    adapters: dict[str, Any] = getattr(module, "peft_config", {})
    return adapters


def layers(module: nn.Module) -> dict[str, nn.Linear | nn.Conv2d]:
    """The layers that can have adapters, by their names without any: linear ones, and convolutions over all channels."""
    found: dict[str, nn.Linear | nn.Conv2d] = {}
    for path, layer in module.named_modules():
        plain = path.removesuffix(".base_layer")
        if (isinstance(layer, nn.Linear) or (isinstance(layer, nn.Conv2d) and layer.groups == 1)) and ".lora_" not in plain:
            found[plain] = layer
    return found


def adapter_config(ranks: Mapping[str, int], alphas: Mapping[str, float], dora: bool) -> dict[str, Any]:
    """peft's description of an adapter, as JSON-ready data, from the rank and the alpha of every layer; there must be one."""
    if not ranks:
        raise ValueError("an adapter must have at least one layer")
    rank, alpha = next(iter(ranks.values())), next(iter(alphas.values()))
    return {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": _any_of(list(ranks)),
        "rank_pattern": {key: value for key, value in _patterns(ranks).items() if value != rank},
        "alpha_pattern": {key: value for key, value in _patterns(alphas).items() if value != alpha},
        "use_dora": dora,
    }


def _patterns(values: Mapping[str, float]) -> dict[str, float]:
    """One pattern for all the layers that share a value: peft tries them one after the other on every layer."""
    shared: dict[float, list[str]] = {}
    for layer, value in values.items():
        shared.setdefault(value, []).append(layer)
    return {_any_of(found): value for value, found in shared.items()}


def _any_of(found: list[str]) -> str:
    return f"^(?:{'|'.join(map(re.escape, found))})$"


def _targets(module: nn.Module, targets: tuple[str, ...]) -> list[str]:
    known = layers(module)
    if not targets:
        inside = {id(layer) for block in module.blocks for layer in block.modules()}  # type: ignore[union-attr]
        linear = (name for name, layer in known.items() if isinstance(layer, nn.Linear) and id(layer) in inside)
        return [name for name in linear if not CONDITION.fullmatch(name)]
    for pattern in targets:
        if not any(fnmatchcase(name, pattern) for name in known):
            raise ValueError(f"targets must be names of layers with * for anything; {pattern!r} fits none of {listed(known)}")
    return [name for name in known if any(fnmatchcase(name, pattern) for pattern in targets)]


def _inject(module: nn.Module, settings: dict[str, Any], name: str) -> None:
    from peft import LoraConfig, inject_adapter_in_model
    from peft.tuners.tuners_utils import cast_adapter_dtype

    if name in names(module):
        raise ValueError(f"name must be a new one: the network has an adapter {name!r}; remove it first, or call this one otherwise")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # several adapters are what we want
        inject_adapter_in_model(LoraConfig(**{key: x for key, x in settings.items() if key != "peft_type"}), module, name)
    cast_adapter_dtype(module, name)
    for layer in _wrapped(module).values():
        layer.set_adapter(list(names(module)))
    module.requires_grad_(False)
    for x in _tensors(module, name).values():
        if isinstance(x, nn.Parameter):
            x.requires_grad_(True)


def _tensors(module: nn.Module, name: str) -> dict[str, Tensor]:
    """A state; A, B and m are the parameters themselves."""
    tensors: dict[str, Tensor] = {}
    for path, layer in _wrapped(module).items():
        if name in layer.lora_A:
            tensors[f"{path}.lora_A.weight"] = layer.lora_A[name].weight
            tensors[f"{path}.lora_B.weight"] = layer.lora_B[name].weight
            tensors[f"{path}.alpha"] = torch.tensor(float(layer.lora_alpha[name]))
            if name in layer.lora_magnitude_vector:
                tensors[f"{path}.lora_magnitude_vector"] = layer.lora_magnitude_vector[name].weight
    return tensors


def _wrapped(module: nn.Module) -> dict[str, Any]:
    """peft's layers around ours."""
    from peft.tuners.lora import LoraLayer

    return {path: layer for path, layer in module.named_modules() if isinstance(layer, LoraLayer)}


def _put(module: nn.Module, path: str, layer: nn.Module) -> None:
    parent, _, leaf = path.rpartition(".")
    setattr(module.get_submodule(parent), leaf, layer)


def _fits(part: Mapping[str, Tensor], weight: Tensor, dora: bool) -> bool:
    """Is this the whole state of a layer with this weight?"""
    (rows, *inputs), kernel = weight.shape, [1] * (weight.ndim - 2)
    rank = len(part.get("lora_A.weight", ()))
    shapes = {"lora_A.weight": [rank, *inputs], "lora_B.weight": [rows, rank, *kernel], "alpha": []}
    if dora:
        shapes["lora_magnitude_vector"] = [1, rows, *kernel] if kernel else [rows]
    return {leaf: list(x.shape) for leaf, x in part.items()} == shapes


def _known(module: nn.Module, name: str) -> None:
    if name not in names(module):
        raise ValueError(f"name must be that of an adapter of the network, one of {sorted(names(module))}, got {name!r}")
