"""Where it fits: the only sampling path. Previews, evaluation, roll-outs, export and the command line all call it.

A pipeline is a text encoder, a denoiser, a codec and the settings it samples with. It is also what training trains: a
role of a method holds a whole pipeline, so what was trained is what samples.

In: prompts -> pictures, saving and loading. Out: how models are trained, where prompts come from.
Gotchas: noise is drawn per picture from its own seed on the CPU, so a picture does not change with the batch it is in, the
device or its neighbours.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mezzotint import config
from mezzotint.codecs import IdentityConfig
from mezzotint.errors import UserError, unknown
from mezzotint.flow.guidance import cfg
from mezzotint.flow.path import to_velocity
from mezzotint.flow.solvers import SOLVERS, Step, randn_like
from mezzotint.flow.time import grid
from mezzotint.models import Cond, DiTConfig
from mezzotint.text import ByteEncoderConfig

CONFIG_FILE, WEIGHTS_FILE = "pipeline.json", "model.safetensors"
STARTER = Path(__file__).parent / "starter"


@dataclass
class Sampling(config.Config, kind="sampling"):
    """How a pipeline samples unless told otherwise.

    size: side of the square picture in pixels. steps: network calls of a one-call solver. guidance: 1 is off. interval:
    times at which guidance acts. shift: of the time grid towards noise (`flow.time.shift`). batch: pictures at once.
    """

    size: int = 32
    steps: int = 20
    guidance: float = 2.5
    interval: tuple[float, float] = (0.0, 1.0)
    solver: str = "euler"
    shift: float = 1.0
    batch: int = 64


@dataclass
class PipelineConfig(config.Config, kind="pipeline"):
    """The parts of a pipeline."""

    text: ByteEncoderConfig = field(default_factory=ByteEncoderConfig)
    denoiser: DiTConfig = field(default_factory=DiTConfig)
    codec: IdentityConfig = field(default_factory=IdentityConfig)
    sampling: Sampling = field(default_factory=Sampling)

    def build(self) -> "Pipeline":
        return Pipeline(self)


class Pipeline(nn.Module):
    """Text encoder + denoiser + codec + sampling settings. Calling it draws pictures; see `forward`."""

    def __init__(self, config: PipelineConfig) -> None:
        super().__init__()
        self.config = config
        self.text = config.text.build()
        self.denoiser = config.denoiser.build()
        self.codec = config.codec.build()

    def encode(self, prompts: Sequence[str]) -> Cond:
        """The conditions of B prompts."""
        cond: Cond = self.text(prompts)
        return cond

    def velocity(self, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """The velocity at x (B, ...) and t (B,), whatever the denoiser predicts."""
        return to_velocity(self.denoiser(x, t, cond), self.denoiser.prediction, x, t)

    def guided(
        self, cond: Cond, null: Cond, scale: float, interval: tuple[float, float] = (0.0, 1.0)
    ) -> Callable[[Tensor, Tensor], Tensor]:
        """The denoise function of B conditions under classifier-free guidance, both branches in one network call."""
        pair = Cond.cat([cond, null])

        def both(x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
            v_c, v_u = self.velocity(torch.cat([x, x]), torch.cat([t, t]), pair).chunk(2)
            return v_c, v_u

        return cfg(lambda x, t: self.velocity(x, t, cond), both, scale, interval)

    def steps(self, cond: Cond, generators: Sequence[torch.Generator], settings: Sampling, null: Cond | None = None) -> Iterator[Step]:
        """Solver steps in latent space from noise to sample, one generator per condition."""
        if settings.solver not in SOLVERS:
            raise unknown("solver", settings.solver, SOLVERS)
        shape = self.codec.latent_shape((settings.size, settings.size))
        x = randn_like(torch.empty(len(cond), *shape, device=cond.text.device), generators)
        denoise = self.guided(cond, cond.null() if null is None else null, settings.guidance, settings.interval)
        return SOLVERS[settings.solver](denoise, x, grid(settings.steps, settings.shift), generator=generators)

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
        """Draw n pictures of each prompt. Returns (len(prompts) * n, 3, size, size) float32 in [-1, 1], prompt by prompt.

        seed: of the first picture; picture k has seed + k. A sequence gives each picture its own.
        negative: what guidance steps away from, instead of the null condition.
        settings, changes: the pipeline's own `Sampling`, another one, and changes to its fields (``steps=8``).
        progress(done, total) is called after every step of every batch.
        """
        settings = self._settings(settings, changes)
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        asked = [prompt for prompt in prompts for _ in range(n)]
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
            null = self.encode([negative] * len(generators)) if negative else None
            done = start // settings.batch * settings.steps
            for number, step in enumerate(self.steps(self.encode(asked[part]), generators, settings, null), start=1):
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
            self.config.denoiser.grid(settings.size, settings.size)
        except ValueError as error:
            raise UserError(f"this model cannot draw that size: {error}") from error
        return settings

    def save(self, folder: Path | str, dtype: torch.dtype = torch.float32) -> None:
        """Write the pipeline as JSON and safetensors, whole or not at all: `load` gives it back, bit for bit in float32."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {name: tensor.detach().to("cpu", dtype).contiguous() for name, tensor in self.state_dict().items()}
        part = folder / f"{WEIGHTS_FILE}.part"
        save_file(tensors, part, metadata={"format": "pt", "mezzotint": "pipeline"})
        part.replace(folder / WEIGHTS_FILE)
        part = folder / f"{CONFIG_FILE}.part"
        part.write_text(json.dumps(self.config.to_data(), indent=2) + "\n")
        part.replace(folder / CONFIG_FILE)


def load(source: Path | str = "starter") -> Pipeline:
    """A pipeline from the name of a packaged model ("starter"), an exported folder, or a run's folder.

    UserError where there is none, where it is damaged, or where the weights belong to another architecture.
    """
    folder = _folder(source)
    try:
        description = config.Config.from_data(json.loads((folder / CONFIG_FILE).read_text()))
        tensors = load_file(folder / WEIGHTS_FILE)
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"cannot read the pipeline in {folder}: {error}") from error
    if not isinstance(description, PipelineConfig):
        raise UserError(f"{folder / CONFIG_FILE} describes a {description.kind}, not a pipeline")
    pipeline = description.build()
    load_weights(pipeline, tensors, folder)
    return pipeline.eval()


def _folder(source: Path | str) -> Path:
    if str(source) == "starter":
        return STARTER
    folder = Path(source)
    for candidate in (folder, folder / "export"):
        if (candidate / CONFIG_FILE).is_file():
            return candidate
    if not folder.exists():
        raise UserError(f"no pipeline at {folder}: the folder does not exist (a packaged one is called 'starter')")
    raise UserError(f"no pipeline in {folder}: expected {CONFIG_FILE} there or in its folder 'export'")


def load_weights(module: nn.Module, tensors: dict[str, Tensor], source: Path) -> None:
    """Fill a module; UserError that names what is missing, left over or of another shape, before anything is changed."""
    own = module.state_dict()
    wrong = [f"{n} is missing" for n in own if n not in tensors] + [f"{n} is not of this model" for n in tensors if n not in own]
    wrong += [
        f"{n} is {tuple(tensors[n].shape)} instead of {tuple(own[n].shape)}"
        for n in own
        if n in tensors and own[n].shape != tensors[n].shape
    ]
    if wrong:
        raise UserError(f"{source} holds weights of another architecture: {wrong[0]} ({len(wrong)} differences)")
    module.load_state_dict(tensors)
