"""What a run will need before anything is paid for: memory, time and money, and the cheapest change that makes it fit.

The method's own losses, the optimizer's own steps, the held-out loss and the previews run in a `rehearsal`, where nothing is
computed; so a plan holds for any method on any network, by no formula of either. From what they allocate follow the peaks of
training, evaluation and saving, and from what they multiply and move the time of a step:

    max over turns of (products and memory, links) + update;    a kernel takes max(operations / (0.6 rate), bytes / (0.35 bandwidth))

(Williams et al. 2009). The two shares are fitted to published runs, each of which they give within 20%: DiT-XL/2 on one A100 (0.84
steps a second: fast-DiT's README), Stable Diffusion 2 on eight at 256 and 512 pixels (1,100 and 290 pictures a second:
mosaicml/diffusion's README), MicroDiT on eight H100 (2.6 days: micro_diffusion's README) and drawing by FLUX.1 dev on one (6.7 s:
xDiT's documents). Kernels too small to fill a GPU, loading and the launching of kernels are not in it; docs/planning.md has the rest.

Over N GPUs weights, averages, gradients and optimizer states are sharded (FSDP): every call of a network gathers its weights, block
by block, again for its gradient, and scatters gradients in float32. Where GPUs share a sample, what they exchange for it is what blocks
that were cut for them send in the rehearsal; where what is idle waits in the CPU's memory, a GPU fetches its share of frozen weights
for every call, and states whenever a turn is of other roles than the one before.
Precision "bfloat16" is that of autocast: products are in bfloat16,
and weights, gradients, states, averages and evaluation in float32.
"""

import json
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, fields, replace
from functools import lru_cache, partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.checkpoint import checkpoint

from mezzotint.codecs.cached import CachedConfig
from mezzotint.data.batch import Batch, Loader
from mezzotint.data.preferences import PreferencesConfig
from mezzotint.data.worlds import WorldsConfig
from mezzotint.methods.method import Method, Turn
from mezzotint.models import lora
from mezzotint.models.denoiser import blocks
from mezzotint.models.published import Unset
from mezzotint.pipeline import Pipeline
from mezzotint.text.bytes import ByteEncoderConfig
from mezzotint.train import context
from mezzotint.train.average import Average
from mezzotint.train.devices import GPUS_PER_NODE, Device
from mezzotint.train.heldout import heldout_loss
from mezzotint.train.optim import Muon, clip_
from mezzotint.train.parallel import waiting
from mezzotint.train.rehearsal import Deserted, Rehearsal
from mezzotint.train.trainer import RunConfig

PRODUCTS, MEMORY = 0.6, 0.35  # shares of the rated speeds that kernels reach
USABLE, CONTEXT = 0.95, 1e9  # share of the memory that an allocator can hand out, and bytes that the driver and libraries take
PREVIEW_STEPS = 2  # of a preview; what solvers remember of earlier steps is small
CAPTIONS = 64  # of a batch, among which the longest is looked for
MASTER = 4  # bytes of a trained weight
DAY = 86_400  # seconds
PER_STEP = ("flops", "compute_s", "communication_s", "update_s", "step_s", "images_per_step")


@dataclass(frozen=True)
class Setup:
    """How a run is laid out. checkpointing: every block's activations are computed again for its gradient. lora: rank, 0 for none.

    context: GPUs that share a sample. offload: frozen weights wait in the CPU's memory, and states of roles that do not step.
    """

    gpus: int = 1
    precision: Literal["float32", "bfloat16"] = "bfloat16"
    checkpointing: bool = False
    lora: int = 0
    context: int = 1
    offload: bool = False

    @property
    def sharded(self) -> bool:
        """Whether weights are put together for every call."""
        return self.gpus > 1 or self.offload


class Imagined:
    """A `Source` of pictures that have a size only, with captions as long as the data's longest."""

    version = "imagined"

    def __init__(self, config: RunConfig) -> None:
        sampling, codec = config.pipeline.sampling, config.pipeline.codec
        cached = isinstance(codec, CachedConfig)
        with torch.device("meta"), Unset():
            self.shape = codec.build().latent_shape(sampling.shape) if cached else (3, config.data.size, config.data.size)
        self.pairs = isinstance(config.data, PreferencesConfig) or (isinstance(config.data, WorldsConfig) and config.data.pairs)
        text = config.pipeline.text
        self.said = " ".join(["word"] * (text.max_words if isinstance(text, ByteEncoderConfig) else 1))
        if isinstance(config.data, WorldsConfig) and isinstance(text, ByteEncoderConfig):
            # One batch in `long_every` has long captions; what is drawn does not depend on the size of the picture.
            worlds = config.data.replace(size=8).build()
            batches = [worlds.batch(number, CAPTIONS).prompts for number in range(max(1, config.data.long_every))]
            self.said = max((prompt for prompts in batches for prompt in prompts), key=lambda prompt: len(prompt.split()))

    def batch(self, number: int, size: int) -> Batch:
        images = torch.empty(size, *self.shape, device="meta")
        return Batch(images, [self.said] * size, [""] * size, torch.empty_like(images) if self.pairs else None)

    def held_out(self, size: int) -> Batch:
        return self.batch(0, size)


@dataclass(frozen=True)
class Turned:
    """What a turn does on one GPU: the work of its kernels, and calls of networks. gathered, reduced: numbers of weights sent for them;
    fetched: of those that wait, for all GPUs. exchanged: bytes that it sends to those that share its sample.
    """

    work: list[tuple[int, int]]
    gathered: float
    reduced: float
    fetched: float
    exchanged: float


class Rehearsed:
    """A run on the meta device: its modules, and after `train` and `evaluate` what they did.

    lasting: weights, averages, gradients and states, each the numbers of its storages.
    """

    def __init__(self, config: RunConfig, source: Imagined, setup: Setup, rehearsal: Rehearsal) -> None:
        self.config, self.source, self.rehearsal = config, source, rehearsal
        torch.manual_seed(0)
        with torch.device("meta"), Unset():
            pipeline = config.pipeline.build()
            if setup.lora:
                pipeline.requires_grad_(False)
                lora.add(pipeline.denoiser, config.adapter.replace(rank=setup.lora, alpha=setup.lora))
            self.method: Method = config.method.build(pipeline)
            for role in self.method.roles.values():
                role.module.to("meta")  # what was read from a file, too
        self.waiting = waiting(self.method.roles)
        trained = {name: role.module for name, role in self.method.roles.items() if role.trained}
        self.parameters = {name: [p for p in module.parameters() if p.requires_grad] for name, module in trained.items()}
        self.optimizers = {name: config.optim.build(module) for name, module in trained.items()}
        optim, roles = config.optim, self.method.roles
        self.averages = {name: Average(role.module, optim.average, optim.lengths) for name, role in roles.items() if role.averaged}
        self.lasting: dict[str, set[int]] = {
            "weights": self._numbers(p for role in self.method.roles.values() for p in role.module.parameters()),
            "averages": self._numbers(p for average in self.averages.values() for module in average.modules for p in module.parameters()),
            "gradients": set(),
            "states": set(),
        }
        self.lasting["averages"] -= self.lasting["weights"]
        self.group = Deserted(setup.context)
        for role in self.method.roles.values():
            role.module.requires_grad_(False).train(role.dropout)
            for net in _denoisers(role.module):
                self._wrap(net, setup, role.trained)
        self.half = setup.precision == "bfloat16"
        self.turns: list[Turned] = []
        self.states: dict[str, set[int]] = {}  # of the optimizers of each role
        self.spans: list[tuple[Turn, int, int]] = []  # steps of the rehearsal, with the roles whose states are at hand meanwhile
        self.stepped: dict[type[Optimizer], list[tuple[int, int]]] = {}  # work of the kernels of optimizers that are not one fused kernel
        self.activations = 0.0

    def _numbers(self, tensors: Iterable[Tensor]) -> set[int]:
        return {self.rehearsal.number(x) for x in tensors}

    def _wrap(self, net: nn.Module, setup: Setup, trained: bool) -> None:
        """What the Trainer does to blocks."""
        if setup.context > 1:
            context.check(net, setup.context)
            context.share_attention(net, self.group)
        if setup.checkpointing and trained:
            for block in blocks(net):
                again = partial(checkpoint, block.forward, use_reentrant=False, context_fn=self._contexts)
                block.forward = again
        if setup.context > 1:
            context.share_tokens(net, self.group)

    def train(self, rounds: int) -> None:
        """A step with `rounds` micro-batches, as the Trainer does it, but for what it writes down. The optimizers have taken one before."""
        for name, parameters in self.parameters.items():
            for p in parameters:
                p.grad = torch.zeros_like(p)
            self._update(name, first=True)
        for name, optimizers in self.optimizers.items():
            self.states[name] = self._numbers(x for o in optimizers for state in o.state.values() for x in state.values())
        self.lasting["states"] = set[int]().union(*self.states.values())
        loader = Loader(self.source, self.config.train.batch)
        with self._in_one_step():  # what a method draws once, as the class of a subject, is no step's work
            self._experience(loader, 1, [])
        batches: list[Batch] = []
        first, last = self.method.turns(0), self.method.turns(self.config.train.steps - 1)
        turns, start = max(first, last, key=lambda turns: sum(map(len, turns))), len(self.rehearsal.steps)
        self.turns.append(self._watched((), lambda: self._experience(loader, rounds, batches)))
        for turn in turns:
            for name, parameters in self.parameters.items():
                for p in parameters:
                    p.requires_grad_(name in turn)
            self.turns.append(self._watched(turn, partial(self._losses, turn, batches)))
            for name in turn:
                self.lasting["gradients"] |= self._numbers(p.grad for p in self.parameters[name] if p.grad is not None)
                self._update(name)
            self.spans.append((turn, start, len(self.rehearsal.steps)))
            start = len(self.rehearsal.steps)
        self.method.after_step(0)
        self.spans.append((turns[-1], start, len(self.rehearsal.steps)))

    def _experience(self, loader: Loader, rounds: int, batches: list[Batch]) -> None:
        with self._precision():
            batches += [batch for _ in range(rounds) for batch in self.method.experience(loader, 0)]

    @contextmanager
    def _in_one_step(self) -> Iterator[None]:
        """Within, pipelines draw in a single step."""
        drawing = {role.module: role.module.config for role in self.method.roles.values() if isinstance(role.module, Pipeline)}
        for pipeline, own in drawing.items():
            pipeline.config = replace(own, sampling=own.sampling.replace(steps=1))
        yield
        for pipeline, own in drawing.items():
            pipeline.config = own

    def _losses(self, turn: Turn, batches: list[Batch]) -> None:
        for batch in batches:
            before = self.rehearsal.now
            with self._precision():
                loss = self.method.loss(batch, turn, 0)[0] / len(batches)
            self.activations = max(self.activations, self.rehearsal.now - before)
            loss.backward()
            del loss

    def _watched(self, turn: Turn, act: Callable[[], None]) -> Turned:
        """What is done in `act` while the roles of a turn are trained."""
        start, before, fetched = len(self.rehearsal.work), self.group.sent, list[int]()
        calls = {name: [0, 0] for name in self.method.roles}  # of a role's networks: all, and those with a gradient

        def called(name: str, net: nn.Module, arguments: Any) -> None:
            calls[name][0] += 1
            calls[name][1] += torch.is_grad_enabled() and name in turn

        def fetch(size: int, part: nn.Module, arguments: Any) -> None:
            again = torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in arguments)
            fetched.append(size * (1 + again))  # for its gradient

        named = [(name, net) for name, role in self.method.roles.items() for net in _denoisers(role.module)]
        handles = [net.register_forward_pre_hook(partial(called, name)) for name, net in named]
        handles += [part.register_forward_pre_hook(partial(fetch, _count(part))) for part in self.waiting]
        act()
        for handle in handles:
            handle.remove()
        sizes = {name: _count(net) for name, net in named}
        learnt = {name: sum(p.numel() for p in parameters) for name, parameters in self.parameters.items()}
        gathered = sum(sizes[name] * sum(calls[name]) for name in sizes)
        reduced = sum(learnt[name] * calls[name][1] for name in sizes if name in learnt)
        return Turned(self.rehearsal.work[start:], gathered, reduced, sum(fetched), self.group.sent - before)

    def _contexts(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """Those of a block's forward, which is within one already, and of its repetition."""
        return nullcontext(), self._precision()

    def _precision(self) -> AbstractContextManager[None]:
        return self.rehearsal.autocast() if self.half else nullcontext()

    def _update(self, name: str, first: bool = False) -> None:
        """Clip, step, let go of the gradients, and move the average, if there is one. Only a first step of a fused kernel allocates."""
        clip_(self.parameters[name], self.config.optim.clip)
        for optimizer in self.optimizers[name]:
            fused = any(group.get("fused") for group in optimizer.param_groups)
            if fused and first:  # by the loops over tensors, since the fused kernel does not know the meta device
                for group in optimizer.param_groups:
                    group["fused"], group["foreach"] = False, True
                optimizer.step()
                for group in optimizer.param_groups:
                    group["fused"], group["foreach"] = True, False
            elif not fused:
                start = len(self.rehearsal.work)
                optimizer.step()
                if not first:
                    self.stepped.setdefault(type(optimizer), []).extend(self.rehearsal.work[start:])
            optimizer.zero_grad()
        if name in self.averages:
            self.averages[name].update(self.method.roles[name].module, 0)

    def evaluate(self) -> None:
        """The held-out loss and a short preview."""
        train = self.config.train
        pipeline = self.averages["student"].shown if "student" in self.averages else self.method.student
        assert isinstance(pipeline, Pipeline)
        start = len(self.rehearsal.steps)
        heldout_loss(pipeline, self.source.held_out(train.held_out))
        prompts = list(train.preview_prompts) or self.source.held_out(8).prompts
        sampling = self.config.pipeline.sampling
        pipeline(prompts[: sampling.batch], steps=min(PREVIEW_STEPS, sampling.steps))  # one batch after the other
        self.spans.append(((), start, len(self.rehearsal.steps)))

    def shares(self, setup: Setup, turn: Turn) -> dict[str, dict[int, float]]:
        """How much of what lasts one of several GPUs holds in a turn."""
        shares = {kind: dict.fromkeys(numbers, 1 / setup.gpus) for kind, numbers in self.lasting.items()}
        if setup.offload:
            shares["weights"] |= dict.fromkeys(self._numbers(p for part in self.waiting for p in part.parameters()), 0.0)
            for name in self.states.keys() - set(turn):
                shares["states"] |= dict.fromkeys(self.states[name], 0.0)
        return shares

    def fullest(self, setup: Setup) -> dict[str, float]:
        """Bytes of what lasts, by kind, in the turn in which one GPU holds most of it."""
        turns = [{kind: self.rehearsal.held(part) for kind, part in self.shares(setup, turn).items()} for turn, _, _ in self.spans]
        return max(turns, key=lambda held: sum(held.values()))

    def exchanged(self, setup: Setup) -> float:
        """Bytes of states that leave and come in a step, wherever a turn is of other roles than the one before."""
        turns = [turn for turn, _, _ in self.spans]
        held = [self.rehearsal.held(self.shares(setup, turn)["states"]) for turn in turns]
        return sum(held[k] + held[k - 1] for k in range(len(turns)) if turns[k] != turns[k - 1])

    def peak(self, setup: Setup) -> float:
        """The most bytes that one GPU holds in what was rehearsed."""
        peaks = []
        for turn, start, end in self.spans:
            shares = {number: share for numbers in self.shares(setup, turn).values() for number, share in numbers.items()}
            if setup.sharded:
                shares |= dict.fromkeys(self.rehearsal.casts, 0.0)  # weights come in bfloat16 then, and `unsharded` has them
            peaks.append(self.rehearsal.peak(start, end, shares))
        return max(peaks) + self.unsharded(setup)

    def unsharded(self, setup: Setup) -> float:
        """Bytes of what is put together, or fetched: what is in no block, two blocks, and the gradient of one in float32."""
        if not setup.sharded:
            return 0.0
        rest = largest = 0
        nets = {net for role in self.method.roles.values() for net in _denoisers(role.module)}
        for net in nets | (set(self.waiting) if setup.offload else set()):
            sizes = [_count(block) for block in blocks(net)]
            rest += _count(net) - sum(sizes)
            largest = max(largest, *sizes, 0)
        width = getattr(torch, setup.precision).itemsize
        return width * (rest + 2 * largest) + MASTER * largest


def _denoisers(module: nn.Module) -> Iterator[nn.Module]:
    """Of pipelines, the network."""
    if isinstance(module, Pipeline):
        yield module.denoiser


@dataclass(frozen=True)
class Plan:
    """What a run needs. Memory is of one GPU and in 10^9 bytes, all else of all GPUs together.

    params: weights of the student's text encoder and denoiser. activations: what the losses of a micro-batch keep for their gradients,
    with copies of weights in bfloat16, which several GPUs gather instead of keeping them.
    peak_train, peak_eval, peak_save: the most that is held in a step, in the held-out loss and previews, and while a checkpoint is
    written. fits: whether `memory` is enough for all of them. flops: operations of a step. step_s: its seconds, of which the products and
    the memory take compute_s, the links communication_s at the same time, and the optimizers update_s after them. steps: of the run.
    """

    params: int
    trained: int
    roles: dict[str, int]
    weights_gb: float
    averages_gb: float
    gradients_gb: float
    states_gb: float
    activations_gb: float
    peak_train_gb: float
    peak_eval_gb: float
    peak_save_gb: float
    memory_gb: float
    fits: bool
    flops: float
    compute_s: float
    communication_s: float
    update_s: float
    step_s: float
    steps: int
    images_per_step: float
    images_per_day: float
    tokens_per_day: float
    days: float
    cost: float


@lru_cache(maxsize=16)
def _rehearsed(described: str, setup: Setup, rounds: int) -> Rehearsed:
    """A run, by its stored form, that has been trained for a step of so many micro-batches, or evaluated, where there are none."""
    config = RunConfig.from_data(json.loads(described))
    source = Imagined(config)
    with Rehearsal() as rehearsal:
        run = Rehearsed(config, source, setup, rehearsal)
        if rounds:
            run.train(rounds)
        else:
            run.evaluate()
    return run


def rehearsed(config: RunConfig, setup: Setup) -> tuple[Rehearsed, Rehearsed]:
    """A run after a step, and one after an evaluation. UserError where the method cannot learn from the data."""
    one, described = replace(setup, gpus=1, offload=False), json.dumps(config.to_data())
    trained = _rehearsed(described, one, min(2, micro_batches(config, setup)))
    same = config.replace(train=config.train.replace(batch=1, accumulate=1))  # for an evaluation
    return trained, _rehearsed(json.dumps(same.to_data()), replace(one, precision="float32", checkpointing=False, context=1), 0)


def micro_batches(config: RunConfig, setup: Setup) -> int:
    """Micro-batches of a step on each GPU, or of GPUs that share a sample, which have at least one."""
    return max(1, math.ceil(config.train.accumulate * setup.context / setup.gpus))


def plan(config: RunConfig, setup: Setup, device: Device) -> Plan:
    """What a run needs on so many GPUs of a kind: the most memory of any of its stages, and of what is counted by steps the mean.

    UserError where the method cannot learn from the data.
    """
    parts = by_stage(config, setup, device)
    days = sum(part.days for part in parts)

    def joined(name: str) -> Any:
        values = [getattr(part, name) for part in parts]
        if name in ("days", "cost"):
            return sum(values)
        if name == "fits":
            return all(values)
        if name.endswith("_per_day"):
            return sum(value * part.days for value, part in zip(values, parts, strict=True)) / days
        if name in PER_STEP:
            return sum(value * part.steps for value, part in zip(values, parts, strict=True)) / config.train.steps
        return config.train.steps if name == "steps" else max(values) if name.endswith("_gb") else values[-1]

    return parts[0] if len(parts) == 1 else Plan(**{each.name: joined(each.name) for each in fields(Plan)})


def by_stage(config: RunConfig, setup: Setup, device: Device) -> list[Plan]:
    """What each stage of a run needs, by itself."""
    ends = config.ends()
    lengths = [end - start for start, end in zip((0, *ends), ends, strict=False)]
    parts = zip(config.staged(), lengths, strict=True)
    return [_plan(part.replace(stages=(), train=part.train.replace(steps=steps)), setup, device) for part, steps in parts]


def _plan(config: RunConfig, setup: Setup, device: Device) -> Plan:
    """What a run without stages needs."""
    run, evaluated = rehearsed(config, setup)
    size = {kind: held / 1e9 for kind, held in run.fullest(setup).items()}
    lasting = size["weights"] + size["averages"] + size["states"]
    peaks = (run.peak(setup) / 1e9, evaluated.peak(setup) / 1e9 + size["states"], lasting)
    memory = (USABLE * device.memory - CONTEXT) / 1e9
    compute, sent, update = times(run, config, setup, device)
    step = sum(map(max, compute, sent)) + update
    images = config.train.batch * micro_batches(config, setup) * setup.gpus // setup.context
    student = run.method.student
    rows, columns = student.grid(config.pipeline.sampling.shape)
    days = step * config.train.steps / DAY
    return Plan(
        params=_count(student.text) + _count(student.denoiser),
        trained=sum(p.numel() for parameters in run.parameters.values() for p in parameters),
        roles={name: _count(role.module) for name, role in run.method.roles.items()},
        weights_gb=size["weights"],
        averages_gb=size["averages"],
        gradients_gb=size["gradients"],
        states_gb=size["states"],
        activations_gb=run.activations / 1e9,
        peak_train_gb=peaks[0],
        peak_eval_gb=peaks[1],
        peak_save_gb=peaks[2],
        memory_gb=memory,
        fits=max(peaks) <= memory,
        flops=_repeats(config, setup) * setup.gpus * sum(f for turn in run.turns for f, _ in turn.work),
        compute_s=sum(compute),
        communication_s=sum(sent),
        update_s=update,
        step_s=step,
        steps=config.train.steps,
        images_per_step=images,
        images_per_day=images / step * DAY,
        tokens_per_day=images * rows * columns / step * DAY,
        days=days,
        cost=24 * days * setup.gpus * device.price,
    )


def times(run: Rehearsed, config: RunConfig, setup: Setup, device: Device) -> tuple[list[float], list[float], float]:
    """Seconds of every turn's kernels, of what every turn sends, and of a step's updates.

    These read and write all that lasts once, and do what optimizers do that are not one fused kernel, on a GPU's rows or, of Muon, on all.
    """
    repeats, others = _repeats(config, setup), (setup.gpus - 1) / setup.gpus
    rate = device.float32 if setup.precision == "float32" else device.bf16
    speed = device.link if setup.gpus <= GPUS_PER_NODE else device.network
    width = getattr(torch, setup.precision).itemsize
    compute = [repeats * kernel_seconds(turn.work, rate, device.bandwidth) for turn in run.turns]
    sent = [repeats * others * (width * turn.gathered + MASTER * turn.reduced) / speed for turn in run.turns]
    near = device.link if setup.context <= GPUS_PER_NODE else device.network
    sent = [s + repeats * turn.exchanged / near for s, turn in zip(sent, run.turns, strict=True)]
    if setup.offload:
        share = repeats * MASTER / setup.gpus
        sent = [s + share * turn.fetched / device.host for s, turn in zip(sent, run.turns, strict=True)]
    lasting = sum(run.rehearsal.held(shares) for shares in run.shares(setup, tuple(run.states)).values())
    update = 2 * lasting / device.bandwidth
    if setup.offload:
        update += run.exchanged(setup) / device.host
    for kind, work in run.stepped.items():
        update += kernel_seconds(work, device.bf16, device.bandwidth) / (1 if kind is Muon else setup.gpus)
    return compute, sent, update


def kernel_seconds(work: Iterable[tuple[int, int]], rate: float, bandwidth: float) -> float:
    """Seconds of kernels, each (operations, bytes), where neither products nor memory reach the rated speeds."""
    return sum(max(flops / (PRODUCTS * rate), size / (MEMORY * bandwidth)) for flops, size in work)


def _repeats(config: RunConfig, setup: Setup) -> float:
    """How often a step repeats the micro-batches that were rehearsed."""
    micro = micro_batches(config, setup)
    return micro / min(2, micro)


def _count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())
