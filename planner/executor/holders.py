"""Parameters that several ranks of a pipeline hold, kept one: both replicas of a stage, and weights tied across ranks.

A parameter is known by a layer of the model and its name there; tied ones go by the first layer that has it. Holders
start from the values of the first of them. After the pipeline each gathers the gradients of all and adds them in the
order of the ranks, so all end with the same bits whatever the backend does. With data parallelism that comes after the
sum over data ranks, which gives all data ranks of one holder the same bits, so all holders' are the same, too.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn

from planner.errors import ExecutionError
from planner.executor.gradients import BUCKET_BYTES, GradientSync, buckets, take_gradients
from planner.executor.groups import Groups
from planner.executor.stage import Layer
from planner.executor.transport import telling_lost_peers
from planner.schedule.actions import Schedule

ParameterName = tuple[int, str]  # layer of the model, name of the parameter in it, like (0, "weight")
Tie = tuple[ParameterName, ParameterName]
_Holders = tuple[int, ...]  # pipeline ranks, ascending


class Ties:
    """Which names mean one parameter, and which ranks hold it."""

    def __init__(self, layers: Sequence[Layer], given: Iterable[Tie], holders_of_layer: Sequence[_Holders]) -> None:
        """`layers` that are modules are tied where they share a parameter; `given` says it of those to be made.

        ExecutionError for a tie of a layer that does not exist.
        """
        self._holders_of_layer = holders_of_layer
        self._first: dict[ParameterName, ParameterName] = {}
        by_identity: dict[int, ParameterName] = {}
        for index, layer in enumerate(layers):
            if isinstance(layer, nn.Module):
                for name, parameter in layer.named_parameters(remove_duplicate=False):
                    self._join(by_identity.setdefault(id(parameter), (index, name)), (index, name))
        for tie in given:
            for index, name in tie:
                if not 0 <= index < len(layers):
                    raise ExecutionError(
                        f"ties name parameter {name} of layer {index}; the model has layers 0 to {len(layers) - 1}"
                    )
            self._join(*tie)
        self._tied: dict[ParameterName, list[ParameterName]] = {}
        for known in sorted(self._first):
            self._tied.setdefault(self.first(known), []).append(known)

    def first(self, name: ParameterName) -> ParameterName:
        """The name a parameter goes by."""
        while self._first.get(name, name) != name:
            name = self._first[name]
        return name

    def holders(self, name: ParameterName) -> _Holders:
        """The pipeline ranks that hold it."""
        names = self._tied.get(self.first(name), [name])
        return tuple(sorted({rank for index, _ in names for rank in self._holders_of_layer[index]}))

    def sets_of_holders(self) -> set[_Holders]:
        """Every set of several ranks that hold a parameter together, over the whole pipeline."""
        every = {self.holders(name) for name in self._tied} | set(self._holders_of_layer)
        return {holders for holders in every if len(holders) > 1}

    def join_here(self, layers: Mapping[int, nn.Module]) -> None:
        """Make tied parameters of this process one; ExecutionError where one is not there, or not of the same shape."""
        for names in self._tied.values():
            here = [(name, _parameter(layers[name[0]], name)) for name in names if name[0] in layers]
            for name, parameter in here[1:]:
                first_name, first = here[0]
                if parameter is first:
                    continue
                if (parameter.shape, parameter.dtype) != (first.shape, first.dtype):
                    raise ExecutionError(
                        f"parameters tied to each other differ: {_words(first_name)} is {_kind(first)}, "
                        f"{_words(name)} is {_kind(parameter)}"
                    )
                owner, _, leaf = name[1].rpartition(".")
                setattr(layers[name[0]].get_submodule(owner), leaf, first)

    def _join(self, one: ParameterName, other: ParameterName) -> None:
        low, high = sorted((self.first(one), self.first(other)))
        self._first.setdefault(low, low)
        self._first[high] = low


class SharedParameters:
    """What this process holds together with other ranks of its pipeline. Every process must make one."""

    def __init__(
        self, layers: Mapping[int, nn.Module], ties: Ties, schedule: Schedule, groups: Groups, timeout: timedelta
    ) -> None:
        """`layers`: this process's, tied already. ExecutionError where holders do not agree on names and shapes."""
        self._rank = groups.coordinates.pipeline_rank
        self._loss_holders = schedule.holders(schedule.num_stages - 1)
        self.of: dict[_Holders, dict[ParameterName, nn.Parameter]] = defaultdict(dict)
        buffers: dict[_Holders, list[Tensor]] = defaultdict(list)
        for index, layer in sorted(layers.items()):
            for name, parameter in layer.named_parameters(remove_duplicate=False):
                key = index, name
                if len(holders := ties.holders(key)) > 1:
                    self.of[holders].setdefault(ties.first(key), parameter)
            replicas = ties.holders((index, ""))
            if len(replicas) > 1:
                buffers[replicas] += layer.buffers()
        self._elsewhere = {p for holders, mine in self.of.items() if holders[0] != self._rank for p in mine.values()}
        self._groups: dict[_Holders, dist.ProcessGroup] = {}
        self._make_groups(ties, groups, timeout)
        self.losses_of = [ranks[-1] for ranks in (schedule.placements[r] for r in schedule.replica_of_microbatch)]
        for holders in sorted(self._groups):
            mine = dict(sorted(self.of[holders].items()))
            self.of[holders] = mine
            self._check_and_start_alike(holders, mine, buffers[holders])

    def __bool__(self) -> bool:
        return bool(self._groups)

    def let_go(self) -> None:
        """Forget the process groups; only `is_counted` can be asked from now on."""
        self._groups.clear()

    def is_counted(self, parameter: nn.Parameter) -> bool:
        """Whether this rank is the first of its holders."""
        return parameter not in self._elsewhere

    @property
    def parameters(self) -> Iterator[nn.Parameter]:
        """Those that others hold, too."""
        for mine in self.of.values():
            yield from mine.values()

    def mean_loss(self, losses: Sequence[Tensor]) -> Tensor | None:
        """The mean over all microbatches of a pipeline, from those of this rank, in microbatch order; None off the end.

        All ranks of the last stage get the same bits.
        """
        if not losses:
            return None
        mine = torch.stack(list(losses))
        if len(self._loss_holders) == 1:
            return mine.mean()
        every = mine.new_zeros(len(self.losses_of))
        every[[j for j, rank in enumerate(self.losses_of) if rank == self._rank]] = mine
        with telling_lost_peers("the sharing of losses between replicas"):
            parts = [torch.empty_like(every) for _ in self._loss_holders]
            dist.all_gather(parts, every, group=self._groups[self._loss_holders])
        return torch.stack(parts).sum(0).mean()

    def sum_gradients(self) -> None:
        """Replace every shared gradient by its sum over the holders; one that none of them has stays none."""
        for holders in sorted(self._groups):
            parameters = [p for p in self.of[holders].values() if p.requires_grad]
            if parameters:
                with telling_lost_peers("the sum of gradients over pipeline ranks"):
                    _sum(parameters, self._groups[holders], len(holders))

    def _make_groups(self, ties: Ties, groups: Groups, timeout: timedelta) -> None:
        """The same groups in the same order on all processes, as torch wants it."""
        data_ranks, tensor_ranks = groups.mesh.shape[1:]
        sets = {self._loss_holders} if len(self._loss_holders) > 1 else set()
        for holders in sorted(sets | ties.sets_of_holders()):
            for other in range(data_ranks * tensor_ranks):
                ends = [rank * data_ranks * tensor_ranks + other for rank in holders]
                group = dist.new_group(ends, timeout=timeout)
                if groups.coordinates.global_rank in ends:
                    self._groups[holders] = group

    def _check_and_start_alike(
        self, holders: _Holders, parameters: Mapping[ParameterName, nn.Parameter], buffers: Sequence[Tensor]
    ) -> None:
        group = self._groups[holders]
        mine = {name: _kind(parameter) for name, parameter in parameters.items()}
        every: list[dict[ParameterName, str]] = [{} for _ in holders]
        with telling_lost_peers("the comparison of parameters that several pipeline ranks hold"):
            dist.all_gather_object(every, mine, group=group)
        for rank, theirs in zip(holders, every, strict=True):
            for name in sorted(theirs.keys() | every[0].keys()):
                if theirs.get(name) != every[0].get(name):
                    raise ExecutionError(
                        f"pipeline ranks {holders[0]} and {rank} hold {_words(name)} together, but as "
                        f"{every[0].get(name, 'nothing')} and {theirs.get(name, 'nothing')}; give both the same layer"
                    )
        with telling_lost_peers("the start of parameters that several pipeline ranks hold"):
            for tensor in (*parameters.values(), *buffers):
                dist.broadcast(tensor.detach(), group=group, group_src=0)


class HolderSum:
    """A `GradientSync` that sums over holders what `inner` has summed over data ranks."""

    def __init__(self, shared: SharedParameters, inner: GradientSync) -> None:
        self._shared = shared
        self._inner = inner
        self._carried: list[tuple[nn.Parameter, Tensor]] = []

    def begin(self) -> None:
        """Take away what has been summed in earlier steps."""
        self._carried = take_gradients(self._shared.parameters)
        self._inner.begin()

    def stage_finished(self, stage: int) -> None:
        """The inner one's business: gradients of shared parameters leave at the end."""
        self._inner.stage_finished(stage)

    def look(self) -> None:
        """As the inner one."""
        self._inner.look()

    def finish(self) -> None:
        """Sum over data ranks, then over holders, then add what was there before the step."""
        self._inner.finish()
        self._shared.sum_gradients()
        carried, self._carried = self._carried, []
        for parameter, gradient in carried:
            parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)


def _sum(parameters: Sequence[nn.Parameter], group: dist.ProcessGroup, num_holders: int) -> None:
    device = parameters[0].device
    has = torch.tensor([p.grad is not None for p in parameters], dtype=torch.uint8).to(device)
    anywhere = [torch.empty_like(has) for _ in range(num_holders)]
    dist.all_gather(anywhere, has, group=group)
    for bucket in buckets(parameters, BUCKET_BYTES):
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in bucket]
        flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
        parts = [torch.empty_like(flat) for _ in range(num_holders)]
        dist.all_gather(parts, flat, group=group)
        total = parts[0]
        for part in parts[1:]:
            total += part
        offset = 0
        for parameter, gradient in zip(bucket, gradients, strict=True):
            gradient.copy_(total[offset : offset + parameter.numel()].view(parameter.shape))
            parameter.grad = gradient
            offset += parameter.numel()
    for parameter, seen in zip(parameters, torch.stack(anywhere).amax(0).tolist(), strict=True):
        if not seen:
            parameter.grad = None


def _parameter(layer: nn.Module, name: ParameterName) -> nn.Parameter:
    for found, parameter in layer.named_parameters(remove_duplicate=False):
        if found == name[1]:
            return parameter
    raise ExecutionError(f"ties name {_words(name)}, but that layer ({type(layer).__name__}) has no such parameter")


def _words(name: ParameterName) -> str:
    return f"parameter {name[1]} of layer {name[0]}"


def _kind(parameter: Tensor) -> str:
    return f"{str(parameter.dtype).removeprefix('torch.')} {list(parameter.shape)}"
