"""Many ranks, from outside of methods and models: who does what, and in place, in this order, what is done to a role's blocks.

Attention over the tokens of other ranks (`train.context`), activation checkpointing, compilation, the cutting of tokens, and sharding
(FSDP2, or HSDP on a mesh of groups), of which waiting in the CPU's memory is a part. A role stays the module that it was, under the
same names, so methods, checkpoints and the pipeline do not know of it. With one rank nothing is exchanged, and nothing is sharded
unless weights wait.
"""

import copy
import os
import socket
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.distributed_c10d import _get_default_store
from torch.distributed.elastic.multiprocessing.errors import get_error_handler
from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from mezzotint import config
from mezzotint.errors import UserError
from mezzotint.methods.method import Role
from mezzotint.models.denoiser import blocks
from mezzotint.pipeline import DeviceName, Pipeline, find_device
from mezzotint.train import context

GONE_WITHIN = 5.0  # seconds in which a process that has let go of its connections ends


@dataclass
class ParallelConfig(config.Config, kind="parallel"):
    """How a run uses its machines. A run may go on under another one: the losses are the same up to rounding.

    device: "auto" is a GPU where there is one. shard: ranks over which every role is spread; 0 is all of them, and n makes groups of n
    that are replicas of each other (HSDP), so that 1 replicates. replicate_text: keep frozen text encoders whole on every rank.
    context: ranks that share one sample, each with a part of its tokens. offload: frozen weights wait in the CPU's memory, and are on
    the device while their block computes; so do optimizer states of roles that do not step in a turn, until one comes in which they do.
    checkpoint: what a block keeps for the backward pass: everything, the results of its matrix products and attentions, or its input
    only. compile: every block by torch.compile. precision: of what is computed under autocast; weights, gradients, states and averages
    are float32 in any case. timeout: minutes after which a rank that waits for another gives up.
    """

    device: DeviceName = "auto"
    shard: int = 0
    replicate_text: bool = False
    context: int = 1
    offload: bool = False
    checkpoint: Literal["none", "selective", "full"] = "none"
    compile: bool = False
    precision: Literal["float32", "bfloat16"] = "float32"
    timeout: float = 10.0


@dataclass(frozen=True)
class Agreement:
    """What the ranks tell each other in a step. samples: of all of them, one that c ranks share being c. stop: whether any of them was
    asked to stop.
    """

    samples: int
    stop: bool


class Ranks:
    """The processes that train together: those that torchrun started, or this one alone.

    Rank r of W works on the micro-batches r, r + W, ... of every step, and every process has the same code, settings and data. Where
    c neighbours share a sample, they work on the same micro-batches: r // c, r // c + W / c, ...
    """

    def __init__(self, config: ParallelConfig) -> None:
        self.config = config
        self.world, self.rank = (int(os.environ.get(name, default)) for name, default in (("WORLD_SIZE", "1"), ("RANK", "0")))
        self.device = find_device(config.device)
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        self.mesh: DeviceMesh | None = None
        self.context: context.Group | None = None
        if config.context < 1 or self.world % config.context:
            raise UserError(f"parallel.context must divide the number of ranks ({self.world}), got {config.context}")
        if self.world > 1 or config.offload:
            self._join()
            self.mesh = _mesh(self.device.type, self.world, config.shard)
        if config.context > 1:
            groups = init_device_mesh(self.device.type, (self.world // config.context, config.context), mesh_dim_names=("data", "context"))
            self.context = context.Group(config.context, self.rank % config.context, groups["context"].get_group())

    def _join(self) -> None:
        """Meet the others, and tell them where this process is. One that is alone has itself for all ranks."""
        if not dist.is_initialized():
            backend = "gloo" if self.device.type == "cpu" else "cpu:gloo,cuda:nccl"
            limit = timedelta(minutes=self.config.timeout)
            if self.world > 1:
                dist.init_process_group(backend, timeout=limit)
            else:
                dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=limit)
        if self.world > 1:
            _get_default_store().set(f"place-{self.rank}", f"{socket.gethostname()} {os.getpid()}")

    @property
    def main(self) -> bool:
        """Whether this is the rank that prints, logs and writes what is written once."""
        return self.rank == 0

    @property
    def suffix(self) -> str:
        """What tells the files of this rank from those of others; nothing where there are no others."""
        return f"-rank{self.rank}" if self.world > 1 else ""

    def share(self, parts: int) -> range:
        """Which of a step's micro-batches are this rank's. UserError where they cannot be shared evenly."""
        groups = self.world // self.config.context
        if parts % groups:
            who = f"{self.world} ranks" if groups == self.world else f"{groups} groups of {self.config.context} ranks"
            raise UserError(
                f"{who} cannot share the {parts} micro-batches of a step evenly; set --train.accumulate to a multiple of {groups} "
                "(a step has accumulate x batch samples, whatever the number of ranks)"
            )
        return range(self.rank // self.config.context, parts, groups)

    def agree(self, samples: int, shape: tuple[int, ...], stop: bool) -> Agreement:
        """Exchange what a step needs to know of all ranks. ValueError where `shape` is not the same everywhere.

        shape: how many batches and how far in the data; ranks that differed would wait for each other for ever.
        """
        if self.world == 1:
            return Agreement(samples, stop)
        own = torch.tensor([samples, int(stop), *shape])
        gathered = [torch.empty_like(own) for _ in range(self.world)]
        dist.all_gather(gathered, own)
        every = torch.stack(gathered)
        if (every[:, 2:] != own[2:]).any():
            raise ValueError(f"experience must take and give equally many batches for every micro-batch, got {every[:, 2:].tolist()}")
        return Agreement(int(every[:, 0].sum()), bool(every[:, 1].any()))

    def total(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Sums over the ranks, each of which has the same names and shapes. They stay on the device."""
        if self.world == 1:
            return dict(values)
        flat = torch.cat([value.flatten().double() for value in values.values()])
        dist.all_reduce(flat)
        parts = flat.split([value.numel() for value in values.values()])
        return {name: part.view_as(value).to(value.dtype) for (name, value), part in zip(values.items(), parts, strict=True)}

    def any(self, mine: bool) -> bool:
        """Whether it is so on any rank; all of them ask."""
        return bool(self.total({"": torch.tensor(float(mine))})[""])

    def wait(self) -> None:
        """Go on when all ranks are here."""
        if self.world > 1:
            dist.barrier()

    @contextmanager
    def company(self) -> Iterator[None]:
        """Turns the loss of other ranks into a UserError that says which."""
        try:
            yield
        except RuntimeError as error:
            # The CPU's backend has no error class of its own.
            if self.world == 1 or not (isinstance(error, dist.DistError) or "gloo" in str(error)):
                raise
            raise UserError(f"rank {self.rank} lost {self._gone()}; when that is put right, run the same command again") from error

    def _gone(self) -> str:
        """Who is gone, in words: what the first one to ask found, so that those who left because of it are not named."""
        store = _get_default_store()
        try:
            places = {rank: store.get(f"place-{rank}").decode().split() for rank in range(self.world)}
            here = [(rank, int(pid)) for rank, (host, pid) in places.items() if host == socket.gethostname()]
            end = time.monotonic() + GONE_WITHIN
            while not (gone := [str(rank) for rank, pid in here if not _runs(pid)]) and time.monotonic() < end:
                time.sleep(0.01)
            found = store.compare_set("gone", "", " ".join(gone) or "unknown").decode().split()
        except RuntimeError:
            return "rank 0, or the machine where the ranks meet"
        if found == ["unknown"]:
            return "a rank of another machine"
        return f"rank {', '.join(found)}, whose process was killed or ended with an error of its own"

    def computing(self) -> AbstractContextManager[object]:
        """Where methods compute, and in what precision: new tensors, and so all that they draw, are on the device."""
        context = ExitStack()
        if self.device.type != "cpu":
            context.enter_context(self.device)
        if self.config.precision == "bfloat16":
            # The cache would keep a copy in bfloat16 of every block that was gathered; and a block that is called again, as the text's are
            # for the null prompt, would find its copies there, and not when it is recomputed, where all kernels must come as before.
            cached = self.mesh is None and self.config.checkpoint != "selective"
            context.enter_context(torch.autocast(self.device.type, torch.bfloat16, cache_enabled=cached))
        return context

    def spread(self, roles: Mapping[str, Role], averages: Iterable[nn.Module] = ()) -> None:
        """Prepare all that a run has in place: checkpointing and compilation of blocks, and this rank's share of the weights.

        What modules had in common before, they have in common then.
        """
        modules = [*(role.module for role in roles.values()), *averages]
        common, idle = _common(modules), {id(p) for part in waiting(roles) for p in part.parameters()}
        for role in roles.values():
            self._prepare(role)
        if self.mesh is None:
            return
        kept = {id(p) for role in roles.values() for part in parts(role.module) if self._kept(role, part) for p in part.parameters()}
        for part in (part for module in modules for part in parts(module)):
            own = {id(p) for p in part.parameters()}
            if not own <= kept:
                _shard(part, self.mesh, waits=self.config.offload and own <= idle)
        _join(common)

    def _kept(self, role: Role, part: nn.Module) -> bool:
        """Whether a part stays whole on every rank."""
        return self.config.replicate_text and frozen(role, part) and part is getattr(role.module, "text", None)

    def _prepare(self, role: Role) -> None:
        """Checkpointing and compilation of a role's blocks, and what lets them share a sample."""
        for part in parts(role.module):
            spread = self.context if isinstance(role.module, Pipeline) and part is role.module.denoiser else None
            if spread is not None:
                context.check(part, spread.size)
                context.share_attention(part, spread)
            for block in blocks(part):
                if role.trained and self.config.checkpoint != "none":
                    block.forward = _recomputed(block, self.config.checkpoint)
                if self.config.compile:
                    block.forward = torch.compile(block.forward)
            if spread is not None:
                context.share_tokens(part, spread)


def leave() -> None:
    """Say goodbye to the other ranks, if there are any."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def report(error: Exception) -> None:
    """Write why this rank ends into the file where torchrun looks for it, so that it can say which rank was the first to fail."""
    if os.environ.get("TORCHELASTIC_ERROR_FILE"):
        get_error_handler().record_exception(error)


def _mesh(kind: str, world: int, shard: int) -> DeviceMesh:
    """All ranks in one group, or replicas (rows) of groups of `shard` ranks."""
    if shard < 0 or world % (shard or world):
        raise UserError(f"parallel.shard must divide the number of ranks ({world}) or be 0, got {shard}")
    if shard in (0, world):
        return init_device_mesh(kind, (world,), mesh_dim_names=("shard",))
    return init_device_mesh(kind, (world // shard, shard), mesh_dim_names=("replicate", "shard"))


def parts(module: nn.Module) -> list[nn.Module]:
    """What methods call: the modules of a pipeline, which is not called itself in training, apart from its codec; or the module."""
    return [part for part in module.children() if part is not module.codec] if isinstance(module, Pipeline) else [module]


def frozen(role: Role, part: nn.Module) -> bool:
    """Whether nothing in a part of a role changes."""
    return not ((role.trained or role.moved) and any(p.requires_grad for p in part.parameters()))


def waiting(roles: Mapping[str, Role]) -> list[nn.Module]:
    """The parts of roles that can wait in the CPU's memory: nothing in them changes, and none of their weights is in a part that does."""
    every = [(part, frozen(role, part)) for role in roles.values() for part in parts(role.module)]
    busy = {id(p) for part, idle in every if not idle for p in part.parameters()}
    return [part for part, idle in every if idle and busy.isdisjoint(map(id, part.parameters()))]


def _common(modules: Sequence[nn.Module]) -> list[list[tuple[nn.Module, str]]]:
    """The parameters that several modules have, each by its modules and its names there."""
    places: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in modules:
        for name, p in module.named_parameters():
            places.setdefault(id(p), []).append((module, name))
    return [found for found in places.values() if len(found) > 1]


def _join(common: Iterable[Sequence[tuple[nn.Module, str]]]) -> None:
    """Let modules share again what sharding has made several of; it looks for its tensors anew when states are loaded."""
    found: dict[nn.Module, dict[str, Tensor]] = {}
    for (first, own), *others in common:
        for module, name in others:
            found.setdefault(module, {})[name] = first.get_parameter(own)
    for module, tensors in found.items():
        module.load_state_dict(tensors, strict=False, assign=True)


KEPT = tuple(
    getattr(torch.ops.aten, name).default
    for name in (
        "mm",
        "addmm",
        "bmm",
        "convolution",
        "_scaled_dot_product_flash_attention",
        "_scaled_dot_product_flash_attention_for_cpu",
        "_scaled_dot_product_efficient_attention",
        "_scaled_dot_product_cudnn_attention",
    )
)


def _keep_products(context: object, operation: object, *args: object, **kwargs: object) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operation in KEPT else CheckpointPolicy.PREFER_RECOMPUTE


def _recomputed(block: nn.Module, keep: str) -> partial[object]:
    """The forward of a block that computes it again in the backward pass."""
    run = partial(checkpoint, block.forward, use_reentrant=False)
    return partial(run, context_fn=partial(create_selective_checkpoint_contexts, _keep_products)) if keep == "selective" else run


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _shard(part: nn.Module, mesh: DeviceMesh, waits: bool = False) -> None:
    """FSDP2 on the blocks and then the rest. Gradients are summed: the losses are shares of one mean already.

    waits: the weights are in the CPU's memory until they are gathered. Weights travel in float32, so that a block computes what it
    would on one rank, in any precision and in previews.
    """
    # Networks return their patches as a view of the picture, and nobody writes into it.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    if not any(True for _ in part.parameters()):
        return
    where = CPUOffloadPolicy(pin_memory=mesh.device_type == "cuda") if waits else OffloadPolicy()
    for module in (*blocks(part), part):
        sharded = fully_shard(module, mesh=mesh, reshard_after_forward=True, offload_policy=where)
        sharded.set_force_sum_reduction_for_comms(True)
        sharded.set_gradient_divide_factor(1.0)


def store_states_(optimizers: Iterable[Optimizer]) -> None:
    """Let the states of optimizers wait in the CPU's memory. Counters of steps stay, since fused kernels read them."""
    for here in _states(optimizers):
        if here.device.type != "cpu":
            here.data = torch.empty_like(here, device="cpu", pin_memory=True).copy_(here)


def fetch_states_(optimizers: Iterable[Optimizer], device: torch.device) -> None:
    """The inverse of `store_states_`."""
    for here in _states(optimizers):
        here.data = here.to(device)


@torch.no_grad()
def _states(optimizers: Iterable[Optimizer]) -> list[Tensor]:
    """This rank's shares of all states but counters, the very tensors."""
    values = [value for optimizer in optimizers for state in optimizer.state.values() for value in state.values()]
    return [value.to_local() if isinstance(value, DTensor) else value for value in values if value.ndim]


def whole(tensor: Tensor) -> Tensor:
    """A tensor with the shares of all ranks, all of which must ask for it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def share_like(tensor: Tensor, other: Tensor) -> Tensor:
    """This rank's share of a whole tensor that all ranks have, spread as `other` is."""
    if not isinstance(other, DTensor):
        return tensor
    return distribute_tensor(tensor, other.device_mesh, other.placements, src_data_rank=None)


def empty_copy(module: nn.Module) -> nn.Module:
    """A copy whose parameters have shapes only, to be filled by `gather`."""
    shapes = {id(p): nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=False) for p in module.parameters()}
    return copy.deepcopy(module, shapes)


def gather(module: nn.Module, copy: nn.Module, keep: bool) -> None:
    """Fill a copy on the CPU with the weights that all ranks have shares of. All ranks call it; those that do not keep fill nothing."""
    tensors = {}
    for name, tensor in module.state_dict().items():
        full = whole(tensor).cpu()
        if keep:
            tensors[name] = full
    if keep:
        copy.load_state_dict(tensors, assign=True)
