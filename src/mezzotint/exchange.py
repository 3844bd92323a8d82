"""Where it fits: published pipelines in, ours out, in the formats of others.

In: a diffusers folder, read and written; the publisher's own single file, whose parts take the place of those of a pipeline that is
there. Out: names and descriptions of one network (`weights`), our own format (`pipeline`), downloading.
Gotchas: only safetensors are read. Weights keep the precision of their files, and are read tensor by tensor.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from mezzotint.config import Data, inside
from mezzotint.errors import UserError, listed, unknown
from mezzotint.flow.path import Prediction
from mezzotint.models import ClassDiTConfig, DenoiserConfig
from mezzotint.pipeline import DiscretePath, LinearPath, PathConfig, Pipeline, PipelineConfig, Sampling
from mezzotint.text import Classes, ClassesConfig, PublishedConfig, TextConfig, TextEncoder
from mezzotint.text.published import FAMILIES as TEXTS
from mezzotint.text.published import Encoder, Published, quiet
from mezzotint.weights.configs import Architecture, of_ours, of_theirs
from mezzotint.weights.files import SHARD, Part, read_file, read_folder, read_json, write_folder
from mezzotint.weights.names import Names, Renamed, stream

INDEX, WEIGHTS = "model_index.json", "diffusion_pytorch_model"
NO_CLASS = 1000  # what DiTPipeline's guidance steps away from, whatever the network
# Parts of a single file: networks that are read, and what other parts of the file begin with.
NETWORKS = {"denoiser": "model.diffusion_model.", "codec": "first_stage_model."}
TEXT_PARTS = ("cond_stage_model.", "conditioner.", "text_encoders.")
SCHEDULE_PARTS = ("alphas_cumprod", "betas", "sqrt_", "log_one_minus_", "posterior_", "model_ema.", "denoiser.sigmas")


@dataclass(frozen=True)
class Family:
    """A pipeline class of diffusers.

    text: how its encoders are read; a family without encoders is told classes. denoiser, codec: classes of its networks. sampling: as
    published. network: which part the denoiser is. nothing: parts that are left empty.
    """

    text: str
    denoiser: str
    sampling: Sampling
    network: str = "transformer"
    encoders: tuple[str, ...] = ("",)
    codec: str = "AutoencoderKL"
    nothing: tuple[str, ...] = ()
    settings: tuple[tuple[str, Any], ...] = ()


FAMILIES: dict[str, Family] = {
    "StableDiffusionPipeline": Family(
        "sd1.5",
        "UNet2DConditionModel",
        Sampling(512, 25, 7.5, solver="dpmpp_2m"),
        "unet",
        nothing=("safety_checker", "feature_extractor", "image_encoder"),
        settings=(("requires_safety_checker", False),),
    ),
    "StableDiffusionXLPipeline": Family(
        "sdxl",
        "UNet2DConditionModel",
        Sampling(1024, 30, 5.0, solver="dpmpp_2m"),
        "unet",
        encoders=("", "_2"),
        nothing=("feature_extractor", "image_encoder"),
    ),
    "StableDiffusion3Pipeline": Family(
        "sd3",
        "SD3Transformer2DModel",
        Sampling(1024, 28, 7.0, shift=3.0),
        encoders=("", "_2", "_3"),
        nothing=("feature_extractor", "image_encoder"),
    ),
    "FluxPipeline": Family(
        "flux",
        "FluxTransformer2DModel",
        Sampling(1024, 28, 3.5, shift="flux"),
        encoders=("", "_2"),
        nothing=("feature_extractor", "image_encoder"),
    ),
    "DiTPipeline": Family("dit", "DiTTransformer2DModel", Sampling(256, 25, 4.0, solver="dpmpp_2m"), encoders=()),
    "PixArtAlphaPipeline": Family("pixart-alpha", "PixArtTransformer2DModel", Sampling(1024, 20, 4.5, solver="dpmpp_2m")),
    "PixArtSigmaPipeline": Family("pixart", "PixArtTransformer2DModel", Sampling(1024, 20, 4.5, solver="dpmpp_2m")),
    "SanaPipeline": Family("sana", "SanaTransformer2DModel", Sampling(1024, 20, 4.5, solver="dpmpp_2m", shift=3.0), codec="AutoencoderDC"),
    "Lumina2Pipeline": Family("lumina2", "Lumina2Transformer2DModel", Sampling(1024, 30, 4.0, rule="renormed", shift=6.0)),
    "HiDreamImagePipeline": Family(
        "hidream",
        "HiDreamImageTransformer2DModel",
        Sampling(1024, 50, 5.0, solver="unipc", shift=3.0),
        encoders=("", "_2", "_3", "_4"),
    ),
}
PREDICTIONS: dict[str, Prediction] = {"epsilon": "noise", "v_prediction": "vp_velocity", "sample": "data"}
SCHEDULES = {"linear": "linear", "scaled_linear": "scaled_linear", "squaredcos_cap_v2": "cosine"}
DYNAMIC = {"base_shift": 0.5, "max_shift": 1.15, "base_image_seq_len": 256, "max_image_seq_len": 4096, "time_shift_type": "exponential"}


def read_diffusers(folder: Path) -> Pipeline:
    """The pipeline of a diffusers folder. UserError for a class that we do not have, for a part that is missing, asks for something
    that we do not have or does not fit, and for files that are no safetensors."""
    index = read_json(folder / INDEX)
    name = str(index.get("_class_name"))
    if name not in FAMILIES:
        raise unknown("class of pipeline", name, FAMILIES)
    family = FAMILIES[name]
    described = {part: read_json(folder / part / "config.json") for part in (family.network, "vae")}
    stored = {part: read_folder(folder / part, WEIGHTS) for part in described}  # or an error, before anything that takes time
    architectures = {part: of_theirs(data) for part, data in described.items()}
    denoiser, codec = (architectures[part].read(described[part]) for part in (family.network, "vae"))
    path, prediction, shift = _read_schedule(read_json(folder / "scheduler" / "scheduler_config.json"))
    side = described[family.network].get("sample_size")
    size = side * 2 ** (len(codec.widths) - 1) if isinstance(side, int) else family.sampling.size
    config = PipelineConfig(
        _read_text(folder, index, family, denoiser),
        denoiser.replace(prediction=prediction),
        codec,
        family.sampling.replace(size=size, shift=shift),
        path,
    )
    with torch.device("meta"):
        pipeline = config.build()
    for part, net in ((family.network, pipeline.denoiser), ("vae", pipeline.codec)):
        tensors = stored[part]
        _fill(net, tensors, tensors.meta(), architectures[part].names_in(net.config, tensors), folder / part)
    return pipeline.eval()


def _read_text(folder: Path, index: Data, family: Family, denoiser: DenoiserConfig) -> TextConfig:
    """The encoders of a family at their places, of which SD3's T5 may be missing; or the names of its classes."""
    if isinstance(denoiser, ClassDiTConfig):
        return _read_classes(folder, index, denoiser)
    config, places = TEXTS[family.text], []
    encoders = list(config.encoders)
    for number, suffix in enumerate(family.encoders):
        if (index.get(f"text_encoder{suffix}") or [None])[0] is not None:
            places.append((_part(folder, f"text_encoder{suffix}"), _part(folder, f"tokenizer{suffix}")))
        elif family.text == "sd3" and encoders[number].family == "t5":
            encoders[number] = encoders[number].replace(width=vars(denoiser)["text_width"])
            places.append(("", ""))
        else:
            raise UserError(f"{folder} has no text_encoder{suffix}, and this family cannot do without it")
    zeros = config.zeros and bool(index.get("force_zeros_for_empty_prompt", True))
    return config.replace(encoders=tuple(encoders), zeros=zeros).at(places)


def _part(folder: Path, name: str) -> str:
    place = inside(folder, name)
    if not place.is_dir():  # HiDream's Llama is published by its makers alone
        raise UserError(f"{folder} has no folder {name}, which its index names; put the files of that part there")
    return str(place)


def _read_classes(folder: Path, index: Data, denoiser: ClassDiTConfig) -> ClassesConfig:
    """Names of all classes, as far as the index has them."""
    names = dict.fromkeys(map(str, range(denoiser.classes)), "")
    given = index.get("id2label") or {}
    if beyond := [number for number in given if number not in names]:
        raise UserError(f"{folder} names a class {beyond[0]}, and the network knows numbers from 0 to {denoiser.classes - 1}")
    return ClassesConfig(tuple((names | given).values()))


def _read_schedule(data: Data) -> tuple[PathConfig, Prediction, Any]:
    """Path, what the network predicts there, and the shift of times."""
    if data.get("use_flow_sigmas") or "FlowMatch" in str(data.get("_class_name")):
        if not data.get("use_dynamic_shifting"):
            return LinearPath(), "velocity", float(data["flow_shift"] if "flow_shift" in data else data.get("shift", 1.0))
        if different := [key for key, value in DYNAMIC.items() if data.get(key, value) != value]:
            raise UserError(f"the scheduler shifts times by another rule than FLUX's: {', '.join(different)}")
        return LinearPath(), "velocity", "flux"
    schedule, kind = data.get("beta_schedule", "linear"), data.get("prediction_type", "epsilon")
    if schedule not in SCHEDULES:
        raise unknown("beta_schedule", schedule, SCHEDULES)
    if kind not in PREDICTIONS:
        raise unknown("prediction_type", kind, PREDICTIONS)
    if data.get("trained_betas") is not None:
        raise UserError("the scheduler has betas of its own (trained_betas), and only those of a schedule are supported")
    path = DiscretePath(
        steps=data.get("num_train_timesteps", 1000),
        schedule=SCHEDULES[schedule],  # type: ignore[arg-type]
        beta_min=data.get("beta_start", 0.0001),
        beta_max=data.get("beta_end", 0.02),
        zero_terminal=bool(data.get("rescale_betas_zero_snr")),
    )
    return path, PREDICTIONS[kind], 1.0


def _fill(net: nn.Module, tensors: Mapping[str, Tensor], meta: Mapping[str, Tensor], names: Names, source: Path) -> None:
    try:
        stream(net, tensors, meta, names)
    except ValueError as error:
        raise UserError(f"{source}: {error}") from error


def write_diffusers(pipeline: Pipeline, folder: Path, shard: int = SHARD) -> None:
    """Write a folder that diffusers' own pipeline class loads. UserError for a pipeline that has no class there.

    shard: bytes from which a network is written in several files; beside the pipeline one of them at a time is in memory.
    """
    name, family = _family(pipeline)
    parts: dict[str, Any] = {family.network: pipeline.denoiser, "vae": pipeline.codec}
    side = min(pipeline.config.sampling.shape) // pipeline.codec.factor
    described = {part: of_ours(net.config).write(net.config, side) for part, net in parts.items()}  # or refused, and nothing is written
    index: Data = {"_class_name": name, **dict(family.settings), **{part: [None, None] for part in family.nothing}}
    index |= _write_text(pipeline.text, family, folder)
    for part, net in parts.items():
        _write_json(folder / part / "config.json", described[part])
        names, state = of_ours(net.config).names(net.config), net.state_dict()
        sizes = {name: x.nbytes for name, x in names.to_theirs({name: x.to("meta") for name, x in state.items()}).items()}
        write_folder(folder / part, WEIGHTS, Renamed(state, names), sizes, shard)
        index[part] = ["diffusers", described[part]["_class_name"]]
    schedule = _write_schedule(pipeline)
    _write_json(folder / "scheduler" / "scheduler_config.json", schedule)
    index["scheduler"] = ["diffusers", schedule["_class_name"]]
    _write_json(folder / INDEX, index)


def _write_text(text: TextEncoder, family: Family, folder: Path) -> Data:
    """Write the encoders. Returns what the index says of them, or of classes."""
    if isinstance(text, Classes):
        if (count := len(text.config.names)) != NO_CLASS:
            raise UserError(f"diffusers' guidance takes {NO_CLASS} for the number of no class, and here that is {count}")
        return {"id2label": {str(number): names for number, names in enumerate(text.config.names) if names}}
    assert isinstance(text, Published)
    index: Data = {"force_zeros_for_empty_prompt": text.config.zeros} if family.text == "sdxl" else {}
    for suffix, encoder in zip(family.encoders, text.encoders, strict=True):
        for part, thing in (("text_encoder", "model"), ("tokenizer", "tokenizer")):
            index[part + suffix] = [None, None]
            if isinstance(encoder, Encoder):
                value = getattr(encoder, thing)
                with quiet():
                    value.save_pretrained(folder / (part + suffix))
                index[part + suffix] = ["transformers", type(value).__name__]
    return index


def _family(pipeline: Pipeline) -> tuple[str, Family]:
    """The class that has such networks, and reads such encoders in the same way."""
    config = pipeline.config
    networks = of_ours(config.denoiser).name, of_ours(config.codec).name
    for name, family in FAMILIES.items():
        if networks == (family.denoiser, family.codec) and _reads(config.text) == _reads(TEXTS.get(family.text, ClassesConfig())):
            return name, family
    raise UserError(f"diffusers has no pipeline of a {networks[0]}, a {networks[1]} and these text encoders that we know of")


def _reads(text: TextConfig) -> object:
    """How prompts are read, wherever the files are."""
    if isinstance(text, PublishedConfig):
        return [encoder.replace(weights="", tokenizer="", width=0, pooled_width=0) for encoder in text.encoders]
    return type(text)


def _write_schedule(pipeline: Pipeline) -> Data:
    path, shift = pipeline.config.path, pipeline.config.sampling.shift
    if isinstance(path, LinearPath):
        given = {"use_dynamic_shifting": True, **DYNAMIC} if shift == "flux" else {"use_dynamic_shifting": False, "shift": shift}
        return {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, **given}
    assert isinstance(path, DiscretePath)
    return {
        "_class_name": "DDIMScheduler",
        "num_train_timesteps": path.steps,
        "beta_schedule": {ours: theirs for theirs, ours in SCHEDULES.items()}[path.schedule],
        "beta_start": path.beta_min,
        "beta_end": path.beta_max,
        "prediction_type": {ours: theirs for theirs, ours in PREDICTIONS.items()}[pipeline.config.denoiser.prediction],
        "rescale_betas_zero_snr": path.zero_terminal,
        "timestep_spacing": "trailing",
        "set_alpha_to_one": True,
        "clip_sample": False,
    }


def read_single_file(file: Path, base: Pipeline) -> list[str]:
    """Put the networks of a publisher's single file into a pipeline of the same architecture.

    Returns what the file holds besides and is not read: text encoders and tables of schedules. UserError where networks do not fit
    whole, or where there is anything else.
    """
    tensors = read_file(file)
    prefixes = dict(NETWORKS) if any(name.startswith(tuple(NETWORKS.values())) for name in tensors) else {"denoiser": ""}
    known = (*prefixes.values(), *TEXT_PARTS, *SCHEDULE_PARTS)
    if left := [name for name in tensors if not name.startswith(known)]:
        raise UserError(f"{file} holds {len(left)} tensors of no known part: {listed(left)}")
    for part, prefix in prefixes.items():
        net, inner = getattr(base, part), Part(tensors, prefix)
        if len(inner):
            meta = {name.removeprefix(prefix): x for name, x in tensors.meta().items() if name.startswith(prefix)}
            _fill(net, inner, meta, _original(of_ours(net.config))(net.config), file)
        elif part == "denoiser":
            raise UserError(f"{file} holds no denoiser: no tensor begins with {prefix}")
    return [part for part in (*TEXT_PARTS, *SCHEDULE_PARTS) if any(name.startswith(part) for name in tensors) and prefixes["denoiser"]]


def write_single_file(pipeline: Pipeline, file: Path) -> None:
    """Write denoiser and codec under the publisher's own names. UserError where those are not known."""
    tensors: dict[str, Tensor] = {}
    for part, prefix in NETWORKS.items():
        net = getattr(pipeline, part)
        theirs = _original(of_ours(net.config))(net.config).to_theirs(net.state_dict())
        tensors |= {prefix + name: tensor.contiguous() for name, tensor in theirs.items()}
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, file, metadata={"format": "pt"})


def _original(architecture: Architecture) -> Any:
    if architecture.original is None:
        raise UserError(f"the publisher's own names of a {architecture.name} are not known; use a diffusers folder")
    return architecture.original


def _write_json(path: Path, data: Data) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data, indent=2) + "\n")
