"""The verbs of `mezzotint data`: what the data engine does, from the command line."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mezzotint.bars import Show, shown
from mezzotint.codecs import Identity
from mezzotint.curation import caption as captions
from mezzotint.curation import dedup as duplicates
from mezzotint.curation import look
from mezzotint.curation.cache import LatentsConfig, StatesConfig
from mezzotint.curation.caption_faults import CaptionFaults
from mezzotint.curation.cuts import Curation, funnel
from mezzotint.curation.cuts import curate as run_recipe
from mezzotint.curation.endpoint import Endpoint
from mezzotint.curation.stage import done, run
from mezzotint.data.ingest import ingest as read_source
from mezzotint.data.table import Table, is_table
from mezzotint.errors import UserError, unknown
from mezzotint.pipeline import load
from mezzotint.recipes import curation as recipes
from mezzotint.words import with_fields

if TYPE_CHECKING:
    from rich.progress import Progress

    from mezzotint.options import (
        DataCacheOptions,
        DataCaptionOptions,
        DataCurateOptions,
        DataDedupOptions,
        DataIngestOptions,
        DataInspectOptions,
        DataReportOptions,
        DataSnapshotOptions,
    )

RECIPES: dict[str, Callable[[], Curation]] = {"photos": recipes.photos, "pixels": recipes.pixels, "clips": recipes.clips}


def curate(options: "DataCurateOptions", rest: Sequence[str], progress: "Progress") -> None:
    """Ingest, measure, find duplicates, judge, draw the report."""
    recipe = _recipe(options.recipe, rest)
    if is_table(options.source):
        table = Table.open(options.source)
    elif options.out is None:
        raise UserError(f"{options.source!r} is no table; say where to make one of it with --out NAME.lance")
    else:
        table = _ingested(options.source, options.out, progress)
    for lacking in recipe.skipped():
        progress.console.print(f"left out: {lacking}", soft_wrap=True)
    bars = _Bars(progress)
    with table.locked():
        table = run_recipe(table, recipe, options.engine, options.workers, bars.named)
    for reason, count in funnel(table).items():
        if count:
            print(f"{reason:16} {count:>9,}")
    _draw(table, options.report, 0)
    rows = table.read(["verdict", "media"]).to_pylist()
    left = {row["media"] for row in rows if not row["verdict"]}
    if "image" in left:  # no model learns clips yet
        print(f"train: mezzotint train tiny.images --data {table.path}")
    elif not left:
        print(f"nothing is left to train on; take another --recipe than {options.recipe}, or other thresholds, which measure nothing again")


def ingest(options: "DataIngestOptions", progress: "Progress") -> None:
    """A source into a table."""
    table = _ingested(options.source, options.out, progress)
    print(f"table: {table.path}, version {table.version}, {len(table):,} rows")


def dedup(options: "DataDedupOptions", progress: "Progress") -> None:
    """Duplicates within a table, or rows that another has too."""
    table, bars, what = Table.open(options.table), _Bars(progress), duplicates.Duplicates()
    with table.locked():
        if options.against is None:
            table = duplicates.dedup(table, what, options.engine, options.workers, bars("duplicates"))
            column, words = "duplicate_of", "duplicates"
        else:
            other = Table.open(options.against)
            with other.locked():
                table = duplicates.contamination(table, other, what, options.engine, options.workers, bars("comparing"))
            column, words = "contaminates", f"rows that {options.against} has too"
    found = len(table) - table.read([column])[column].null_count
    print(f"{found:,} {words} of {len(table):,}; column {column!r} says which")


def caption(options: "DataCaptionOptions", progress: "Progress") -> None:
    """Captions for all rows, after saying what they cost."""
    table = Table.open(options.table)
    by: captions.Captioner = captions.Network(path=options.captioner)
    if "://" in options.captioner:
        by = Endpoint(url=options.captioner, model=options.model, input_price=options.input_price, output_price=options.output_price)
    cost = captions.estimate(table, by)
    print(f"{cost.rows:,} pictures, at most {cost.tokens_in:,} tokens read and {cost.tokens_out:,} written: ${cost.price:,.2f}")
    if cost.price and not options.yes:
        raise UserError("captions from this endpoint cost money; give the same command with --yes to start")
    bars = _Bars(progress)
    with table.locked():
        table = captions.caption(table, by, options.engine, options.workers, bars("captions"))
        for column in ("captions", "captions_short", "captions_long"):
            table = run(table, CaptionFaults(column), options.engine, options.workers, bars(f"checks of {column}"))
    print(f"table: {table.path}, version {table.version}")


def cache(options: "DataCacheOptions", progress: "Progress") -> None:
    """Latents and states for all rows, and how to train on them."""
    table, bars, words = Table.open(options.table), _Bars(progress), list[str]()
    pipeline = load(options.pipeline)
    size = options.size or pipeline.config.sampling.side
    stages: dict[str, LatentsConfig | StatesConfig] = {
        "latents": LatentsConfig(options.pipeline, size, options.multiple, dtype=options.dtype, device=options.device),
        "states": StatesConfig(options.pipeline, options.captions, dtype=options.dtype, device=options.device),
    }
    if isinstance(pipeline.codec, Identity) and "latents" in options.what:
        stages.pop("latents")
        print(f"latents: left out, since {options.pipeline} draws pixels: its latents are the pictures")
    with table.locked():
        for name in filter(options.what.__contains__, stages):
            there, ready = name in table.columns, done(table, stages[name])
            table = run(table, stages[name], options.engine, options.workers, bars(name))
            told = "there already" if ready else "made again, since they were not of these weights, settings and rows" if there else "made"
            having = len(table) - table.dataset.count_rows(filter=f"{name} IS NULL")
            print(f"{name}: {told}; {having:,} of {len(table):,} rows have them")
            words.append(f"--data.{name} {name}")
    if words:
        words += [f"--data.multiple {options.multiple}"] * bool(options.multiple)
        words += [f"--data.captions {' 1 '.join(options.captions)} 1"] * (options.captions != ("captions",))
        print(f"train: mezzotint train RECIPE --init {options.pipeline} --data {table.path} --data.size {size} {' '.join(words)}")
    if "states" in options.what:
        print("a run that trains its text encoder refuses states; one of an adapter does not (--adapter.rank 8)")


def report(options: "DataReportOptions", progress: "Progress") -> None:
    """The page on which a person looks at the data."""
    _draw(Table.open(options.table), options.out, options.seed)


def inspect(options: "DataInspectOptions", progress: "Progress") -> None:
    """One row."""
    version = int(options.version) if options.version.isdigit() else options.version or None
    found = look.inspect(Table.open(options.table, version), options.row)
    if options.json:
        print(json.dumps(found))
        return
    for name, value in found.items():
        print(f"{name:20} {value}")


def snapshot(options: "DataSnapshotOptions", progress: "Progress") -> None:
    """A name for the newest version."""
    table = Table.open(options.table)
    table.snapshot(options.name)
    print(f"{options.name}: version {table.version} of {table.path}")


def _recipe(name: str, words: Sequence[str]) -> Curation:
    if name not in RECIPES:
        raise unknown("recipe", name, RECIPES)
    return with_fields(RECIPES[name](), words, f"data curate --recipe {name}")


def _ingested(source: str, out: Path, progress: "Progress") -> Table:
    bars, counted = _Bars(progress), dict[str, int]()

    def show(what: str, count: int) -> None:
        counted[what] = count
        bars.named(what, count, None)

    table, told = read_source(source, out, progress=show)
    for what, count in counted.items():  # how many there are is known in the end
        bars.named(what, count, count)
    progress.console.print(str(told), soft_wrap=True)
    return table


def _draw(table: Table, out: Path | None, seed: int) -> None:
    page = out or table.path.with_suffix(".html")
    page.write_text(look.render(table, seed=seed), encoding="utf-8")
    print(f"report: {page}")


class _Bars:
    """A bar for each part of the work, which appears when it begins."""

    def __init__(self, progress: "Progress") -> None:
        self.progress, self.parts = progress, dict[str, Show]()

    def __call__(self, name: str) -> Show:
        return self.parts.setdefault(name, shown(self.progress, name))

    def named(self, name: str, done: int, total: int | None) -> None:
        """So much of a part is done."""
        self(name)(done, total)
