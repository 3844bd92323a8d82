"""What a run does not train, from the network under an adapter to a teacher: checkpoints do not have it, and it is known again."""

import json
import zlib
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from mezzotint.errors import UserError
from mezzotint.methods.method import Role


class Fixed:
    """The weights of roles that stay as their method made them (`Role.fixed`); to be made when the method is.

    names: of each role. fingerprint: of all of them.
    """

    def __init__(self, roles: Mapping[str, Role]) -> None:
        weights = {name: role.fixed() for name, role in roles.items()}
        self.names = {name: frozenset(own) for name, own in weights.items()}
        self.fingerprint = fingerprint({f"{name}.{key}": p for name, own in weights.items() for key, p in own.items()})

    def rest(self, roles: Mapping[str, Role], averages: Mapping[str, nn.Module]) -> dict[str, dict[str, Tensor]]:
        """Everything else of the roles, and of the averages that are called "ROLE.average...": all that is not as it was made."""
        modules = {name: role.module for name, role in roles.items() if role.trained or role.moved} | dict(averages)
        names = {name: self.names[name.partition(".")[0]] for name in modules}
        return {name: {key: x for key, x in m.state_dict().items() if key not in names[name]} for name, m in modules.items()}

    def check(self, before: int | None, start: str, folder: Path) -> None:
        """UserError where the fingerprint was another one at the checkpoint of the run in `folder`. Old ones have none, and all weights."""
        if before not in (None, self.fingerprint):
            raise UserError(
                f"{start or 'the start'} is not what {folder} was started from: weights that it does not train have changed; "
                "put them back, or choose another folder with --out"
            )


@torch.no_grad()
def fingerprint(tensors: Mapping[str, Tensor]) -> int:
    """A number by which tensors are known again, on any device: of their names, types, shapes, and sums of their bits as whole numbers."""
    words = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    sums = [x.detach().contiguous().view(words[x.dtype.itemsize]).sum(dtype=torch.int64) for x in tensors.values()]
    described = zip(tensors.items(), torch.stack(sums).tolist() if sums else [], strict=True)
    return zlib.crc32(json.dumps([[name, str(x.dtype), list(x.shape), total] for (name, x), total in described]).encode())
