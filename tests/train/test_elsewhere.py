"""What would fail on a GPU, or make the host wait for it in every step, on a device that stands in for one."""

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from elsewhere import THERE, Elsewhere
from techniques import METHODS, PAIRED, of_method
from tiny_runs import tiny_run

from mezzotint.data.pairs import PairsConfig
from mezzotint.methods.denoise import DenoiseConfig
from mezzotint.methods.method import MethodConfig
from mezzotint.train import speed
from mezzotint.train.log import read
from mezzotint.train.trainer import Trainer

TECHNIQUES: dict[str, MethodConfig] = {"denoise": DenoiseConfig(), **METHODS}
# They look at what they have drawn, by rewards that are programs on the CPU.
LOOKING = ("flow_grpo", "refl", "enhance_grpo")


@contextmanager
def trained_elsewhere(patch: pytest.MonkeyPatch) -> Iterator[Counter[str]]:
    """Within, runs are on the device. Gives the waits of their steps after the first."""
    patch.setattr("mezzotint.train.parallel.find_device", lambda name, number=None: THERE)
    patch.setattr(sys.modules["torch.optim.optimizer"], "_get_fused_kernels_supported_devices", lambda: ["cpu", "meta"])
    patch.setitem(speed.SIDES, "meta", 64)
    step, found = Trainer._train_step, Counter[str]()
    with Elsewhere() as elsewhere:

        def watched(trainer: Trainer) -> object:
            before = Counter(elsewhere.waits)
            answer = step(trainer)
            found.update((elsewhere.waits - before) if trainer.step else {})
            return answer

        patch.setattr(Trainer, "_train_step", watched)
        yield found


@pytest.mark.parametrize("name", TECHNIQUES)
def test_a_technique_runs_elsewhere_as_here_and_no_step_waits(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    if name in ("repa", "add", "reflow"):
        Trainer(tiny_run(steps=1), tmp_path / "own").run()
    config = of_method(tiny_run(TECHNIQUES[name], pairs=name in PAIRED, steps=2))
    if name == "reflow":
        config.data = PairsConfig(str(tmp_path / "pairs"), str(tmp_path / "own"), number=8)
    with Elsewhere():  # where building a module takes random numbers on either device
        Trainer(config, tmp_path / "here").run()
    with trained_elsewhere(monkeypatch) as waits:
        Trainer(config, tmp_path / "there").run()
    here, there = ([line for line in read(tmp_path / folder / "metrics.jsonl") if "lr" in line] for folder in ("here", "there"))
    assert [line.keys() for line in here] == [line.keys() for line in there]
    first = next(key for key in here[0] if key.endswith("loss"))  # of the first turn, before steps make rounding errors larger
    assert there[0][first] == pytest.approx(here[0][first], rel=1e-3)
    # What the stand-in cannot pin is sent by `sent`, which does not block.
    assert name in LOOKING or not {line: n for line, n in waits.items() if not line.endswith(" sent")}
