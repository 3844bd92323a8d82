"""Any number of ranks trains the same model, and goes on where any other number stopped."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules

import pytest
import torch
from safetensors.torch import load_file
from techniques import LOSSES, METHODS, PAIRED, VISION, of_method, quiet
from together import Job, together

from mezzotint import methods
from mezzotint.config import Config
from mezzotint.methods.denoise import DenoiseConfig
from mezzotint.methods.method import MethodConfig
from mezzotint.models import ClassDiTConfig, DenoiserConfig, FluxConfig, MMDiTConfig, UNetConfig
from mezzotint.models.lora import LoRAConfig
from mezzotint.text.blank import BlankConfig
from mezzotint.train import checkpoint
from mezzotint.train.log import read
from mezzotint.train.parallel import ParallelConfig
from mezzotint.train.stages import StageConfig
from mezzotint.train.trainer import RunConfig

Make = Callable[..., RunConfig]
NETWORKS: dict[str, DenoiserConfig] = {
    "unet": UNetConfig(widths=(8, 16), depths=(0, 1), heads=(1, 2), groups=4, channels=3, text_width=32, pooled_width=32, layers=1),
    "flux": FluxConfig(width=32, joint=1, single=1, heads=2, axes=(4, 6, 6), patch=8, channels=3, text_width=32, pooled_width=32),
}
GROUPS = ParallelConfig(shard=2)
# 25 tokens of a picture, which no two ranks share evenly; texts are of any length.
SPREAD: dict[str, DenoiserConfig] = {
    "class_dit": ClassDiTConfig(width=32, depth=2, heads=4, patch=8, channels=3, classes=2, span=4.0, prediction="velocity"),
    "mmdit": MMDiTConfig(width=32, depth=2, heads=4, patch=8, channels=3, text_width=32, pooled_width=32, table=8, base=8, dual=1),
    "wide": FluxConfig(width=32, joint=2, single=2, heads=4, axes=(2, 2, 4), patch=8, channels=3, text_width=32, pooled_width=32),
}
TOGETHER = {
    "class_dit-4": ParallelConfig(context=4),
    "wide-4": ParallelConfig(context=2, shard=2),
    "mmdit-2": ParallelConfig(context=2, checkpoint="full"),
    "dpo-shared": ParallelConfig(context=2, offload=True),
}


def losses(folder: Path, name: str = "loss") -> list[float]:
    return [line[name] for line in read(folder / "metrics.jsonl") if name in line]


def export(folder: Path) -> torch.Tensor:
    """All exported weights, one after the other."""
    return torch.cat([tensor.flatten() for _, tensor in sorted(load_file(folder / "export" / "model.safetensors").items())])


def spread(config: RunConfig, denoiser: DenoiserConfig) -> RunConfig:
    """Pictures of 40 pixels for a network, and two micro-batches."""
    pipeline = config.pipeline.replace(denoiser=denoiser, sampling=config.pipeline.sampling.replace(size=40))
    if isinstance(denoiser, ClassDiTConfig):
        pipeline = pipeline.replace(text=BlankConfig(length=1, width=32))
    return replace(config, pipeline=pipeline, data=config.data.replace(size=40), train=config.train.replace(accumulate=2))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def ran(root: Path, run_config_once: Make) -> Path:
    """All runs of this file, with one, two and four ranks, in one start of each."""
    even, stopping = quiet(run_config_once(steps=3)), quiet(run_config_once(steps=6), "muon")
    half = replace(even, parallel=ParallelConfig(precision="bfloat16"))
    coded = quiet(run_config_once(steps=6), "adamw8")
    coded.train.accumulate = 2
    long = quiet(run_config_once(steps=50))
    long.train.accumulate = 2
    VISION.weights = str(root / "own")
    run_config_once().pipeline.build().save(root / "own")
    runs = {name: of_method(run_config_once(method, pairs=name in PAIRED, steps=2)) for name, method in METHODS.items()}
    first = {"data.size": 16, "pipeline.sampling.size": 16, "method.mask": 0.5, "train.accumulate": 2}
    runs |= {"long": long, "coded": coded, "even": even, "half": half, "staged": even.replace(stages=(StageConfig(1, first),))}
    runs["adapter"] = replace(runs["dpo"], adapter=LoRAConfig(rank=2))
    for name, denoiser in NETWORKS.items():
        runs[name] = quiet(run_config_once(steps=2))
        runs[name].pipeline.denoiser = denoiser
        runs[name].parallel = ParallelConfig(checkpoint="full" if name == "flux" else "selective")

    steady = quiet(run_config_once(steps=5))
    steady.train.checkpoint = 2
    apart = {name: spread(quiet(run_config_once(steps=3)), denoiser) for name, denoiser in SPREAD.items()}
    shared = {**apart, "dpo": runs["dpo"]}
    own = {name: Job(root / name, replace(shared[name.split("-")[0]], parallel=parallel)) for name, parallel in TOGETHER.items()}

    def jobs(world: int) -> list[Job]:
        shared = [Job(root / f"{name}-{world}", config, "coupled" if name == "reflow" else "worlds") for name, config in runs.items()]
        return [*shared, Job(root / f"uneven-{world}", quiet(run_config_once(steps=2), "muon"), "uneven")]

    together(1, [Job(root / f"{name}-alone", config) for name, config in apart.items()])
    together(1, [*jobs(1), Job(root / "stopped-1", stopping), Job(root / "stopped-1-2", stopping, "interrupted")])
    assert not (root / "stopped-1-2" / "export").exists()
    ends = [Job(root / "stopped-2", stopping, "interrupted"), Job(root / "poisoned", even, "poisoned"), Job(root / "whole", steady)]
    ends.append(Job(root / "coded-2-1", coded, "interrupted"))
    died = Job(root / "died", steady, killed="in-checkpoint")
    assert together(2, [*jobs(2), Job(root / "stopped-1-2", stopping), *ends, died]) == [-9, -9]
    assert [path.name for path in checkpoint.steps(root / "died" / "checkpoints")] == ["step-00000002"]
    assert len(list((root / "died" / "checkpoints").glob(".step-00000004.part/*.dying"))) == 2
    two = [own["mmdit-2"], own["dpo-shared"], Job(root / "killed", even, killed="in-step")]
    assert together(2, [Job(root / "died", steady), *two]) == [1, -9]
    shutil.copytree(root / "stopped-2", root / "stopped-2-1")
    shutil.copytree(root / "stopped-2", root / "stopped-2-4")
    shutil.copytree(root / "stopped-2", root / "damaged")
    (damaged,) = checkpoint.steps(root / "damaged" / "checkpoints")
    harmed = damaged / "student.00002-of-00002.safetensors"
    harmed.write_bytes(harmed.read_bytes()[:-1] + b"!")
    together(1, [Job(root / "stopped-2-1", stopping), Job(root / "coded-2-1", coded)])
    four = [own["class_dit-4"], own["wide-4"], Job(root / "damaged", stopping)]
    four += [Job(root / name, replace(config, parallel=GROUPS)) for name, config in (("even-4", even), ("stopped-2-4", stopping))]
    assert together(4, [*four, Job(root / "deadly", even, "deadly")]) == [0, -9, 0, 0]
    return root


@pytest.mark.parametrize(
    ("name", "world", "steps", "error"),
    [
        ("long", 2, 50, 1e-5),
        ("even", 2, 3, 1e-5),
        ("even", 4, 3, 1e-5),
        ("uneven", 2, 2, 1e-5),
        ("half", 2, 3, 1e-3),
        ("staged", 2, 3, 1e-5),
        ("coded", 2, 6, 1e-5),
        ("adapter", 2, 2, 1e-5),
    ]
    # Within a group of pictures the policy's losses cancel.
    + [(name, 2, 2, 1e-4 if name == "flow_grpo" else 1e-5) for name in (*METHODS, *NETWORKS)],
)
def test_the_losses_do_not_depend_on_the_number_of_ranks(name: str, world: int, steps: int, error: float, ran: Path) -> None:
    alone, shared = (losses(ran / f"{name}-{ranks}", LOSSES.get(name, "loss")) for ranks in (1, world))
    assert len(alone) == steps
    assert shared == pytest.approx(alone, rel=error, abs=1e-7)
    if name != "half":
        assert torch.allclose(export(ran / f"{name}-1"), export(ran / f"{name}-{world}"), atol=2e-4)


def test_two_ranks_stop_together_and_others_go_on(ran: Path) -> None:
    assert [(ran / "stopped-2" / f"end-{rank}").read_text() for rank in (0, 1)] == ["Stopped: stopped at step 3"] * 2
    (stopped,) = checkpoint.steps(ran / "stopped-2" / "checkpoints")
    assert len(list(stopped.glob("student.0*-of-00002.safetensors"))) == 2
    whole = losses(ran / "stopped-1")
    for name in ("stopped-2-1", "stopped-2-4", "stopped-1-2"):
        assert losses(ran / name) == pytest.approx(whole, rel=1e-5)
        assert torch.allclose(export(ran / name), export(ran / "stopped-1"), atol=2e-4)


def test_states_in_8_bits_go_on_with_another_number_of_ranks(ran: Path) -> None:
    assert (ran / "coded-2-1" / "end-0").read_text() == "Stopped: stopped at step 5"
    assert losses(ran / "coded-2-1") == pytest.approx(losses(ran / "coded-1"), rel=1e-5)
    alone, shared = (checkpoint.Checkpoint(checkpoint.steps(ran / f"coded-{n}" / "checkpoints")[-1]) for n in (1, 2))
    group = "student.optimizer"
    assert shared.types == alone.types
    assert set(shared.types[group].values()) == {torch.int8, torch.uint8, torch.float32}
    named = {name: shape for name, shape in alone.shapes[group].items() if alone.types[group][name] == torch.int8}
    one, other = ({name: torch.zeros(shape, dtype=torch.int8) for name, shape in named.items()} for _ in range(2))
    alone.fill({group: one})
    shared.fill({group: other})
    assert any(codes.any() for codes in one.values())
    assert all((one[name].int() - other[name].int()).abs().max() <= 1 for name in one), "sums in another order may round to the next code"


def test_damage_that_one_rank_finds_ends_all_of_them(ran: Path) -> None:
    ends = [(ran / "damaged" / f"end-{rank}").read_text() for rank in range(4)]
    assert sum("student.00002-of-00002.safetensors is not what was written" in end for end in ends) == 1
    assert sum("step-00000003 is damaged, as another rank says" in end for end in ends) == 3


def test_no_method_is_left_out() -> None:
    for module in iter_modules(methods.__path__):
        import_module(f"{methods.__name__}.{module.name}")
    kinds = {made for made in Config.kinds.values() if issubclass(made, MethodConfig) and made.__module__.startswith(methods.__name__)}
    covered = {kind for method in METHODS.values() for kind in type(method).__mro__} | {DenoiseConfig}  # in all other runs
    assert kinds - covered == set()


@pytest.mark.parametrize("world", [2, 4])
def test_what_ranks_saved_is_what_one_saves(world: int, ran: Path) -> None:
    """All weights, averages and states; four ranks are two replicas of two shares."""
    alone, shared = (checkpoint.Checkpoint(checkpoint.steps(ran / f"even-{n}" / "checkpoints")[-1]) for n in (1, world))
    assert shared.shapes == alone.shapes
    assert len(shared.state["files"]) == 3 * world
    one, other = ({g: {n: torch.zeros(shape) for n, shape in named.items()} for g, named in alone.shapes.items()} for _ in range(2))
    alone.fill(one)
    shared.fill(other)
    assert all(torch.allclose(one[group][name], other[group][name], atol=2e-4) for group in one for name in one[group])


def test_the_rank_with_the_bad_sample_names_it(ran: Path) -> None:
    clean, bad = ((ran / "poisoned" / f"end-{rank}").read_text() for rank in (0, 1))
    assert clean == "NonFiniteError: the loss is not finite at step 1, for samples of another rank"
    assert "the loss is not finite at step 1: first in the output of student.denoiser.embed_patch; samples" in bad
    assert "train-5-0 (" in bad


def test_when_a_rank_dies_the_others_stop_and_say_so(ran: Path) -> None:
    for rank in (0, 2, 3):
        assert f"UserError: rank {rank} lost rank 1, whose process was killed" in (ran / "deadly" / f"end-{rank}").read_text()


def test_a_rank_that_is_killed_in_a_step_ends_the_others_within_a_minute(ran: Path) -> None:
    end = ran / "killed" / "end-0"
    assert end.read_text().startswith("UserError: rank 0 lost rank 1, whose process was killed")
    assert end.stat().st_mtime - (ran / "killed" / "killed").stat().st_mtime < 60


def test_ranks_that_were_killed_while_writing_go_on_from_the_last_whole_checkpoint(ran: Path) -> None:
    """To the same bits as if they had not been."""
    assert losses(ran / "died") == losses(ran / "whole")
    assert torch.equal(export(ran / "died"), export(ran / "whole"))


@pytest.mark.parametrize("name", TOGETHER)
def test_ranks_that_share_a_sample_train_as_one_does(name: str, ran: Path) -> None:
    """The norm shows what the losses hide: that gradients are of the right size, wherever their weights stand."""
    kind = name.split("-")[0]
    alone = ran / ("dpo-1" if kind == "dpo" else f"{kind}-alone")
    assert len(losses(ran / name)) == (2 if kind == "dpo" else 3)
    assert losses(ran / name) == pytest.approx(losses(alone), rel=1e-5)
    assert losses(ran / name, "grad_norm") == pytest.approx(losses(alone, "grad_norm"), rel=1e-5)
    assert torch.allclose(export(ran / name), export(alone), atol=2e-4)


def test_micro_batches_that_cannot_be_shared_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from mezzotint.errors import UserError
    from mezzotint.train.parallel import Ranks

    ranks = Ranks(ParallelConfig())
    assert [list(ranks.share(4))] == [[0, 1, 2, 3]]
    monkeypatch.setattr(ranks, "world", 3)
    with pytest.raises(UserError, match=r"3 ranks cannot share the 4 micro-batches .* --train.accumulate to a multiple of 3"):
        ranks.share(4)
    ranks.config.context = 3
    assert list(ranks.share(4)) == [0, 1, 2, 3]
    monkeypatch.setattr(ranks, "world", 9)
    with pytest.raises(UserError, match=r"3 groups of 3 ranks cannot share the 4 micro-batches .* --train.accumulate to a multiple of 3"):
        ranks.share(4)
