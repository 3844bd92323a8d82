"""Where it fits: the only sampling path. Previews, evaluation, roll-outs, export and the command line all call it.

A pipeline is a text encoder, a denoiser, the path it was trained on, a codec, and the settings it samples with. It is also what
training trains: a role of a method holds a whole pipeline, so what was trained is what samples.

In: prompts -> pictures, saving and loading. Out: how models are trained, where prompts come from, other formats (`exchange`).
Gotchas: noise is drawn per picture from its own seed on the CPU, so a picture does not change with the batch it is in, the
device or its neighbours. `velocity` is on the linear path, whatever the denoiser was trained on.
"""

import json
import math
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from mezzotint import config
from mezzotint.codecs import CodecConfig, IdentityConfig
from mezzotint.errors import UserError, unknown
from mezzotint.flow.guidance import ALWAYS, RULES, guided
from mezzotint.flow.path import (
    Network,
    Prediction,
    cosine_table,
    ddpm_table,
    from_discrete,
    scaled_linear_table,
    table_times,
    to_velocity,
    zero_terminal_table,
)
from mezzotint.flow.solvers import SOLVERS, Denoise, Step, randn_like
from mezzotint.flow.time import flux_ratio, grid
from mezzotint.models import Cond, DenoiserConfig, DiTConfig
from mezzotint.places import CONFIG_FILE, folder_of
from mezzotint.text import ByteEncoderConfig, TextConfig
from mezzotint.weights.files import read_file, read_json
from mezzotint.weights.names import put

DeviceName = Literal["auto", "cpu", "cuda"]
WEIGHTS_FILE = "model.safetensors"


@dataclass
class Sampling(config.Config, kind="sampling"):
    """How a pipeline samples unless told otherwise.

    size: side of the square picture in pixels, or (height, width). steps: network calls of a one-call solver. guidance: 1 is off; a
    network that was distilled with guidance is told the scale. interval: times at which guidance acts. rule: what guidance makes of
    its two branches (`flow.guidance.RULES`). shift: of the time grid towards noise (`flow.time.shift`); "flux" is the one that grows with
    the picture (`flow.time.flux_ratio`). batch: pictures at once.
    """

    size: int | tuple[int, int] = 32
    steps: int = 20
    guidance: float = 2.5
    interval: tuple[float, float] = (0.0, 1.0)
    rule: str = "cfg"
    solver: str = "euler"
    shift: float | Literal["flux"] = 1.0
    batch: int = 64

    @property
    def shape(self) -> tuple[int, int]:
        """Height and width in pixels."""
        return (self.size, self.size) if isinstance(self.size, int) else self.size

    @property
    def side(self) -> int:
        """Height and width in pixels where they must be equal. UserError where they are not."""
        height, width = self.shape
        if height != width:
            raise UserError(f"this needs square pictures, and the size is {width}x{height}; give one number as the size")
        return height


class PathConfig(config.Config, ABC, kind="path"):
    """Base of the paths on which networks are trained: how one is read on the linear path, and the times at which it is."""

    @abstractmethod
    def read(self, network: Network, kind: Prediction) -> Denoise:
        """The velocity on the linear path of network(x, t), whose prediction is of some kind."""

    @abstractmethod
    def times(self, steps: int, ratio: float) -> Tensor:
        """(steps + 1,) times of a sampler on the linear path, on the CPU, from the noisiest that the network knows down to 0."""


@dataclass
class LinearPath(PathConfig, kind="linear"):
    """The path of rectified flow, and of this package. Nothing to set."""

    def read(self, network: Network, kind: Prediction) -> Denoise:
        return lambda x, t: to_velocity(network(x, t), kind, x, t)

    def times(self, steps: int, ratio: float) -> Tensor:
        return grid(steps, ratio)


@dataclass
class DiscretePath(PathConfig, kind="discrete"):
    """The steps of DDPM, for networks whose time is t = i / steps with i the (fractional) index: Stable Diffusion, DiT, PixArt.

    schedule: how beta grows with the index from beta_min to beta_max (`flow.path.ddpm_table`, `scaled_linear_table`); "cosine" has
    no use for them. zero_terminal: whether the table is stretched to end in pure noise (Lin et al. 2024). A sampler starts at the
    last index and goes down evenly, which is the "trailing" spacing of the same paper.
    """

    steps: int = 1000
    schedule: Literal["linear", "scaled_linear", "cosine"] = "scaled_linear"
    beta_min: float = 0.00085
    beta_max: float = 0.012
    zero_terminal: bool = False

    def table(self) -> Tensor:
        """alphas_cumprod (steps,), on the CPU, where looking at it makes nobody wait."""
        with torch.device("cpu"):
            if self.schedule == "cosine":
                table = cosine_table(self.steps)
            else:
                table = (ddpm_table if self.schedule == "linear" else scaled_linear_table)(self.steps, self.beta_min, self.beta_max)
            return zero_terminal_table(table) if self.zero_terminal else table

    def read(self, network: Network, kind: Prediction) -> Denoise:
        return from_discrete(lambda x, i: network(x, i / self.steps), self.table(), kind)

    def times(self, steps: int, ratio: float) -> Tensor:
        index = (grid(steps, ratio)[:-1].double() * self.steps - 1).clamp_min(0)
        known = table_times(self.table())
        low = index.long().clamp_max(self.steps - 2)
        return torch.cat([torch.lerp(known[low], known[low + 1], index - low), known.new_zeros(1)]).float()


@dataclass
class PipelineConfig(config.Config, kind="pipeline"):
    """The parts of a pipeline. path: what the denoiser was trained on."""

    text: TextConfig = field(default_factory=ByteEncoderConfig)
    denoiser: DenoiserConfig = field(default_factory=DiTConfig)
    codec: CodecConfig = field(default_factory=IdentityConfig)
    sampling: Sampling = field(default_factory=Sampling)
    path: PathConfig = field(default_factory=LinearPath)

    def build(self) -> "Pipeline":
        return Pipeline(self)


class Pipeline(nn.Module):
    """Text encoder + denoiser + codec + sampling settings. Calling it draws pictures; see `forward`. The codec is frozen.

    ValueError where the denoiser has other channels than the codec.
    """

    def __init__(self, config: PipelineConfig) -> None:
        super().__init__()
        self.config = config
        self.text = config.text.build()
        self.denoiser = config.denoiser.build()
        self.codec = config.codec.build().requires_grad_(False)
        channels, *_ = self.codec.latent_shape((self.codec.factor, self.codec.factor))
        if channels != config.denoiser.channels:
            raise ValueError(f"denoiser.channels must be the codec's {channels}, got {config.denoiser.channels}")

    def encode(self, prompts: Sequence[str]) -> Cond:
        """The conditions of B prompts."""
        cond: Cond = self.text(prompts)
        return cond

    def null(self, cond: Cond, negative: str = "") -> Cond:
        """What guidance steps away from: a negative prompt, the empty one unless given, with what `cond` says of the picture itself."""
        said = self.encode([negative]).index(torch.zeros(len(cond), dtype=torch.int64))
        return replace(said, guidance=cond.guidance, jump=cond.jump, size=cond.size, control=cond.control, origin=cond.origin)

    def drop(self, cond: Cond, which: Tensor) -> Cond:
        """The rows where `which` (B,) is True replaced by null ones, as training for guidance needs."""
        own = torch.arange(len(cond))
        return Cond.cat([cond, self.null(cond)]).index(torch.where(which, own + len(cond), own))

    def velocity(self, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """The velocity on the linear path at x (B, ...) and t (B,), whatever the denoiser predicts and on whatever path.

        A picture's size is that of x, the guidance that a distilled network is told is 1 and the jump 0, unless `cond` says otherwise.
        """
        if cond.size is None:
            height, width = (self.codec.factor * side for side in x.shape[-2:])
            cond = replace(cond, size=torch.stack([torch.full((len(x),), float(side), device=x.device) for side in (height, width)], 1))
        if cond.guidance is None and self.config.denoiser.distilled:
            cond = replace(cond, guidance=x.new_ones(len(x)))
        if cond.jump is None and self.config.denoiser.jump:
            cond = replace(cond, jump=x.new_zeros(len(x)))
        denoise = self.config.path.read(partial(self._network, cond=cond), self.config.denoiser.prediction)
        return denoise(x, t)

    def _network(self, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """The denoiser in the precision of its weights."""
        dtype = next(self.denoiser.parameters()).dtype
        prediction: Tensor = self.denoiser(x.to(dtype), t, cond.in_precision(dtype))
        return prediction.to(x.dtype)

    def guided(
        self, cond: Cond, scale: float, null: Cond | None = None, interval: tuple[float, float] = ALWAYS, rule: str = "cfg"
    ) -> Denoise:
        """The denoise function of B conditions under classifier-free guidance, both branches in one network call.

        null: what it steps away from, `null(cond)` unless given. A network that was distilled with guidance is told the scale instead.
        """
        if self.config.denoiser.distilled:
            return partial(self.velocity, cond=replace(cond, guidance=torch.full((len(cond),), scale, device=cond.text.device)))
        if rule not in RULES:
            raise unknown("rule of guidance", rule, RULES)
        conditional = partial(self.velocity, cond=cond)
        if scale == 1:
            return conditional
        pair = Cond.cat([cond, self.null(cond) if null is None else null])

        def both(x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
            v_c, v_u = self.velocity(torch.cat([x, x]), torch.cat([t, t]), pair).chunk(2)
            return v_c, v_u

        return guided(conditional, both, RULES[rule](scale), interval)

    def times(self, settings: Sampling) -> Tensor:
        """(steps + 1,) times of a sampler, falling to 0."""
        if settings.shift != "flux":
            return self.config.path.times(settings.steps, settings.shift)
        rows, columns = self.grid(settings.shape)
        return self.config.path.times(settings.steps, flux_ratio(rows * columns))

    def grid(self, size: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns of the denoiser's patches for a picture of (height, width). ValueError for a size it cannot draw."""
        return self.config.denoiser.grid(*self.codec.latent_shape(size)[1:])

    def entered(self, noise: Tensor, times: Tensor) -> Tensor:
        """What a sampler starts from at the first of its times: unit noise where that time is 1.

        A path that ends before pure noise is entered as if unit noise were its last point, as published samplers have it.
        """
        t = times[0].item()
        return noise * math.hypot(1 - t, t)

    def steps(self, cond: Cond, generators: Sequence[torch.Generator], settings: Sampling, null: Cond | None = None) -> Iterator[Step]:
        """Solver steps in latent space from noise to sample, one generator per condition."""
        if settings.solver not in SOLVERS:
            raise unknown("solver", settings.solver, SOLVERS)
        times = self.times(settings)
        if self.config.denoiser.jump and settings.solver in ("euler", "consistency"):
            denoise = self._jumping(cond, times, settings, null)
        else:
            denoise = self.guided(cond, settings.guidance, null, settings.interval, settings.rule)
        noise = randn_like(torch.empty(len(cond), *self.codec.latent_shape(settings.shape), device=cond.text.device), generators)
        return SOLVERS[settings.solver](denoise, self.entered(noise, times), times, generator=generators)

    def _jumping(self, cond: Cond, times: Tensor, settings: Sampling, null: Cond | None) -> Denoise:
        """The denoise function of a network that predicts mean velocities, told how far each step goes: to the next of the times with
        `euler`, which is exact for the mean velocity, and to data with `consistency`.
        """
        ends = times if settings.solver == "euler" else torch.zeros_like(times)
        null = self.null(cond) if null is None else null

        def denoise(x: Tensor, t: Tensor) -> Tensor:
            passed = (times.to(t, non_blocking=True) >= t[:, None]).sum(1).clamp_max(len(times) - 1)
            jump = t - ends.to(t, non_blocking=True)[passed]
            told, untold = replace(cond, jump=jump), replace(null, jump=jump)
            return self.guided(told, settings.guidance, untold, settings.interval, settings.rule)(x, t)

        return denoise

    @torch.no_grad()
    def forward(
        self,
        prompts: Sequence[str] | str,
        n: int = 1,
        *,
        seed: int | Sequence[int] = 0,
        negative: str = "",
        settings: Sampling | None = None,
        progress: Callable[[int, int], None] | None = None,
        **changes: object,
    ) -> Tensor:
        """Draw n pictures of each prompt. Returns (len(prompts) * n, 3, height, width) float32 in [-1, 1], prompt by prompt.

        seed: of the first picture; picture k has seed + k. A sequence gives each picture its own.
        negative: what guidance steps away from, instead of the null condition.
        settings, changes: the pipeline's own `Sampling`, another one, and changes to its fields (``steps=8``).
        progress(done, total) is called after every step of every batch.
        UserError for settings out of their range, ValueError where no picture is asked for.
        """
        settings = self._settings(settings, changes)
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        asked = [prompt for prompt in prompts for _ in range(n)]
        if not asked:
            raise ValueError(f"prompts and n must ask for a picture, got {len(prompts)} prompts and n = {n}")
        seeds = list(range(seed, seed + len(asked))) if isinstance(seed, int) else list(seed)
        if len(seeds) != len(asked):
            raise ValueError(f"seed must be one number or one per picture: {len(seeds)} seeds for {len(asked)} pictures")
        training = self.training
        self.eval()
        images = []
        total = settings.steps * -(-len(asked) // settings.batch)
        for start in range(0, len(asked), settings.batch):
            part = slice(start, start + settings.batch)
            generators = [torch.Generator().manual_seed(s) for s in seeds[part]]
            cond = self.encode(asked[part])
            null = self.null(cond, negative) if negative else None
            done = start // settings.batch * settings.steps
            for number, step in enumerate(self.steps(cond, generators, settings, null), start=1):
                latents = step.x
                if progress is not None:
                    progress(done + number, total)
            images.append(self.codec.decode(latents).float().cpu())
        self.train(training)
        return torch.cat(images)

    def _settings(self, settings: Sampling | None, changes: dict[str, object]) -> Sampling:
        settings = settings or self.config.sampling
        for name in changes:
            if name not in vars(settings):
                raise unknown("sampling setting", name, vars(settings))
        settings = settings.replace(**changes)
        try:
            self.grid(settings.shape)
        except ValueError as error:
            raise UserError(f"this model cannot draw that size: {error}") from error
        for name, value in (("steps", settings.steps), ("batch", settings.batch)):
            if value < 1:
                raise UserError(f"{name} of sampling must be at least 1, got {value}")
        if not math.isfinite(settings.guidance):
            raise UserError(f"guidance of sampling must be finite, got {settings.guidance}")
        return settings

    def save(self, folder: Path | str, dtype: torch.dtype | None = None) -> None:
        """Write the pipeline as JSON and safetensors, each file whole or not at all: `load` gives it back, bit for bit.

        dtype: precision of the weights, as they are unless given. Encoders of published models are copied as they are.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {name: _stored(tensor, dtype) for name, tensor in self.state_dict().items()}
        part = folder / f"{WEIGHTS_FILE}.part"
        save_file(tensors, part, metadata={"format": "pt", "mezzotint": "pipeline"})
        part.replace(folder / WEIGHTS_FILE)
        description = replace(self.config, text=self.text.store(folder))
        part = folder / f"{CONFIG_FILE}.part"
        part.write_text(json.dumps(description.to_data(), indent=2) + "\n")
        part.replace(folder / CONFIG_FILE)


def _stored(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    tensor = tensor.detach().cpu()
    return (tensor.to(dtype) if dtype and tensor.is_floating_point() else tensor).contiguous()


def load(source: Path | str = "starter", dtype: torch.dtype | None = torch.float32) -> Pipeline:
    """A pipeline from the name of a packaged model ("starter"), an exported folder, or a run's folder.

    dtype: precision of its weights; None as they are stored. They are read one by one, so that nothing is in memory twice.
    UserError where there is none, where it is damaged, or where the weights belong to another architecture.
    """
    folder = folder_of(source)
    tensors = read_file(folder / WEIGHTS_FILE)
    with torch.device("meta"):
        pipeline = described(source).build()
    _compare(pipeline, tensors.meta(), folder)
    for name, tensor in tensors.items():
        put(pipeline, name, tensor.to(dtype) if dtype and tensor.is_floating_point() else tensor)
    return pipeline.eval()


def described(source: Path | str) -> PipelineConfig:
    """What `load` builds at a place, without its weights. UserError as there."""
    folder = folder_of(source)
    found = config.Config.from_data(read_json(folder / CONFIG_FILE))
    if not isinstance(found, PipelineConfig):
        raise UserError(f"{folder / CONFIG_FILE} describes a {found.kind}, not a pipeline")
    return found.replace(text=found.text.found_in(folder))


def find_device(name: DeviceName = "auto", number: int | None = None) -> torch.device:
    """The CPU, or the GPU of a number, by default this rank's; "auto" is a GPU where there is any. UserError for one that is not there."""
    number = int(os.environ.get("LOCAL_RANK", "0")) if number is None else number
    there = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "cpu" or (name == "auto" and not there):
        return torch.device("cpu")
    if number >= there:
        raise UserError(f"GPU number {number} was asked for, and torch finds {there} here; start fewer processes, or choose the device cpu")
    return torch.device("cuda", number)


def load_weights(module: nn.Module, tensors: dict[str, Tensor], source: Path) -> None:
    """Fill a module; UserError that names what is missing, left over or of another shape, before anything is changed."""
    _compare(module, tensors, source)
    module.load_state_dict(tensors)


def _compare(module: nn.Module, tensors: dict[str, Tensor], source: Path) -> None:
    own = module.state_dict()
    wrong = [f"{n} is missing" for n in own if n not in tensors] + [f"{n} is not of this model" for n in tensors if n not in own]
    wrong += [
        f"{n} is {tuple(tensors[n].shape)} instead of {tuple(own[n].shape)}"
        for n in own
        if n in tensors and own[n].shape != tensors[n].shape
    ]
    if wrong:
        raise UserError(f"{source} holds weights of another architecture: {wrong[0]} ({len(wrong)} differences)")
