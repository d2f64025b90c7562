"""Training on shards (ZeRO, Rajbhandari et al., arXiv 1910.02054) by FSDP2, for models whose training does not fit on one GPU.

Each process keeps a share of the weights, gradients, averages and optimiser's states, and gathers the weights of a block where a
forward or backward needs them. Attacks go through the same model by autograd. Checkpoints hold whole tensors, as those of other
runs. Validation and test use a whole copy of the model: processes have different numbers of batches there, and a sharded forward
waits for all processes.
"""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_map_only

from ..config import Config
from ..runtime.distributed import World
from .blocks import find_blocks


class Shards:
    """Shards the parameters of `models`, which are alike; their buffers stay whole. All methods but `forget` are for all
    processes to call together."""

    def __init__(self, config: Config, world: World, *models: nn.Module):
        self.world = world
        self.template = copy.deepcopy(models[0]).cpu()  # a sharded model cannot be copied
        self.gathered: nn.Module | None = None
        mesh = init_device_mesh(world.device.type, (world.size,))
        all_half = config.precision == config.precision_of_attacks == "bf16"
        half = all_half and not any(isinstance(m, _BatchNorm) for m in models[0].modules())  # which wants its weights in fp32
        policy = MixedPrecisionPolicy(torch.bfloat16 if half else None, reduce_dtype=torch.float32, cast_forward_inputs=False)
        for model in models:
            for p in model.parameters():
                p.data = p.data.contiguous()  # as FSDP has them
            for module in (*find_blocks(model), model):
                # The root too: an attack freezes the parameters that it finds, which FSDP looks at when it gathers.
                fully_shard(module, mesh=mesh, reshard_after_forward=True, mp_policy=policy)
            # Now, not at the first forward, which is that of an attack: gradients of frozen parameters get no dtype.
            fully_shard.state(model)._lazy_init()  # type: ignore[attr-defined]

    def model(self, sharded: nn.Module) -> nn.Module:
        """A whole copy, with the weights that it had when it was first asked for after `forget`."""
        if self.gathered is None:
            self.gathered = copy.deepcopy(self.template).to(self.world.device)
            self.gathered.load_state_dict(_gather(sharded.state_dict(), keep=True))
        return self.gathered

    def forget(self) -> None:
        """Free the copy that `model` gave: weights change."""
        self.gathered = None

    def whole(self, state: dict) -> dict:
        """The state of a `TrainStep` as if nothing were sharded, on the CPU; with None for the tensors of other processes than
        the main one."""
        return _gather(state, keep=self.world.main)

    def parts(self, state: dict, own: dict, optimizer: torch.optim.Optimizer) -> dict:
        """This process's parts of a `whole` state, where `own` is its present one."""
        models = {
            kind: {name: _part(own[kind].get(name), t) for name, t in state[kind].items()}
            for kind in ("model", "ema")
            if own[kind] and state[kind]
        }
        weights = [p for group in optimizer.param_groups for p in group["params"]]
        states = state["optimizer"]["state"]
        moments = {i: {name: _part(weights[i], t) for name, t in values.items()} for i, values in states.items()}
        return state | models | {"optimizer": state["optimizer"] | {"state": moments}}


def _gather(state: Any, keep: bool) -> Any:
    def gathered(t: DTensor) -> Tensor | None:
        full = t.full_tensor()
        return full.cpu() if keep else None

    return tree_map_only(DTensor, gathered, state)


def _part(own: Any, full: Any) -> Any:
    """The part of `full` that a process has of `own`. Where that is no shard, or of another shape: `full` itself."""
    if not isinstance(own, DTensor) or own.shape != getattr(full, "shape", None):
        return full
    return distribute_tensor(full.to(own.device), own.device_mesh, own.placements, src_data_rank=None)
