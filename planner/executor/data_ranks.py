"""Processes that hold the same stages start from the same values, whatever each was seeded with.

Gradients are summed over data ranks, so replicas that start apart would stay apart, each going by gradients of models
that are not its own, without an error anywhere.
"""

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import nn

from planner.errors import ExecutionError
from planner.executor.groups import Groups
from planner.executor.transport import telling_lost_peers


def start_alike(layers: Mapping[int, nn.Module], groups: Groups) -> None:
    """Give parameters and buffers of `layers`, this process's by their index, the values of data rank 0.

    ExecutionError on all data ranks where they do not agree on names, shapes, dtypes and what is trained. Every process
    of the data-parallel group must call it.
    """
    tensors = {
        f"{kind} {name} of layer {index}": tensor
        for index, layer in sorted(layers.items())
        for kind, named in (("parameter", layer.named_parameters()), ("buffer", layer.named_buffers()))
        for name, tensor in named
    }
    mine = {
        name: f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
        f"{'' if tensor.requires_grad or name.startswith('buffer') else ', frozen'}"
        for name, tensor in tensors.items()
    }
    every: list[dict[str, str]] = [{} for _ in range(dist.get_world_size(groups.data))]
    with telling_lost_peers("the comparison of layers over data ranks"):
        dist.all_gather_object(every, mine, group=groups.data)
    for data_rank, theirs in enumerate(every):
        for name in sorted(theirs.keys() | every[0].keys()):
            if theirs.get(name) != every[0].get(name):
                raise ExecutionError(
                    f"data ranks 0 and {data_rank} of pipeline rank {groups.coordinates.pipeline_rank} hold {name} as "
                    f"{every[0].get(name, 'nothing')} and {theirs.get(name, 'nothing')}; give all the same layers"
                )
    with telling_lost_peers("the start of parameters that several data ranks hold"):
        for tensor in tensors.values():
            whole = tensor.detach().contiguous()
            dist.broadcast(whole.reshape(-1).view(torch.uint8), group=groups.data, group_src=0)  # bytes: of any dtype
            if not torch.equal(whole, tensor):
                tensor.detach().copy_(whole)
