"""The command line, verb by verb. Whatever is slow to import is imported by the verb that needs it."""

import json
import shlex
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from mezzotint.errors import UserError, unknown

if TYPE_CHECKING:
    from rich.progress import Progress

    from mezzotint.pipeline import Sampling


SizeName = Literal["xs", "s", "m", "l"]
USAGE = """usage: mezzotint VERB ...

The whole life of an image model in one code base.

  speedrun   pre-train, fine-tune, align, distil and evaluate a model; ends in a report
  train      run a recipe, on Worlds or on a folder of images
  sample     draw pictures of a prompt
  eval       measure a model
  models     list the architectures and their published sizes
  import     make a pipeline of a published model on this machine
  export     write a pipeline in the format of other tools

Each verb has its own --help. Start with: mezzotint sample "a red star above a blue circle"
"""


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
class TrainOptions:
    """Run a recipe. Any field of the recipe can be set by its dotted name, as in --train.steps 100 (--fields lists them)."""

    recipe: tyro.conf.Positional[str]
    """Name of the recipe, as in tiny.worlds."""
    data: Path | None = None
    """Folder of images to train on, with captions in name.txt beside each image, or in metadata.jsonl or metadata.csv."""
    size: SizeName = "s"
    """The one dial: model size and length of training."""
    out: Path | None = None
    """Folder of the run; runs/RECIPE if not given. A run that is there already goes on."""
    fields: Annotated[bool, tyro.conf.arg(help_behavior_hint="")] = False
    """List all fields of the recipe with their values, and stop."""


@dataclass
class SampleOptions:
    """Draw pictures of a prompt."""

    prompt: tyro.conf.Positional[str]
    """What to draw."""
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


@dataclass
class EvalOptions:
    """Measure a model."""

    model: tyro.conf.Positional[str]
    """A packaged model, an exported pipeline, or the folder of a run."""
    suite: Literal["worlds", "images"] = "worlds"
    """worlds: the judge's six tasks. images: distance to held-out images of a folder."""
    data: Path | None = None
    """The folder of images, for the suite of that name."""
    prompts: int = 50
    """Prompts per task of the suite worlds."""
    json: bool = False
    """Print one JSON object instead of a table."""


@dataclass
class ModelsOptions:
    """List the published sizes of all architectures: parameters, and operations of one forward for the picture they were made for."""

    json: bool = False
    """Print one JSON array instead of a table."""


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


def speedrun(options: SpeedrunOptions) -> None:
    from mezzotint.speedrun import speedrun as run

    folder = options.out or Path(f"runs/speedrun-{options.size}")
    with _progress() as progress:
        report = run(folder, options.size, progress)
    print(f"report: {report}")
    print(f"sample: mezzotint sample {shlex.quote('a red star above a blue circle')} --model {folder / 'distil'}")


def train(options: TrainOptions, rest: list[str]) -> None:
    from mezzotint.data.folder import Folder
    from mezzotint.evals import images
    from mezzotint.recipes import RECIPES
    from mezzotint.train.trainer import RunConfig, Trainer

    if options.recipe not in RECIPES:
        raise unknown("recipe", options.recipe, RECIPES)
    config = RECIPES[options.recipe](options.size)
    if options.data is not None:
        rest = ["--data.path", str(options.data), *rest]
    known = dict(_dotted(config))
    if options.fields:
        print("\n".join(f"{name} = {value!r}" for name, value in known.items()))
        return
    for word in rest:
        name = word.removeprefix("--").split("=")[0].replace("-", "_")
        if word.startswith("--") and name not in known:
            raise unknown(f"field of {options.recipe}", name, known)
    conf = (tyro.conf.AvoidSubcommands, tyro.conf.FlagConversionOff)
    config = tyro.cli(RunConfig, default=config, args=rest, config=conf, prog=f"mezzotint train {options.recipe}")
    folder = options.out or Path("runs") / options.recipe
    source = config.data.build()
    if isinstance(source, Folder):
        print(source.report(), file=sys.stderr)
        if source.bad:
            folder.mkdir(parents=True, exist_ok=True)
            source.write_bad(folder / "set-aside.jsonl")
    if not config.train.preview_prompts:
        config.train.preview_prompts = tuple(source.held_out(8).prompts)
    with _progress() as progress:
        pipeline = Trainer(config, folder, source, progress).run()
    print(f"pipeline: {folder / 'export'}")
    if isinstance(source, Folder):
        _print_result(images.evaluate(pipeline, source))


def sample(options: SampleOptions) -> None:
    import torch

    from mezzotint.pictures import save
    from mezzotint.pipeline import load

    pipeline = load(options.model, None if options.dtype == "stored" else getattr(torch, options.dtype))
    size = _size(options.size) if options.size else None
    named = {"steps": options.steps, "guidance": options.guidance, "size": size, "solver": options.solver}
    changes = {name: value for name, value in named.items() if value is not None}
    settings = pipeline.config.sampling.replace(**changes)
    with _progress() as progress:
        bar = progress.add_task("sampling", total=None)
        images = pipeline(
            options.prompt,
            options.n,
            seed=options.seed,
            negative=options.negative,
            settings=settings,
            progress=lambda done, total: progress.update(bar, completed=done, total=total),
        )
    for k, image in enumerate(images):
        path = options.out if options.n == 1 else options.out.with_stem(f"{options.out.stem}-{k}")
        save(image, path, _parameters(options, settings, options.seed + k))
        print(path)


def _size(words: str) -> int | tuple[int, int]:
    """A side, or height and width, from "64" or "WIDTHxHEIGHT"."""
    numbers = words.lower().split("x")
    if len(numbers) > 2 or not all(number.isdecimal() and int(number) for number in numbers):
        raise UserError(f"--size must be a side in pixels or WIDTHxHEIGHT, as in 64 or 64x48, got {words!r}")
    width, height = int(numbers[0]), int(numbers[-1])
    return width if len(numbers) == 1 else (height, width)


def _parameters(options: SampleOptions, settings: "Sampling", seed: int) -> str:
    """The text that the ecosystem's tools read from a PNG: what made this picture."""
    negative = f"\nNegative prompt: {options.negative}" if options.negative else ""
    height, width = settings.shape
    return (
        f"{options.prompt}{negative}\nSteps: {settings.steps}, Sampler: {settings.solver}, CFG scale: {settings.guidance}, "
        f"Seed: {seed}, Size: {width}x{height}, Model: {options.model}"
    )


def evaluate(options: EvalOptions) -> None:
    from mezzotint.evals import images, worlds
    from mezzotint.pipeline import load

    pipeline = load(options.model)
    with _progress() as progress:
        bar = progress.add_task("evaluation", total=None)

        def show(done: int, total: int) -> None:
            progress.update(bar, completed=done, total=total)

        if options.suite == "worlds":
            result = worlds.evaluate(pipeline, worlds.Protocol(options.prompts), progress=show)
        else:
            from mezzotint.data.folder import FolderConfig

            if options.data is None:
                raise UserError("the suite images needs a folder of images: --data DIR")
            source = FolderConfig(path=str(options.data), size=pipeline.config.sampling.side).build()
            result = images.evaluate(pipeline, source, progress=show)
    if options.json:
        print(json.dumps(result))
    else:
        _print_result(result)


def models(options: ModelsOptions) -> None:
    from mezzotint.models.published import PUBLISHED, described

    rows = [described(name) for name in PUBLISHED]
    if options.json:
        print(json.dumps(rows))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table("name", "architecture", "parameters", "TFLOP", "px", "text", "published by", box=None)
    table.columns[0].no_wrap = True
    for row in rows:
        size, work = f"{row['parameters'] / 1e9:.3g}B", f"{row['flops'] / 1e12:.3g}"
        table.add_row(row["name"], row["architecture"], size, work, str(row["pixels"]), str(row["text"] or ""), row["source"])
    Console().print(table)


def import_(options: ImportOptions) -> None:
    from mezzotint.exchange import INDEX, read_diffusers, read_single_file
    from mezzotint.pipeline import load

    if (options.source / INDEX).is_file():
        pipeline = read_diffusers(options.source)
    elif not options.source.exists():
        raise UserError(f"no model at {options.source}: it does not exist")
    elif options.source.is_dir():
        raise UserError(f"{options.source} is no diffusers folder: expected {INDEX} there")
    elif not options.base:
        raise UserError("a single file has no text encoders; say with --base which pipeline of the same family lends the rest")
    else:
        pipeline = load(options.base, dtype=None)
        for part in read_single_file(options.source, pipeline):
            print(f"not read: {part}*", file=sys.stderr)
    pipeline.save(options.out)
    print(f"pipeline: {options.out}")


def export(options: ExportOptions) -> None:
    from mezzotint.exchange import write_diffusers, write_single_file
    from mezzotint.pipeline import load

    write = write_diffusers if options.to == "diffusers" else write_single_file
    write(load(options.model, dtype=None), options.out)
    print(options.out)


def _print_result(result: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("measure", "value")
    for name, value in _dotted_data(result):
        table.add_row(name, f"{value:.4g}" if isinstance(value, float) else str(value))
    Console().print(table)


def _dotted_data(data: dict[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for name, value in data.items():
        if isinstance(value, dict):
            yield from _dotted_data(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _dotted(config: Any, prefix: str = "") -> Iterable[tuple[str, Any]]:
    """The fields of nested dataclasses by their dotted names."""
    for field in fields(config):
        value = getattr(config, field.name)
        if is_dataclass(value):
            yield from _dotted(value, f"{prefix}{field.name}.")
        else:
            yield prefix + field.name, value


def _progress() -> "Progress":
    """Bars with time left, on stderr, so that stdout holds results only."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description:24}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    return Progress(*columns, console=Console(stderr=True))


VERBS: dict[str, tuple[Any, Callable[..., None]]] = {
    "speedrun": (SpeedrunOptions, speedrun),
    "train": (TrainOptions, train),
    "sample": (SampleOptions, sample),
    "eval": (EvalOptions, evaluate),
    "models": (ModelsOptions, models),
    "import": (ImportOptions, import_),
    "export": (ExportOptions, export),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb. Returns the exit code: 0 done, 1 a run that broke, 2 a user's mistake, 130 stopped by the user."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or words[0] in ("-h", "--help"):
        print(USAGE, end="")
        return 0
    try:
        return _verb(words)
    except UserError as error:
        return _say(f"error: {error}", 2)
    except KeyboardInterrupt:
        return _say("stopped; the same command goes on from the last checkpoint", 130)
    except OSError as error:
        return _say(f"error: {error.filename or 'the system'}: {error.strerror or error}", 2)


def _verb(words: list[str]) -> int:
    if words[0] == "--version":
        from mezzotint import __version__

        print(f"mezzotint {__version__}")
        return 0
    if words[0] not in VERBS:
        raise unknown("verb", words[0], VERBS)
    options, function = VERBS[words[0]]
    prog = f"mezzotint {words[0]}"
    if words[0] == "train":
        parsed, rest = tyro.cli(options, args=words[1:], prog=prog, return_unknown_args=True)
        return _run(lambda: function(parsed, rest))
    parsed = tyro.cli(options, args=words[1:], prog=prog)
    return _run(lambda: function(parsed))


def _run(function: Callable[[], None]) -> int:
    from mezzotint.train.guard import NonFiniteError
    from mezzotint.train.stop import Stopped

    try:
        function()
    except Stopped as error:
        return _say(f"{error}; everything is saved, the same command goes on from there", 130)
    except NonFiniteError as error:
        return _say(f"error: {error}", 1)
    return 0


def _say(message: str, code: int) -> int:
    print(message, file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
