"""Every distillation and every tuning technique from one model, measured alike: quality against calls, cost and diversity.

    python -m mezzotint.lab.methods --teacher runs/speedrun-s/dpo --seeds 3

Each technique is its recipe, run by the Trainer with one seed after the other in `OUT/NAME/seed-K` and measured once; what is there is not
done again. Students: the suite "students" at 1, 2, 4 and 8 calls, from equal noise and with the same prompts for all, the teacher beside
them; where a recipe watches its student, the weights that it kept. Tuned models: the suite "worlds". `lab.table` draws what was measured.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import tyro
from rich.console import Console
from rich.progress import Progress

from mezzotint.data.pairs import PairsConfig
from mezzotint.errors import UserError, unknown
from mezzotint.evals import students, worlds
from mezzotint.lab import table
from mezzotint.pipeline import find_device, load
from mezzotint.recipes import RECIPES
from mezzotint.recipes.tiny import SizeName
from mezzotint.rewards.goal import GoalConfig
from mezzotint.rewards.model import LearnedConfig
from mezzotint.train.log import read
from mezzotint.train.stop import Stopped
from mezzotint.train.trainer import RunConfig, Trainer

PROMPTS: dict[SizeName, int] = {"xs": 1, "s": 50, "m": 100, "l": 100}  # per task of the suites
MEASURED = "measured.json"
CONSISTENT = ("consistency", "lcm", "lcm_lora", "consistency_training", "scm")
DISTILLERS = ("guidance_distill", "progressive", "reflow", "instaflow", "meanflow", *CONSISTENT, "dmd", "ladd", "add")
TUNERS = ("sft", "dpo", "dpo_online", "grpo", "flow_grpo", "dance_grpo", "grpo_fast", "mix_grpo", "grpo_learned", "refl")
FIRST = {"instaflow": "reflow", "grpo_learned": "reward", "refl": "reward"}  # what a technique starts from, or learns from


@dataclass
class Options:
    """Run what is missing of the experiments, and write table.md, table.json and plot.svg. Stopped, the same command goes on."""

    teacher: str = ""
    """The model that all students start from: a run, a pipeline or "starter"."""
    base: str = ""
    """The model that all tuned ones start from. The teacher and the base are one if one is given, and pre-trained here if none is."""
    seeds: int = 1
    """Runs of each technique."""
    only: str = ""
    """Techniques, as in lcm,dmd; all if not given."""
    size: Literal["xs", "s", "m", "l"] = "s"
    """The one dial of the recipes."""
    out: Path | None = None
    """Folder of the runs and the tables; runs/lab/methods-SIZE if not given."""
    list: bool = False
    """Say what there is and what is done, and stop."""


@dataclass(frozen=True)
class Lab:
    """The experiments of one folder, from one teacher and one base."""

    folder: Path
    size: SizeName
    teacher: str
    base: str

    def run_folder(self, name: str, seed: int) -> Path:
        """Where a technique is trained with a seed."""
        return self.folder / name / f"seed-{seed}"

    def config(self, name: str, seed: int) -> RunConfig:
        """A technique's recipe, as it is run here."""
        config, folder = RECIPES[f"tiny.{name}"](self.size), self.run_folder(name, seed)
        config.init = self.base if name in TUNERS else self.teacher
        first = str(self.run_folder(FIRST[name], seed)) if name in FIRST else ""
        config.init = first if name == "instaflow" else config.init
        config.train = config.train.replace(seed=seed)
        if isinstance(config.data, PairsConfig):
            config.data = config.data.replace(teacher=config.init, folder=str(folder / "pairs"))
        goal: GoalConfig | None = vars(config.method).get("goal")
        if goal is not None:
            reward = LearnedConfig(first) if isinstance(goal.reward, LearnedConfig) else goal.reward
            config.method = config.method.replace(goal=goal.replace(reward=reward, failures=str(folder / "failures")))
        return config

    def do(self, name: str, seed: int, progress: Progress) -> None:
        """Train and measure a technique with a seed, after what it needs, unless that was done. UserError for a run of other settings."""
        config, folder = self.config(name, seed), self.run_folder(name, seed)
        if (folder / MEASURED).is_file():
            if RunConfig.from_data(json.loads((folder / "config.json").read_text())) != config:
                raise UserError(f"{folder} holds a run with other settings; choose another folder with --out, or remove it")
            return
        if name in FIRST:
            self.do(FIRST[name], seed, progress)
        Trainer(config, folder, progress=progress).run()
        found = self._student(folder, config) if name in DISTILLERS else self._tuned(folder / "export") if name in TUNERS else {}
        log = [line for line in read(folder / "metrics.jsonl") if "images" in line]
        _write(folder / MEASURED, {**found, "seconds": log[-1]["seconds"], "samples": log[-1]["images"]})

    def found(self, name: str, seed: int) -> dict[str, Any] | None:
        """What was measured, with the cost of what the technique needs; None if it has not been."""
        path = self.run_folder(name, seed) / MEASURED
        if not path.is_file():
            return None
        own: dict[str, Any] = json.loads(path.read_text())
        before = (self.found(FIRST[name], seed) if name in FIRST else None) or {"seconds": 0.0, "samples": 0}
        return own | {key: own[key] + before[key] for key in ("seconds", "samples")}

    def origins(self, distilled: bool, tuned: bool) -> dict[str, Any]:
        """What was measured of the teacher where something was distilled and of the base where something was tuned; now, if not before."""
        path = self.folder / "origins.json"
        known: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
        if known.setdefault("models", [self.teacher, self.base]) != [self.teacher, self.base]:
            raise UserError(f"{self.folder} holds experiments from {known['models']}; choose another folder with --out, or remove it")
        if distilled and "teacher" not in known:
            teacher, settings = load(self.teacher).to(find_device()), self.beside.sampling
            few = settings.replace(solver=self.beside.protocol.solver)
            calls = {str(n): self.beside.measures(teacher, few.replace(steps=n)) for n in self.beside.protocol.calls}
            known["teacher"] = {"own": self.beside.found, "calls": calls, "sampling": settings.to_data()}
        if tuned and "base" not in known:
            known["base"] = self._tuned(Path(self.base))
        _write(path, known)
        return known

    @cached_property
    def beside(self) -> students.Beside:
        """The teacher's pictures."""
        teacher = load(self.teacher).to(find_device())
        return students.Beside(teacher, students.Protocol(PROMPTS[self.size]), RECIPES["tiny.worlds"](self.size).pipeline.sampling.size)

    def _student(self, folder: Path, config: RunConfig) -> dict[str, Any]:
        """A student at every number of calls: the weights that its run kept as the best of its watch, where it had one."""
        kept = "export-best" if config.evaluation.suite else "export"
        student = load(folder / kept).to(find_device())
        own = student.config.sampling
        calls = {str(n): self.beside.measures(student, own.replace(steps=n)) for n in self.beside.protocol.calls}
        return {"weights": kept, "sampling": own.to_data(), "calls": calls}

    def _tuned(self, folder: Path) -> dict[str, Any]:
        return worlds.evaluate(load(folder).to(find_device()), worlds.Protocol(PROMPTS[self.size]))


def _write(path: Path, data: dict[str, Any]) -> None:
    part = path.with_suffix(".part")
    part.write_text(json.dumps(data, indent=2) + "\n")
    part.replace(path)


def chosen(only: str) -> list[str]:
    """Techniques by their names, in the order of the tables. UserError for one that is not there."""
    known = DISTILLERS + TUNERS
    names = [name.strip() for name in only.split(",") if name.strip()] or known
    for name in names:
        if name not in known:
            raise unknown("technique", name, known)
    return [name for name in known if name in names]


def run(options: Options, progress: Progress) -> Lab:
    """Do what is missing, and draw the tables of all that is there."""
    if options.seeds < 1:
        raise UserError(f"--seeds must be at least 1, got {options.seeds}")
    names, folder = chosen(options.only), options.out or Path(f"runs/lab/methods-{options.size}")
    given = options.teacher or options.base or str(folder / "base")
    lab = Lab(folder, options.size, options.teacher or given, options.base or given)
    if options.list:
        return lab
    if given == str(folder / "base") and not (folder / "base" / "export").is_dir():
        Trainer(RECIPES["tiny.worlds"](options.size), folder / "base", progress=progress).run()
    folder.mkdir(parents=True, exist_ok=True)
    lab.origins(distilled=False, tuned=False)  # or an error, before anything is trained
    for seed in range(options.seeds):  # a first whole table before the second seed of any technique
        for name in names:
            lab.do(name, seed, progress)
            found = gathered(lab)
            table.write(folder, lab.origins(bool(found["students"]), bool(found["tuned"])), found)
    return lab


def gathered(lab: Lab) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """What was measured of all techniques in a folder, one entry for each seed: of "students" and of "tuned"."""
    groups: dict[str, dict[str, list[dict[str, Any]]]] = {"students": {}, "tuned": {}}
    for name in DISTILLERS + TUNERS:
        seeds = sorted(int(path.name.removeprefix("seed-")) for path in (lab.folder / name).glob("seed-*"))
        if runs := [found for seed in seeds if (found := lab.found(name, seed)) is not None]:
            groups["students" if name in DISTILLERS else "tuned"][name] = runs
    return groups


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command. Returns the exit code, as `mezzotint.cli` has them."""
    options = tyro.cli(Options, args=arguments, prog="python -m mezzotint.lab.methods")
    try:
        with Progress(console=Console(stderr=True)) as progress:
            lab = run(options, progress)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (Stopped, KeyboardInterrupt):
        print("stopped; the same command goes on from there", file=sys.stderr)
        return 130
    if options.list:
        done = {name: len(found) for group in gathered(lab).values() for name, found in group.items()}
        for name in chosen(options.only):
            print(f"{name:24} {'distils' if name in DISTILLERS else 'tunes':8} {done.get(name, 0)} seeds done")
        return 0
    print((lab.folder / table.TABLE).read_text())
    return 0


if __name__ == "__main__":
    sys.exit(main())
