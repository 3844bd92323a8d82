"""What each verb of the command line takes, and the words of its help."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

SizeName = Literal["xs", "s", "m", "l"]
TuneName = Literal["grpo", "dpo"]
DeviceName = Literal["auto", "cpu", "cuda"]


@dataclass
class SpeedrunOptions:
    """Worlds -> pre-training -> fine-tuning -> preference optimisation -> 4-step distillation -> evaluation -> report.

    Stopped at any point, the same command goes on from there.
    """

    size: SizeName = "s"
    """xs: two minutes. s: twenty minutes on two cores. m, l: one GPU."""
    out: Path | None = None
    """Folder of the run; runs/speedrun-SIZE if not given."""


@dataclass
class LifecycleOptions:
    """Worlds -> pre-training -> fine-tuning -> reward model -> GRPO or DPO -> 4-step distillation (DMD2) -> a subject in a LoRA -> report.

    Stopped at any point, the same command goes on from there.
    """

    size: SizeName = "s"
    """xs: two minutes. s: two cores. m, l: one GPU."""
    tune: TuneName = "grpo"
    """How the reward is raised: by policy gradients (Flow-GRPO), or by preferences among the model's own pictures (online DPO)."""
    out: Path | None = None
    """Folder of the run; runs/lifecycle-SIZE-TUNE if not given."""


@dataclass
class TrainOptions:
    """Run a recipe. Any field of the recipe can be set by its dotted name, as in --train.steps 100 (--fields lists them)."""

    recipe: tyro.conf.Positional[str]
    """Name of the recipe, as in tiny.worlds."""
    data: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """Folder of images to train on, with captions in name.txt beside each image, or in metadata.jsonl or metadata.csv; one of
    preference pairs, listed in pairs.jsonl or pairs.csv; or a table. Of several, --data NAME=PATH each, samples are mixed:
    --data.weights.NAME says how often those of one come."""
    init: str = ""
    """Model to start from: starter, an exported or imported pipeline, or the folder of a run. Its parts take the place of the recipe's."""
    size: SizeName = "s"
    """The one dial: model size and length of training."""
    out: Path | None = None
    """Folder of the run; runs/RECIPE if not given. A run that is there already goes on."""
    track: Literal["trackio", "wandb", "tensorboard"] | None = None
    """Where numbers and previews go besides the run's folder."""
    fields: Annotated[bool, tyro.conf.arg(help_behavior_hint="")] = False
    """List all fields of the recipe with their values, and stop."""


@dataclass
class SampleOptions:
    """Draw pictures of a prompt."""

    prompt: tyro.conf.Positional[str]
    """What to draw."""
    enhance: str = ""
    """Make the prompt longer first, and print it: by an endpoint (https://HOST/v1#MODEL, http://localhost:PORT/v1), by the folder of a
    causal language model, or by a run of tiny.enhance. A key is in the variable MEZZOTINT_ENHANCE_KEY."""
    model: str = "starter"
    """A packaged model, an exported pipeline, or the folder of a run."""
    out: Path = Path("sample.png")
    """File to write; with n > 1 the pictures are numbered: sample-0.png, sample-1.png, ..."""
    n: int = 1
    """How many pictures; picture k has the seed SEED + k."""
    seed: int = 0
    """Seed of the first picture."""
    steps: int | None = None
    """Solver steps."""
    guidance: float | None = None
    """Classifier-free guidance; 1 is off."""
    negative: str = ""
    """What to steer away from."""
    size: str | None = None
    """Side of the picture in pixels, or WIDTHxHEIGHT, as in 64x48."""
    solver: str | None = None
    """How to get there: unipc, dpmpp_2m, heun, consistency, ...; docs/sampling.md says when to take which."""
    dtype: Literal["stored", "float32", "bfloat16", "float16"] = "float32"
    """Precision of the networks' weights; stored: that of the files, which for most published models is half the memory."""
    device: DeviceName = "auto"
    """Where to compute; auto: a GPU where there is one."""


@dataclass
class EvalOptions:
    """Measure a model."""

    model: tyro.conf.Positional[str]
    """A packaged model, an exported pipeline, or the folder of a run."""
    suite: Literal["worlds", "images", "students", "subject", "pairs", "rewards", "enhance"] = "worlds"
    """worlds: the judge's six tasks. images: distance to held-out images of a folder. students: beside --teacher, from equal noise.
    subject: a personalised model's fidelity, and what it forgot. pairs: a reward model's accuracy and calibration on held-out pairs.
    rewards: whether a reinforced run deceives its reward. enhance: what a writer of longer prompts keeps and adds."""
    teacher: str = "starter"
    """What a student is compared with, for the suite of that name."""
    pictures: Path | None = None
    """For that suite: a PNG of both, drawn from the same noise, a row for each number of calls."""
    data: Path | None = None
    """The folder of images, for the suite of that name."""
    prompts: int = 50
    """Prompts per task of the suites worlds and students; of the suite enhance."""
    device: DeviceName = "auto"
    """Where to compute; auto: a GPU where there is one."""
    json: bool = False
    """Print one JSON object instead of a table."""


@dataclass
class RunsOptions:
    """List the runs in a folder; compare some; prune those that are finished."""

    folder: tyro.conf.Positional[Path] = Path("runs")
    """Where the runs are."""
    compare: tuple[str, ...] = ()
    """Names of runs, as listed: show in which settings they differ."""
    prune: bool = False
    """Say which checkpoints of finished runs can go; what was exported, logged and drawn stays."""
    yes: bool = False
    """With --prune: remove them."""
    json: bool = False
    """Print one JSON object instead of tables."""


@dataclass
class AverageOptions:
    """Make the pipeline of a moving average of any length from what a run with --optim.lengths has stored."""

    run: tyro.conf.Positional[Path]
    """Folder of the run."""
    length: float
    """Relative length: the spread of the average as a share of the run, as in 0.1."""
    out: Path
    """Folder of the pipeline."""
    step: int | None = None
    """After so many steps; all of them if not given."""


@dataclass
class ModelsOptions:
    """List the published sizes of all architectures: parameters, and operations of one forward for the picture they were made for."""

    json: bool = False
    """Print one JSON array instead of a table."""


@dataclass
class PlanOptions:
    """What a run will need before anything is paid for. Any field of the recipe can be set by its dotted name, as for train.

    docs/planning.md says what is counted and how well it agrees with measurements.
    """

    recipe: tyro.conf.Positional[str]
    """Name of a recipe (tiny.worlds), or of a published size as `mezzotint models` lists them (flux-dev)."""
    gpu: str = "h100"
    """What it runs on: a100-40, a100, h100, h200, b200, l40s, rtx4090."""
    gpus: int = 1
    """How many; weights, averages, gradients and states are sharded over them."""
    size: SizeName = "s"
    """The one dial of a recipe."""
    method: str = ""
    """Another method than the recipe's, with its own settings: denoise, dpo, consistency, dmd."""
    precision: Literal["float32", "bfloat16"] = "bfloat16"
    """What blocks compute in."""
    checkpointing: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Compute activations of every block again for its gradient, instead of keeping them."""
    lora: int = 0
    """Train an adapter of this rank instead of all weights."""
    context: int = 1
    """GPUs that share one sample, each with a part of its tokens."""
    offload: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Let frozen weights wait in the CPU's memory."""
    price: float | None = None
    """Dollars an hour for one GPU, instead of the table's."""
    json: bool = False
    """Print one JSON object instead of a table."""


@dataclass
class ImportOptions:
    """Make a pipeline of a published model that is on this machine: a diffusers folder, or a single .safetensors file with --base."""

    source: tyro.conf.Positional[Path]
    """A diffusers folder (with model_index.json), or the publisher's own single file."""
    out: Path
    """Folder of the pipeline, for --model of the other verbs."""
    base: str = ""
    """For a single file: the pipeline whose networks it replaces, and whose text encoders stay."""


@dataclass
class ExportOptions:
    """Write a pipeline in the format of other tools."""

    model: tyro.conf.Positional[str]
    """An exported or imported pipeline, or the folder of a run."""
    to: Literal["diffusers", "single-file"]
    """A folder that diffusers' own classes load, or one .safetensors file under the publisher's names, without text encoders."""
    out: Path
    """The folder or the file to write."""


EngineName = Literal["native", "ray"]


@dataclass(kw_only=True)
class Workers:
    """Who does the work, in verbs whose work can be dealt out."""

    engine: EngineName = "native"
    """native: this machine. ray: the cluster that RAY_ADDRESS names."""
    workers: int = 2
    """Processes that work side by side."""


@dataclass
class DataCurateOptions(Workers):
    """From raw files to a table worth training on: ingest, measure, find duplicates, judge, and draw the report.

    Stopped at any point, the same command goes on from there. Any field of the recipe can be set by its dotted name; thresholds can be
    changed without measuring again. Then: mezzotint train tiny.images --data TABLE
    """

    source: tyro.conf.Positional[str]
    """A folder, tar files, parquet, a data set on disk, a list of addresses, or a table that is there already."""
    out: Path | None = None
    """The table, as in photos.lance; not given for a table that is there already."""
    recipe: str = "photos"
    """What is measured, and where it is cut: photos, pixels, clips."""
    report: Path | None = None
    """The page to draw; TABLE.html beside the table if not given."""


@dataclass
class DataIngestOptions:
    """Read a source into a table, one row for each image or clip, whether it can be used or not. A table that is there gets what is new."""

    source: tyro.conf.Positional[str]
    """A folder, tar files, parquet, a data set on disk, or a list of addresses."""
    out: Path
    """The table, as in photos.lance."""


@dataclass
class DataDedupOptions(Workers):
    """Find duplicates, and rows that an evaluation set has too."""

    table: tyro.conf.Positional[Path]
    """The table."""
    against: Path | None = None
    """The table of an evaluation set: say which rows it has too, instead of duplicates within."""


@dataclass(kw_only=True)
class DataCaptionOptions(Workers):
    """Write captions, short and long. Says what it will cost before it starts."""

    table: tyro.conf.Positional[Path]
    """The table."""
    captioner: str
    """A folder of a transformers image-to-text model, or the address of an OpenAI-compatible endpoint."""
    model: str = ""
    """For an endpoint: the name of its model."""
    input_price: float = 0.0
    """For an endpoint: dollars for a million tokens that it reads."""
    output_price: float = 0.0
    """And for a million that it writes."""
    yes: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Start without asking where it costs money."""
    workers: int = 1
    """Processes that work side by side, each with a network of its own."""


@dataclass(kw_only=True)
class DataCacheOptions(Workers):
    """Write latents of pictures and states of captions to a table, so that training makes them no more.

    Where the table has them already from the same weights and settings, nothing is done; from others, they are made again.
    """

    table: tyro.conf.Positional[Path]
    """The table."""
    pipeline: str
    """Whose codec and text encoder: starter, an exported or imported pipeline, or the folder of a run. Training begins from it."""
    what: tuple[Literal["latents", "states"], ...] = ("latents", "states")
    """latents: of the pictures. states: of the captions."""
    size: int | None = None
    """Side of the pictures in pixels, as --data.size of the run; that which the pipeline draws if not given."""
    multiple: int = 0
    """0: squares. Else the shapes of --data.multiple."""
    captions: tuple[str, ...] = ("captions",)
    """The columns of captions that the run will draw from."""
    dtype: Literal["float16", "bfloat16", "float32"] = "float16"
    """Their precision."""
    device: DeviceName = "auto"
    """Where to compute; auto: a GPU where there is one."""
    workers: int = 1
    """Processes that work side by side, each with networks of its own."""


@dataclass
class DataReportOptions:
    """Draw the page on which a person looks at the data."""

    table: tyro.conf.Positional[Path]
    """The table."""
    out: Path | None = None
    """The page; TABLE.html beside the table if not given."""
    seed: int = 0
    """Of what is shown at random."""


@dataclass
class DataInspectOptions:
    """Print one row."""

    table: tyro.conf.Positional[Path]
    """The table."""
    row: tyro.conf.Positional[str]
    """Its id, or its number."""
    version: str = ""
    """A version by number or name; the newest if not given."""
    json: bool = False
    """Print one JSON object instead of a table."""


@dataclass
class DataSnapshotOptions:
    """Give the newest version of a table a name, for --data.version of a run."""

    table: tyro.conf.Positional[Path]
    """The table."""
    name: tyro.conf.Positional[str]
    """The name."""
