"""The command line, verb by verb. Whatever is slow to import is imported by the verb that needs it."""

import json
import re
import shlex
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from inspect import isabstract
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tyro

from mezzotint.bars import bars, first_of_ranks
from mezzotint.errors import UserError, unknown
from mezzotint.options import (
    AverageOptions,
    DataCacheOptions,
    DataCaptionOptions,
    DataCurateOptions,
    DataDedupOptions,
    DataIngestOptions,
    DataInspectOptions,
    DataReportOptions,
    DataSnapshotOptions,
    EvalOptions,
    ExportOptions,
    ImportOptions,
    LifecycleOptions,
    ModelsOptions,
    PlanOptions,
    RunsOptions,
    SampleOptions,
    SpeedrunOptions,
    TrainOptions,
)

if TYPE_CHECKING:
    from mezzotint.pipeline import Sampling
    from mezzotint.train.runs import Found
    from mezzotint.train.stages import StageConfig
    from mezzotint.train.trainer import RunConfig


USAGE = """usage: mezzotint VERB ...

The whole life of an image model in one code base.

  speedrun   pre-train, fine-tune, align, distil and evaluate a model; ends in a report
  lifecycle  the same with a reward model, reinforcement, a 4-step student and a subject
  train      run a recipe, on Worlds or on a folder of images
  sample     draw pictures of a prompt
  eval       measure a model
  runs       list, compare and prune runs
  average    make another moving average of a run's weights
  models     list the architectures and their published sizes
  plan       what a run will need: memory, time, money, and what makes it fit
  import     make a pipeline of a published model on this machine
  export     write a pipeline in the format of other tools

Of data:

  data curate    from raw files to a table worth training on
  data ingest    read a source into a table
  data dedup     find duplicates, and what an evaluation set has too
  data caption   write captions
  data cache     write latents and text states, so that training makes them no more
  data report    draw the page on which a person looks at the data
  data inspect   print a row
  data snapshot  name a version

Each verb has its own --help. Start with: mezzotint sample "a red star above a blue circle"
"""


def speedrun(options: SpeedrunOptions) -> None:
    from mezzotint.speedrun import speedrun as run

    folder = options.out or Path(f"runs/speedrun-{options.size}")
    with bars() as progress:
        report = run(folder, options.size, progress)
    print(f"report: {report}")
    print(f"sample: mezzotint sample {shlex.quote('a red star above a blue circle')} --model {folder / 'distil'}")


def lifecycle(options: LifecycleOptions) -> None:
    from mezzotint.lifecycle import lifecycle as run
    from mezzotint.worlds import subject

    folder = options.out or Path(f"runs/lifecycle-{options.size}-{options.tune}")
    with bars() as progress:
        report = run(folder, options.size, options.tune, progress)
    print(f"report: {report}")
    print(f"sample: mezzotint sample {shlex.quote(subject.CAPTION)} --model {folder / 'subject'}")


def train(options: TrainOptions, rest: list[str]) -> None:
    from mezzotint.data.batch import Stored
    from mezzotint.data.folder import Folder
    from mezzotint.data.mixture import MixtureConfig, found
    from mezzotint.data.rows import TableConfig
    from mezzotint.data.survey import write_bad
    from mezzotint.evals import images
    from mezzotint.pipeline import described
    from mezzotint.recipes import RECIPES
    from mezzotint.recipes.post import started
    from mezzotint.train.parallel import leave
    from mezzotint.train.trainer import Trainer

    if options.recipe not in RECIPES:
        raise unknown("recipe", options.recipe, RECIPES)
    config = RECIPES[options.recipe](options.size)
    if options.init:
        config = replace(started(config, described(options.init), options.size), init=options.init)
    if options.data:
        config.data = found(options.data, config.data.size)
    if options.fields:
        print("\n".join(f"{name} = {value!r}" for name, value in _fields(config)))
        return
    config = _with_fields(config, rest, f"train {options.recipe}")
    folder = options.out or Path("runs") / options.recipe
    if isinstance(config.data, TableConfig | MixtureConfig):
        config.data = config.data.pinned(folder)
    source = config.data.build()
    if isinstance(source, Stored) and first_of_ranks():
        print(source.report(), file=sys.stderr)
        if source.bad:
            folder.mkdir(parents=True, exist_ok=True)
            write_bad(source.bad, folder / "set-aside.jsonl")
    if not config.train.preview_prompts:
        config.train.preview_prompts = tuple(source.held_out(8).prompts)
    with bars() as progress:
        pipeline = Trainer(config, folder, source, progress, options.track).run()
    leave()
    if not first_of_ranks():
        return
    print(f"pipeline: {folder / 'export'}")
    if isinstance(source, Folder):
        _print_result(images.evaluate(pipeline, source))


def _with_fields(config: "RunConfig", words: list[str], what: str) -> "RunConfig":
    """A run's configuration with fields set by words such as ``--train.steps 100``. UserError for one that it does not have."""
    from mezzotint.train.stages import StageConfig

    own, staged = _by_stage(words)
    stages = list(config.stages)
    config = _parsed(replace(config, stages=()), own, what)
    for number, given in sorted(staged.items()):
        if number > len(stages):
            raise unknown(f"field of {what.split()[-1]}", f"stages.{number}", [f"stages.{k}" for k in range(len(stages) + 1)])
        stages += [StageConfig(0)] * (number == len(stages))
        stages[number] = _stage(config, stages[number], given, f"{what} stages.{number}")
    return replace(config, stages=tuple(stages))


def _by_stage(words: list[str]) -> tuple[list[str], dict[int, list[str]]]:
    """Words that set fields of a run, and those that set fields of its stages, ``--stages.0.optim.lr 1e-3``, without that beginning."""
    own, staged = list[str](), dict[int, list[str]]()
    into = own
    for word in words:
        found = re.match(r"--stages\.(\d+)\.(.*)", word, re.DOTALL)
        if found:
            into = staged.setdefault(int(found[1]), [])
            word = f"--{found[2]}"
        elif word.startswith("--"):
            into = own
        into.append(word)
    return own, staged


def _stage(config: "RunConfig", stage: "StageConfig", words: list[str], what: str) -> "StageConfig":
    """A stage with fields set by words; its length is called `steps`."""
    from mezzotint.train.stages import StageConfig, changeable, changed, dotted

    run = changed(config, stage.changes)
    run.train = replace(run.train, steps=stage.steps)
    names = [_name(word) for word in words if word.startswith("--")]
    for name in names:
        if name != "steps" and not changeable(name):
            raise unknown(f"field of {what.split()[-1]}", name, ["steps", *(known for known, _ in dotted(run) if changeable(known))])
    run = _parsed(run, ["--train.steps" + word.removeprefix("--steps") if _name(word) == "steps" else word for word in words], what)
    values = dict(dotted(run))
    return StageConfig(run.train.steps, stage.changes | {name: values[name] for name in names if name != "steps"})


def _name(word: str) -> str:
    """The field that a word such as ``--train.batch=8`` sets; empty for a value."""
    return word.removeprefix("--").split("=")[0].replace("-", "_") if word.startswith("--") else ""


def _parsed(config: "RunConfig", words: list[str], what: str) -> "RunConfig":
    """A configuration without stages with fields set by words."""
    from mezzotint.train.stages import dotted

    known = dict(dotted(config))
    for name in filter(None, map(_name, words)):
        if name not in known:
            raise unknown(f"field of {what.split()[-1]}", name, known)
    conf = (tyro.conf.AvoidSubcommands, tyro.conf.FlagConversionOff)
    return tyro.cli(type(config), default=config, args=words, config=conf, prog=f"mezzotint {what}")


def _fields(config: "RunConfig") -> Iterable[tuple[str, Any]]:
    """All fields of a run and of its stages by the names that set them."""
    from mezzotint.train.stages import dotted

    yield from ((name, value) for name, value in dotted(config) if name != "stages")
    for number, stage in enumerate(config.stages):
        yield from ((f"stages.{number}.{name}", value) for name, value in {"steps": stage.steps, **stage.changes}.items())


def sample(options: SampleOptions) -> None:
    import torch

    from mezzotint.pictures import save
    from mezzotint.pipeline import find_device, load

    if options.enhance:
        options = replace(options, prompt=_enhanced(options))
    pipeline = load(options.model, None if options.dtype == "stored" else getattr(torch, options.dtype)).to(find_device(options.device))
    size = _size(options.size) if options.size else None
    named = {"steps": options.steps, "guidance": options.guidance, "size": size, "solver": options.solver}
    changes = {name: value for name, value in named.items() if value is not None}
    settings = pipeline.config.sampling.replace(**changes)
    with bars() as progress:
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


def _enhanced(options: SampleOptions) -> str:
    """The prompt to draw, which is printed; where it is not a longer one, a note says why."""
    from mezzotint.pipeline import find_device
    from mezzotint.text.enhance import Trained, enhance, source
    from mezzotint.worlds.caption import lost, lost_scene

    writer = source(options.enhance, find_device(options.device))
    found = enhance(options.prompt, writer, lost_scene if isinstance(writer, Trained) else lost)
    if found.note:
        print(f"note: {found.note}", file=sys.stderr)
    print(f"prompt: {found.prompt}")
    return found.prompt


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
    from mezzotint.evals import images, students, subject, worlds
    from mezzotint.pipeline import find_device, load

    if options.suite in ("pairs", "rewards", "enhance"):
        _show_result(_without_pictures(options), options.json)
        return
    device = find_device(options.device)
    pipeline = load(options.model).to(device)
    with bars() as progress:
        bar = progress.add_task("evaluation", total=None)

        def show(done: int, total: int) -> None:
            progress.update(bar, completed=done, total=total)

        if options.suite == "worlds":
            result = worlds.evaluate(pipeline, worlds.Protocol(options.prompts), progress=show)
        elif options.suite == "students":
            result = students.evaluate(
                pipeline, load(options.teacher).to(device), students.Protocol(options.prompts), show, options.pictures
            )
        elif options.suite == "subject":
            result = subject.evaluate(pipeline, subject.Protocol(prompts=options.prompts), progress=show)
        else:
            from mezzotint.data.folder import FolderConfig

            if options.data is None:
                raise UserError("the suite images needs a folder of images: --data DIR")
            source = FolderConfig(path=str(options.data), size=pipeline.config.sampling.side).build()
            result = images.evaluate(pipeline, source, progress=show)
    _show_result(result, options.json)


def _without_pictures(options: EvalOptions) -> dict[str, Any]:
    """The suites that draw no picture."""
    from mezzotint.evals import enhance, pairs, rewards
    from mezzotint.train.log import read

    if options.suite == "pairs":
        return pairs.evaluate(options.model)
    if options.suite == "enhance":
        try:
            return enhance.evaluate(options.model, options.prompts)
        except ValueError as error:
            raise UserError(f"the suite enhance measures a writer that was trained here: {error}") from error
    try:
        return rewards.evaluate(read(Path(options.model) / "metrics.jsonl"))
    except ValueError as error:
        raise UserError(f"{options.model} is no run with rewards, or too short a one: {error}") from error


def _show_result(result: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps(result))
    else:
        _print_result(result)


def runs(options: RunsOptions) -> None:
    from dataclasses import asdict

    from mezzotint.train.runs import compare, describe, found, prune

    paths = {(run := describe(path, options.folder)).name: (path, run) for path in found(options.folder)}
    for name in options.compare:
        if name not in paths:
            raise unknown("run", name, paths)
    chosen = {name: paths[name] for name in options.compare or paths}
    differences = compare([path for path, _ in chosen.values()]) if options.compare else {}
    if options.prune and options.yes:
        for path, run in chosen.values():
            if run.finished:
                prune(path)
    if options.json:
        print(json.dumps({"runs": [asdict(run) for _, run in chosen.values()], "differences": differences}))
        return
    _print_runs([run for _, run in chosen.values()], differences)
    if options.compare and not differences:
        print("all settings are the same")
    if options.prune:
        freed = sum(run.prunable for _, run in chosen.values()) / 2**20
        print(f"{freed:.1f} MB of checkpoints of finished runs {'removed' if options.yes else 'can go; --yes removes them'}")


def _print_runs(found: Sequence["Found"], differences: dict[str, list[Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("run", "method", "step", "loss", "held out", "best", "minutes", "MB", box=None)
    table.columns[0].no_wrap = True
    for run in found:
        losses = ["" if loss is None else f"{loss:.4g}" for loss in (run.loss, run.held_out, run.best)]
        step = f"{run.step}" if run.finished else f"{run.step} of {run.steps}"
        table.add_row(run.name, run.method, step, *losses, f"{run.seconds / 60:.1f}", f"{run.size / 2**20:.1f}")
    Console().print(table)
    if differences:
        settings = Table("setting", *[run.name for run in found], box=None)
        for name, values in differences.items():
            settings.add_row(name, *map(str, values))
        Console().print(settings)


def average(options: AverageOptions) -> None:
    from mezzotint.pipeline import PipelineConfig, load_weights
    from mezzotint.train.average import FOLDER, reconstruct
    from mezzotint.weights.files import read_json

    folder = options.run / FOLDER / "student"
    tensors, distance = reconstruct(folder, options.length, options.step)
    pipeline = PipelineConfig.from_data(read_json(options.run / "config.json")["pipeline"]).build()
    load_weights(pipeline, tensors, folder)
    pipeline.save(options.out)
    print(f"pipeline: {options.out} (its profile is {distance:.1%} off)")


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


def plan(options: PlanOptions, rest: list[str]) -> None:
    from mezzotint.config import Config
    from mezzotint.methods.method import MethodConfig
    from mezzotint.models import PRESETS
    from mezzotint.recipes import RECIPES
    from mezzotint.recipes.published import published
    from mezzotint.train.advice import advice
    from mezzotint.train.devices import DEVICES
    from mezzotint.train.plan import Setup, by_stage
    from mezzotint.train.plan import plan as planned

    if options.recipe not in (*RECIPES, *PRESETS):
        raise unknown("recipe", options.recipe, [*RECIPES, *PRESETS])
    if options.gpu not in DEVICES:
        raise unknown("gpu", options.gpu, DEVICES)
    if options.gpus < 1:
        raise UserError(f"--gpus must be at least 1, got {options.gpus}")
    if options.context < 1 or options.gpus % options.context:
        raise UserError(f"--context must divide --gpus ({options.gpus}), got {options.context}")
    config = RECIPES[options.recipe](options.size) if options.recipe in RECIPES else published(options.recipe)
    if options.method:
        methods = {kind: made for kind, made in Config.kinds.items() if issubclass(made, MethodConfig) and not isabstract(made)}
        if options.method not in methods:
            raise unknown("method", options.method, methods)
        config.method = methods[options.method]()
    config = _with_fields(config, rest, f"plan {options.recipe}")
    device = DEVICES[options.gpu]
    if options.price is not None:
        device = replace(device, price=options.price)
    setup = Setup(options.gpus, options.precision, options.checkpointing, options.lora, options.context, options.offload)
    result, changes = planned(config, setup, device), advice(config, setup, device)
    stages = by_stage(config, setup, device) if config.stages else []
    if options.json:
        tried = [{"change": c.words, **vars(c.plan)} for c in changes]
        print(json.dumps({**vars(result), "stages": [vars(stage) for stage in stages], "changes": tried}))
        return
    _print_result(vars(result))
    for number, stage in enumerate(stages):
        print(f"stages.{number}: {stage.steps} steps of {stage.step_s:.3g} s, {stage.days:.3g} days, {stage.peak_train_gb:.3g} GB")
    for change in changes:
        needs, time = change.plan, f"{change.plan.step_s / result.step_s:.2f} times the step"
        peak = max(needs.peak_train_gb, needs.peak_eval_gb, needs.peak_save_gb)
        print(f"{change.words}: {peak:.3g} GB at the most, {time}, {'fits' if needs.fits else 'does not fit'}")


def import_(options: ImportOptions) -> None:
    from mezzotint.exchange import INDEX, read_diffusers, read_single_file
    from mezzotint.pipeline import load
    from mezzotint.weights.files import opened

    if (options.source / INDEX).is_file():
        pipeline = read_diffusers(options.source)
    elif not options.source.exists():
        raise UserError(f"no model at {options.source}: it does not exist")
    elif options.source.is_dir():
        raise UserError(f"{options.source} is no diffusers folder: expected {INDEX} there")
    else:
        opened(options.source)  # a pickle is refused before anything is asked for
        if not options.base:
            raise UserError("a single file has no text encoders; say with --base which pipeline of the same family lends the rest")
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


def data(name: str) -> Callable[..., None]:
    """A verb of the data engine."""

    def verb(*arguments: Any) -> None:
        from mezzotint import curate

        with bars() as progress:
            getattr(curate, name)(*arguments, progress)

    return verb


def _dotted_data(data: dict[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for name, value in data.items():
        if isinstance(value, dict):
            yield from _dotted_data(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


VERBS: dict[str, tuple[Any, Callable[..., None]]] = {
    "speedrun": (SpeedrunOptions, speedrun),
    "lifecycle": (LifecycleOptions, lifecycle),
    "train": (TrainOptions, train),
    "sample": (SampleOptions, sample),
    "eval": (EvalOptions, evaluate),
    "runs": (RunsOptions, runs),
    "average": (AverageOptions, average),
    "models": (ModelsOptions, models),
    "plan": (PlanOptions, plan),
    "import": (ImportOptions, import_),
    "export": (ExportOptions, export),
    "data curate": (DataCurateOptions, data("curate")),
    "data ingest": (DataIngestOptions, data("ingest")),
    "data dedup": (DataDedupOptions, data("dedup")),
    "data caption": (DataCaptionOptions, data("caption")),
    "data cache": (DataCacheOptions, data("cache")),
    "data report": (DataReportOptions, data("report")),
    "data inspect": (DataInspectOptions, data("inspect")),
    "data snapshot": (DataSnapshotOptions, data("snapshot")),
}
OPEN = ("train", "plan", "data curate")  # verbs that take fields of a recipe beside their own options


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb. Returns the exit code: 0 done or stopped by a deadline, 1 a run that broke, 2 a user's mistake, 130 stopped by hand."""
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
    length = 2 if words[0] == "data" else 1
    name, arguments = " ".join(words[:length]), words[length:]
    if name not in VERBS:
        raise unknown("verb", name, VERBS)
    options, function = VERBS[name]
    if name in OPEN:
        parsed, rest = tyro.cli(options, args=arguments, prog=f"mezzotint {name}", return_unknown_args=True)
        return _run(lambda: function(parsed, rest))
    parsed = tyro.cli(options, args=arguments, prog=f"mezzotint {name}")
    return _run(lambda: function(parsed))


def _run(function: Callable[[], None]) -> int:
    from mezzotint.train.guard import BadStepError
    from mezzotint.train.parallel import leave, report
    from mezzotint.train.stop import Stopped

    try:
        function()
    except Stopped as error:
        leave()
        return _say(f"{error}; everything is saved, the same command goes on from there", 130 if error.by_hand else 0)
    except BadStepError as error:
        report(error)
        return _say(f"error: {error}", 1)
    except Exception as error:
        report(error)
        raise
    return 0


def _say(message: str, code: int) -> int:
    print(message, file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
