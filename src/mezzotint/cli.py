"""The command line, verb by verb. Whatever is slow to import is imported by the verb that needs it."""

import json
import os
import shlex
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from inspect import isabstract
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mezzotint import words
from mezzotint.bars import bars, first_of_ranks, shown
from mezzotint.errors import Ending, UserError, is_memory, unknown
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
from mezzotint.places import CONFIG_FILE, check_out, folder_of

if TYPE_CHECKING:
    from mezzotint.pipeline import Sampling
    from mezzotint.train.runs import Found


USAGE = """usage: mezzotint VERB ...

The whole life of an image model in one code base.

  speedrun   pre-train, fine-tune, align, distil and evaluate a model; ends in a report
  lifecycle  the same with a reward model, tuning by it, a 4-step student and a subject
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
    if options.init:
        folder_of(options.init)

    from mezzotint.data.batch import Stored
    from mezzotint.data.folder import Folder, FolderConfig
    from mezzotint.data.mixture import MixtureConfig, found
    from mezzotint.data.rows import TableConfig
    from mezzotint.data.survey import write_bad
    from mezzotint.evals import images
    from mezzotint.pipeline import described
    from mezzotint.recipes import RECIPES
    from mezzotint.recipes.other import on_own, started
    from mezzotint.train.parallel import leave
    from mezzotint.train.trainer import Trainer

    if options.recipe not in RECIPES:
        raise unknown("recipe", options.recipe, RECIPES)
    config = RECIPES[options.recipe](options.size)
    if options.init:
        config = replace(started(config, described(options.init), options.size), init=options.init)
    if options.data:
        config = on_own(config, found(options.data, config.data.size))
    if options.fields:
        print("\n".join(f"{name} = {value!r}" for name, value in words.run_fields(config)))
        return
    config = words.with_run_fields(config, rest, f"train {options.recipe}")
    if isinstance(config.data, FolderConfig) and not config.data.path:
        raise UserError(f"{options.recipe} trains on pictures of your own: --data DIR")
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
        try:
            _print_result(images.evaluate(pipeline, source))
        except UserError as error:
            print(f"note: not measured: {error}", file=sys.stderr)


def sample(options: SampleOptions) -> None:
    folder_of(options.model)  # or an error, before anything that takes time

    import torch

    from mezzotint.pictures import save
    from mezzotint.pipeline import find_device, load

    device = find_device(options.device)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    if options.enhance:
        options = replace(options, prompt=_enhanced(options))
    pipeline = load(options.model, None if options.dtype == "stored" else getattr(torch, options.dtype)).to(device)
    named = {"steps": options.steps, "guidance": options.guidance, "size": options.size, "solver": options.solver}
    changes = {name: value for name, value in named.items() if value is not None}
    settings = pipeline.config.sampling.replace(**changes)
    with bars() as progress:
        show = shown(progress, "sampling")
        images = pipeline(options.prompt, options.n, seed=options.seed, negative=options.negative, settings=settings, progress=show)
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


def _parameters(options: SampleOptions, settings: "Sampling", seed: int) -> str:
    """The text that the ecosystem's tools read from a PNG: what made this picture."""
    negative = f"\nNegative prompt: {options.negative}" if options.negative else ""
    height, width = settings.shape
    return (
        f"{options.prompt}{negative}\nSteps: {settings.steps}, Sampler: {settings.solver}, CFG scale: {settings.guidance}, "
        f"Seed: {seed}, Size: {width}x{height}, Model: {options.model}"
    )


def evaluate(options: EvalOptions) -> None:
    if options.suite not in ("pairs", "rewards", "enhance"):
        folder_of(options.model)
    if options.suite == "students":
        folder_of(options.teacher)
    if options.suite == "images" and options.data is None:
        raise UserError("the suite images needs a folder of images: --data DIR")

    from mezzotint.evals import images, students, subject, worlds
    from mezzotint.pipeline import find_device, load

    if options.suite in ("pairs", "rewards", "enhance"):
        _show_result(_without_pictures(options), options.json)
        return
    device = find_device(options.device)
    pipeline = load(options.model).to(device)
    with bars() as progress:
        show = shown(progress, "evaluation")
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
    named = {str(path.resolve()): name for name, (path, _) in paths.items()}
    wanted = [named.get(str(Path(name).resolve()), name) for name in options.compare]
    for name in wanted:
        if name not in paths:
            raise unknown("run", name, paths)
    chosen = {name: paths[name] for name in wanted or paths}
    differences = compare([path for path, _ in chosen.values()]) if wanted else {}
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
    from mezzotint.models import lora
    from mezzotint.pipeline import load_weights
    from mezzotint.recipes import RECIPES  # noqa: F401  # every kind of configuration is known
    from mezzotint.train.average import FOLDER, reconstruct
    from mezzotint.train.trainer import RunConfig, made
    from mezzotint.weights.files import read_json

    if not (options.run / "config.json").is_file():
        raise UserError(f"no run at {options.run}: expected config.json there")
    folder = options.run / FOLDER / "student"
    tensors, distance = reconstruct(folder, options.length, options.step)
    config = RunConfig.from_data(read_json(options.run / "config.json"))
    pipeline = made(config).student
    load_weights(pipeline, pipeline.state_dict() | tensors, folder)
    if config.adapter.rank:
        lora.merge(pipeline.denoiser)
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

    table = Table("name", "network", "weights", "TFLOP", "px", "text", "published by", box=None, pad_edge=False, padding=(0, 1, 0, 0))
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
    if options.gpus % options.context:
        raise UserError(f"--context must divide --gpus ({options.gpus}), got {options.context}")
    config = RECIPES[options.recipe](options.size) if options.recipe in RECIPES else published(options.recipe)
    if options.method:
        methods = {kind: made for kind, made in Config.kinds.items() if issubclass(made, MethodConfig) and not isabstract(made)}
        if options.method not in methods:
            raise unknown("method", options.method, methods)
        config.method = methods[options.method]()
    config = words.with_run_fields(config, rest, f"plan {options.recipe}")
    device = DEVICES[options.gpu]
    if options.price is not None:
        device = replace(device, price=options.price)
    rank = options.lora or config.adapter.rank
    setup = Setup(options.gpus, options.precision, options.checkpointing, rank, options.context, options.offload)
    with bars(passing=True) as progress:
        show = shown(progress, "planning")
        show(0, 2)
        result = planned(config, setup, device)
        show(1, 2)
        changes = advice(config, setup, device)
        show(2, 2)
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
    if not options.source.exists():
        raise UserError(f"no model at {options.source}: it does not exist")
    check_out(options.out / CONFIG_FILE)
    if options.base:
        folder_of(options.base)

    from mezzotint.exchange import INDEX, read_diffusers, read_single_file
    from mezzotint.pipeline import load
    from mezzotint.weights.files import opened

    if (options.source / INDEX).is_file():
        pipeline = read_diffusers(options.source)
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
    folder_of(options.model)

    from mezzotint.exchange import write_diffusers, write_single_file
    from mezzotint.pipeline import load

    write = write_diffusers if options.to == "diffusers" else write_single_file
    write(load(options.model, dtype=None), options.out)
    print(options.out)


def _print_result(result: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("measure", "value", box=None)
    for name, value in _dotted_data(result):
        if not name.startswith("protocol."):
            table.add_row(name, _value(value))
    Console().print(table)
    if protocol := result.get("protocol"):
        print("protocol:", ", ".join(f"{name} {value}" for name, value in _dotted_data(protocol)))


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}" if isinstance(value, float) else str(value)


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
LASTING = (*(f"data {name}" for name in ("curate", "ingest", "dedup", "caption", "cache")), "speedrun", "lifecycle", "train")  # that go on


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb. Returns the exit code: 0 done or stopped by a deadline, 1 a run that broke, 2 a user's mistake, 130 stopped by hand."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    length = 2 if given[:1] == ["data"] else 1  # the verbs of the data engine are two words
    if given[length - 1 : length] in ([], ["-h"], ["--help"]):
        print(USAGE, end="")
        return 0
    name = " ".join(given[:length])
    try:
        _verb(name, given[length:])
    except Ending as end:
        return _say(end.told, end.code)
    except KeyboardInterrupt:
        return _say("stopped; the same command goes on from where it last saved" if name in LASTING else "stopped", 130)
    except OSError as error:
        return _say(f"error: {error.filename or 'the system'}: {error.strerror or error}", 2)
    return 0


def _verb(name: str, arguments: list[str]) -> None:
    if name == "--version":
        from mezzotint import __version__

        print(f"mezzotint {__version__}")
        return
    if name not in VERBS:
        raise unknown("verb", name, VERBS)
    kind, function = VERBS[name]
    options, rest = words.options(kind, arguments, name, name in OPEN)
    if getattr(options, "out", None):
        check_out(options.out)
    try:
        with _notes():
            function(options, *([rest] if name in OPEN else []))
    except Exception as error:
        if os.environ.get("TORCHELASTIC_ERROR_FILE"):  # torchrun asks which rank was the first to fail
            from mezzotint.train.parallel import report

            report(error)
        if is_memory(error):
            raise UserError(f"this needs more memory than there is: {str(error).splitlines()[0]}; ask for less at once") from error
        raise


@contextmanager
def _notes() -> Iterator[None]:
    """Warnings in one line, without the place in the code that they come from."""
    before = warnings.formatwarning
    warnings.formatwarning = lambda message, *_, **__: f"note: {message}\n"
    try:
        yield
    finally:
        warnings.formatwarning = before


def _say(message: str, code: int) -> int:
    print(message, file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
