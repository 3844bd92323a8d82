"""What each verb of the command line takes, and the words of its help: every number with its range."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import tyro
from tyro.conf import Positional
from tyro.constructors import PrimitiveConstructorSpec

SizeName = Literal["xs", "s", "m", "l"]
TuneName = Literal["grpo", "dpo"]
DeviceName = Literal["auto", "cpu", "cuda"]
SolverName = Literal["consistency", "ddpm", "dpmpp_2m", "dpmpp_2m_sde", "edm", "euler", "flow_sde", "heun", "unipc"]
TrackerName = Literal["trackio", "wandb", "tensorboard"]
MOST = 2**63 - 1  # what a seed can be


def _named(name: str) -> Any:
    """How help calls a word that has its place."""
    return tyro.conf.arg(metavar=name)


def _spec(metavar: str, read: Callable[[str], Any]) -> PrimitiveConstructorSpec[Any]:
    """A word with a reader of its own, whose ValueError says what the word must be."""
    return PrimitiveConstructorSpec(1, metavar, lambda words: read(words[0]), lambda value: True, lambda value: [str(value)])


def _number(kind: type[int] | type[float], least: float, most: float = MOST) -> PrimitiveConstructorSpec[Any]:
    """A number within a range."""
    what = "a whole number" if kind is int else "a number"
    among = f"of at least {least:g}" if most == MOST else f"from {least:g} to {most:g}"

    def read(word: str) -> int | float:
        try:
            number = kind(word)
        except ValueError:
            number = math.nan
        if not least <= number <= most:
            raise ValueError(f"must be {what} {among}, got {word!r}")
        return number

    return _spec(f"{least:g}.." if most == MOST else f"{least:g}..{most:g}", read)


def _one_of(names: Sequence[str]) -> PrimitiveConstructorSpec[Any]:
    """One of some names, or none."""

    def read(word: str) -> str:
        if word not in names:
            raise ValueError(f"must be one of {', '.join(names)}, got {word!r}")
        return word

    return _spec(f"{{{','.join(names)}}}", read)


def _sides(word: str) -> int | tuple[int, int]:
    """A side, or height and width, from "64" or "WIDTHxHEIGHT"."""
    numbers = word.lower().split("x")
    if len(numbers) > 2 or not all(number.isdecimal() and int(number) for number in numbers):
        raise ValueError(f"must be a side in pixels or WIDTHxHEIGHT, as in 64 or 64x48, got {word!r}")
    width, height = int(numbers[0]), int(numbers[-1])
    return width if len(numbers) == 1 else (height, width)


def _png(word: str) -> Path:
    if Path(word).suffix.lower() != ".png":
        raise ValueError(f"must be a file name that ends in .png, got {word!r}")
    return Path(word)


UNSAID = tyro.conf.arg(help_behavior_hint="")  # the help says itself what holds where nothing is given
OWN = tyro.conf.arg(help_behavior_hint="(default: the model's own)")
Count = Annotated[int, _number(int, 1)]
Whole = Annotated[int, _number(int, 0)]
Price = Annotated[float, _number(float, 0)]
Png = Annotated[Path, _spec("FILE.png", _png)]
OptionalPath = Annotated[Path | None, UNSAID]
Recipe = Positional[Annotated[str, _named("RECIPE")]]
Model = Positional[Annotated[str, _named("MODEL")]]
Source = Positional[Annotated[str, _named("SOURCE")]]
TablePath = Positional[Annotated[Path, _named("TABLE")]]


@dataclass
class SpeedrunOptions:
    """Worlds -> pre-training -> fine-tuning -> preference optimisation -> 4-step distillation -> evaluation -> report.

    Stopped at any point, the same command goes on from there.
    """

    size: SizeName = "s"
    """xs: two minutes. s: twenty minutes on two cores. m, l: one GPU."""
    out: OptionalPath = None
    """Folder of the run; runs/speedrun-SIZE if not given."""


@dataclass
class LifecycleOptions:
    """Worlds -> pre-training -> fine-tuning -> reward model -> DPO or GRPO -> 4-step distillation (DMD2) -> a subject in a LoRA -> report.

    Stopped at any point, the same command goes on from there.
    """

    size: SizeName = "s"
    """xs: two minutes. s: two cores. m, l: one GPU."""
    tune: TuneName = "dpo"
    """How the reward is raised: by preferences among the model's own pictures (online DPO), or by policy gradients (Flow-GRPO)."""
    out: OptionalPath = None
    """Folder of the run; runs/lifecycle-SIZE-TUNE if not given."""


@dataclass
class TrainOptions:
    """Run a recipe. Any field of the recipe can be set by its dotted name, as in --train.steps 100 (--fields lists them)."""

    recipe: Recipe
    """Name of the recipe, as in tiny.worlds."""
    data: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """Folder of images to train on, with captions in name.txt beside each image, or in metadata.jsonl or metadata.csv; one of
    preference pairs, listed in pairs.jsonl or pairs.csv; or a table. Of several, --data NAME=PATH each, samples are mixed:
    --data.weights.NAME says how often those of one come."""
    init: str = ""
    """Model to start from: starter, an exported or imported pipeline, or the folder of a run. Its parts take the place of the recipe's."""
    size: SizeName = "s"
    """The one dial: model size and length of training."""
    out: OptionalPath = None
    """Folder of the run; runs/RECIPE if not given. A run that is there already goes on."""
    track: Annotated[TrackerName | None, _one_of(get_args(TrackerName)), UNSAID] = None
    """Where numbers and previews go besides the run's folder."""
    fields: bool = False
    """List all fields of the recipe with their values, and stop."""


@dataclass
class SampleOptions:
    """Draw pictures of a prompt."""

    prompt: Positional[Annotated[str, _named("PROMPT")]]
    """What to draw."""
    enhance: str = ""
    """Make the prompt longer first, and print it. By whom: an endpoint (https://HOST/v1#MODEL, http://localhost:PORT/v1, its key in the
    variable MEZZOTINT_ENHANCE_KEY), the folder of a causal language model, or a run of tiny.enhance."""
    model: str = "starter"
    """A packaged model, an exported pipeline, or the folder of a run."""
    out: Png = Path("sample.png")
    """File to write; with n > 1 the pictures are numbered: sample-0.png, sample-1.png, ..."""
    n: Count = 1
    """How many pictures; picture k has the seed SEED + k."""
    seed: Whole = 0
    """Seed of the first picture."""
    steps: Annotated[int | None, _number(int, 1), OWN] = None
    """Solver steps."""
    guidance: Annotated[float | None, _number(float, 0), OWN] = None
    """Classifier-free guidance; 1 is off."""
    negative: str = ""
    """What to steer away from."""
    size: Annotated[int | tuple[int, int] | None, _spec("PIXELS|WIDTHxHEIGHT", _sides), OWN] = None
    """Side of the picture in pixels, or WIDTHxHEIGHT, as in 64x48."""
    solver: Annotated[SolverName | None, _one_of(get_args(SolverName)), OWN] = None
    """How to get there; docs/sampling.md says when to take which."""
    dtype: Literal["stored", "float32", "bfloat16", "float16"] = "float32"
    """Precision of the networks' weights; stored: that of the files, which for most published models is half the memory."""
    device: DeviceName = "auto"
    """Where to compute; auto: a GPU where there is one."""


@dataclass
class EvalOptions:
    """Measure a model."""

    model: Model
    """A packaged model, an exported pipeline, or the folder of a run."""
    suite: Literal["worlds", "images", "students", "subject", "pairs", "rewards", "enhance"] = "worlds"
    """worlds: the judge's six tasks. images: distance to held-out images of a folder. students: beside --teacher, from equal noise.
    subject: a personalised model's fidelity, and what it forgot. pairs: a reward model's accuracy and calibration on held-out pairs.
    rewards: whether a reinforced run deceives its reward. enhance: what a writer of longer prompts keeps and adds."""
    teacher: str = "starter"
    """What a student is compared with, for the suite of that name."""
    pictures: OptionalPath = None
    """For that suite: a PNG of both, drawn from the same noise, a row for each number of calls."""
    data: OptionalPath = None
    """The folder of images, for the suite of that name."""
    prompts: Count = 50
    """Prompts per task of the suites worlds and students; of the suite enhance."""
    device: DeviceName = "auto"
    """Where to compute; auto: a GPU where there is one."""
    json: bool = False
    """Print one JSON object instead of a table."""


@dataclass
class RunsOptions:
    """List the runs in a folder; compare some; prune those that are finished."""

    folder: Positional[Annotated[Path, _named("FOLDER")]] = Path("runs")
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

    run: Positional[Annotated[Path, _named("RUN")]]
    """Folder of the run."""
    length: Annotated[float, _number(float, 0.001, 0.28)]
    """Relative length: the spread of the average as a share of the run, as in 0.1."""
    out: Path
    """Folder of the pipeline."""
    step: Annotated[int | None, _number(int, 1), UNSAID] = None
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

    recipe: Recipe
    """Name of a recipe (tiny.worlds), or of a published size as `mezzotint models` lists them (flux-dev)."""
    gpu: str = "h100"
    """What it runs on: a100-40, a100, h100, h200, b200, l40s, rtx4090."""
    gpus: Count = 1
    """How many; weights, averages, gradients and states are sharded over them."""
    size: SizeName = "s"
    """The one dial of a recipe."""
    method: str = ""
    """Another method than the recipe's, with its own settings: denoise, dpo, consistency, dmd."""
    precision: Literal["float32", "bfloat16"] = "bfloat16"
    """What blocks compute in."""
    checkpointing: bool = False
    """Compute activations of every block again for its gradient, instead of keeping them."""
    lora: Whole = 0
    """Train an adapter of this rank instead of all weights."""
    context: Count = 1
    """GPUs that share one sample, each with a part of its tokens."""
    offload: bool = False
    """Let frozen weights wait in the CPU's memory."""
    price: Annotated[float | None, _number(float, 0), UNSAID] = None
    """Dollars an hour for one GPU, instead of the table's."""
    json: bool = False
    """Print one JSON object instead of a table."""


@dataclass
class ImportOptions:
    """Make a pipeline of a published model that is on this machine: a diffusers folder, or a single .safetensors file with --base."""

    source: Positional[Annotated[Path, _named("SOURCE")]]
    """A diffusers folder (with model_index.json), or the publisher's own single file."""
    out: Path
    """Folder of the pipeline, for --model of the other verbs."""
    base: str = ""
    """For a single file: the pipeline whose networks it replaces, and whose text encoders stay."""


@dataclass
class ExportOptions:
    """Write a pipeline in the format of other tools."""

    model: Model
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
    workers: Count = 2
    """Processes that work side by side."""


@dataclass
class DataCurateOptions(Workers):
    """From raw files to a table worth training on: ingest, measure, find duplicates, judge, and draw the report.

    Stopped at any point, the same command goes on from there. Any field of the recipe can be set by its dotted name; thresholds can be
    changed without measuring again. Then: mezzotint train tiny.images --data TABLE
    """

    source: Source
    """A folder, tar files, parquet, a data set on disk, a list of addresses, or a table that is there already."""
    out: OptionalPath = None
    """The table, as in photos.lance; not given for a table that is there already."""
    recipe: str = "photos"
    """What is measured, and where it is cut: photos, pixels, clips."""
    report: OptionalPath = None
    """The page to draw; TABLE.html beside the table if not given."""


@dataclass
class DataIngestOptions:
    """Read a source into a table, one row for each image or clip, whether it can be used or not. A table that is there gets what is new."""

    source: Source
    """A folder, tar files, parquet, a data set on disk, or a list of addresses."""
    out: Path
    """The table, as in photos.lance."""


@dataclass
class DataDedupOptions(Workers):
    """Find duplicates, and rows that an evaluation set has too."""

    table: TablePath
    """The table."""
    against: OptionalPath = None
    """The table of an evaluation set: say which rows it has too, instead of duplicates within."""


@dataclass(kw_only=True)
class DataCaptionOptions(Workers):
    """Write captions, short and long. Says what it will cost before it starts."""

    table: TablePath
    """The table."""
    captioner: str
    """A folder of a transformers image-to-text model, or the address of an OpenAI-compatible endpoint."""
    model: str = ""
    """For an endpoint: the name of its model."""
    input_price: Price = 0.0
    """For an endpoint: dollars for a million tokens that it reads."""
    output_price: Price = 0.0
    """And for a million that it writes."""
    yes: bool = False
    """Start without asking where it costs money."""
    workers: Count = 1
    """Processes that work side by side, each with a network of its own."""


@dataclass(kw_only=True)
class DataCacheOptions(Workers):
    """Write latents of pictures and states of captions to a table, so that training makes them no more.

    Where the table has them already from the same weights and settings, nothing is done; from others, they are made again.
    """

    table: TablePath
    """The table."""
    pipeline: str
    """Whose codec and text encoder: starter, an exported or imported pipeline, or the folder of a run. Training begins from it."""
    what: tuple[Literal["latents", "states"], ...] = ("latents", "states")
    """latents: of the pictures. states: of the captions."""
    size: Annotated[int | None, _number(int, 1), UNSAID] = None
    """Side of the pictures in pixels, as --data.size of the run; that which the pipeline draws if not given."""
    multiple: Whole = 0
    """0: squares. Else the shapes of --data.multiple."""
    captions: tuple[str, ...] = ("captions",)
    """The columns of captions that the run will draw from."""
    dtype: Literal["float16", "bfloat16", "float32"] = "float16"
    """Their precision."""
    device: DeviceName = "auto"
    """Where to compute; auto: a GPU where there is one."""
    workers: Count = 1
    """Processes that work side by side, each with networks of its own."""


@dataclass
class DataReportOptions:
    """Draw the page on which a person looks at the data."""

    table: TablePath
    """The table."""
    out: OptionalPath = None
    """The page; TABLE.html beside the table if not given."""
    seed: Whole = 0
    """Of what is shown at random."""


@dataclass
class DataInspectOptions:
    """Print one row."""

    table: TablePath
    """The table."""
    row: Positional[Annotated[str, _named("ROW")]]
    """Its id, or its number."""
    version: str = ""
    """A version by number or name; the newest if not given."""
    json: bool = False
    """Print one JSON object instead of a table."""


@dataclass
class DataSnapshotOptions:
    """Give the newest version of a table a name, for --data.version of a run."""

    table: TablePath
    """The table."""
    name: Positional[Annotated[str, _named("NAME")]]
    """The name."""
