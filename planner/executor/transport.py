"""Tensors between the ranks of a pipeline, without deadlock and without keeping a buffer longer than it must.

Sends never block. A receive is posted when it is among the next few this rank needs, and only then gets its
buffer. gloo matches messages by tag. NCCL matches them by order: every (from, to, kind) has a communicator of
its own, and receives are posted in the order of the channel, `planner.schedule.transfers`, which proves that
nothing can hang. The first activation over a boundary is preceded by a small header with its shape and dtype;
from then on the shape is fixed, and the gradient that comes back has it too. Where two replicas of the model run in
opposite directions, activations and gradients go either way between two ranks; a channel carries those of one.
"""

import re
from collections import deque
from collections.abc import Container, Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import islice

import torch
import torch.distributed as dist

from planner.errors import ExecutionError
from planner.executor.program import Channel, RankProgram, channel_of
from planner.schedule.transfers import Transfer

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_MAX_DIMENSIONS = 8
_Boundary = tuple[int, int, int]  # stage before it, its rank, the next stage's rank: each replica has its own


class LostPeerError(ExecutionError):
    """A transfer broke as the process at the other end is gone, or too slow: the cause lies elsewhere."""


@contextmanager
def telling_lost_peers(what: str) -> Iterator[None]:
    """A collective that breaks does so because another process is gone: LostPeerError, with torch's reason.

    Not one that this process has no memory for.
    """
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise LostPeerError(f"{what} broke: {first_sentence(error)}") from None


def tells_of_lost_peer(error: RuntimeError) -> bool:
    """Whether an error of code that also computes comes from another process that is gone."""
    text = str(error)
    return isinstance(error, dist.DistError) or any(sign in text for sign in ("gloo", "NCCL", "Connection closed"))


def first_sentence(error: RuntimeError) -> str:
    """The part of a torch error that says what happened, without the place in torch's source."""
    return re.sub(r"^\[\S+:\d+\] ", "", str(error).splitlines()[0]).split(". ")[0]


class Transport:
    """The point-to-point side of one rank. Everything is called from one thread, in program order."""

    def __init__(
        self,
        program: RankProgram,
        group: dist.ProcessGroup,
        device: torch.device,
        *,
        channels: Mapping[Channel, dist.ProcessGroup] | None = None,
        receive_ahead: int = 1,
    ) -> None:
        """`group` holds the pipeline's ranks; `channels` are needed where messages have no tags.

        `receive_ahead`: receives kept posted beyond the one being waited for, so that they overlap with
        compute.
        """
        self._program = program
        self._group = group
        self._device = device
        self._channels = channels
        self._ahead = receive_ahead
        self._shapes: dict[_Boundary, tuple[torch.Size, torch.dtype]] = {}
        self._posted: dict[Transfer, tuple[dist.Work, torch.Tensor]] = {}
        self._outstanding: dict[Transfer, tuple[dist.Work, torch.Tensor]] = {}
        self._next = 0  # into program.incoming: the next receive this rank needs
        self._only: Container[Transfer] | None = None  # what may be posted ahead; None is everything
        self._channel_order: dict[Channel, deque[Transfer]] = {}
        self._headers: list[tuple[Transfer, dist.Work, torch.Tensor]] = []
        self.peak_buffers = 0  # most boundary tensors held at once in this step, sends and receives

    def begin(self, *, unvalidated: bool = False) -> None:
        """Start a step: post the first receives.

        `unvalidated`: until `validated` or `discard` is called, receives are posted only for what other ranks send
        before their own cut (`planner.executor.cut`). On each channel those come first, so that whatever is
        posted has been sent, or will be, even if the step then starts again.
        """
        self.peak_buffers = 0
        self._next = 0
        self._only = self._program.sent_unvalidated if unvalidated else None
        if self._channels is not None:
            self._channel_order = {channel: deque() for channel in self._channels}
            for transfer in self._program.sent_to_me:
                self._channel_order[channel_of(transfer)].append(transfer)
        self._post_ahead()

    def receive(self, transfer: Transfer, delivered: Iterable[Transfer]) -> torch.Tensor:
        """Wait for `transfer`, the next this rank needs; let go of the sends it proves to be `delivered`."""
        self._next += 1
        if transfer not in self._posted:
            self._post(transfer)
        work, buffer = self._posted.pop(transfer)
        self._wait(work, transfer)
        for old in delivered:
            self._let_go(old)
        self._post_ahead()
        return buffer

    def send(self, transfer: Transfer, tensor: torch.Tensor) -> None:
        """Send `tensor` and keep it until it has been received; the caller can forget it."""
        tensor = tensor.contiguous()
        if transfer.kind == "activation":
            self._check_shape(transfer, tensor)
        if self._channels is not None:
            for old in [old for old, (work, _) in self._outstanding.items() if work.is_completed()]:
                del self._outstanding[old]
        self._outstanding[transfer] = self._start_send(transfer, tensor), tensor
        self._count()

    def finish(self) -> None:
        """End a step: all receives are done, wait for the last sends."""
        for transfer in list(self._outstanding):
            self._let_go(transfer)
        for transfer, work, _tensor in self._headers:
            self._wait(work, transfer)
        self._headers.clear()

    def validated(self) -> None:
        """The step goes on as it began."""
        self._only = None
        self._post_ahead()

    def discard(self) -> None:
        """Throw away an unvalidated beginning: receive what is still on its way here, wait for this rank's sends.

        Every rank does the same, so all that was sent is received, and a step that begins after it finds the
        channels (order) and tags of this rank as if nothing had been sent. Messages of other ranks' new
        beginning may already follow; they match later receives, as both order and tag keep their order.
        """
        for transfer in self._program.incoming[self._next :]:
            if transfer in self._program.sent_unvalidated and transfer not in self._posted:
                self._post(transfer)
        while self._posted:
            transfer, (work, _buffer) = self._posted.popitem()
            self._wait(work, transfer)
        self.finish()

    def _post_ahead(self) -> None:
        for transfer in self._program.incoming[self._next : self._next + self._ahead]:
            if self._only is not None and transfer not in self._only:
                continue
            if transfer not in self._posted and self._can_post(transfer):
                self._post(transfer)

    def _until(self, transfer: Transfer) -> list[Transfer]:
        """What has to be posted up to `transfer`, in order."""
        if self._channels is None:
            return [transfer]
        queue = self._channel_order[channel_of(transfer)]
        return list(islice(queue, queue.index(transfer) + 1))

    def _can_post(self, transfer: Transfer) -> bool:
        return all(_boundary(other) in self._shapes for other in self._until(transfer))

    def _post(self, transfer: Transfer) -> None:
        for other in self._until(transfer):
            boundary = _boundary(other)
            if boundary not in self._shapes:
                # Never a gradient: its F has run here, or F of the next stage could not have.
                self._shapes[boundary] = self._receive_header(other)
            shape, dtype = self._shapes[boundary]
            buffer = torch.empty(shape, dtype=dtype, device=self._device)
            self._posted[other] = self._start_receive(other, buffer), buffer
            if self._channels is not None:
                self._channel_order[channel_of(other)].popleft()
        self._count()

    def _check_shape(self, transfer: Transfer, tensor: torch.Tensor) -> None:
        stage, boundary = transfer.from_stage, _boundary(transfer)
        known = self._shapes.get(boundary)
        if known == (tensor.shape, tensor.dtype):
            return
        if known is not None:
            raise ExecutionError(
                f"stage {stage} made {_describe(tensor.shape, tensor.dtype)} of microbatch "
                f"{transfer.microbatch}, but the boundary to stage {stage + 1} was set up for "
                f"{_describe(*known)}; give every microbatch of every step the same shape (pad), or make a "
                "new Pipeline"
            )
        if tensor.dtype not in _DTYPES or tensor.dim() > _MAX_DIMENSIONS:
            names = ", ".join(str(dtype).removeprefix("torch.") for dtype in _DTYPES)
            raise ExecutionError(
                f"stage {stage} made {_describe(tensor.shape, tensor.dtype)}; a tensor between stages has "
                f"one of the dtypes {names} and at most {_MAX_DIMENSIONS} dimensions: cut the model elsewhere"
            )
        self._shapes[boundary] = tensor.shape, tensor.dtype
        padding = [0] * (_MAX_DIMENSIONS - tensor.dim())
        fields = [_DTYPES.index(tensor.dtype), tensor.dim(), *tensor.shape, *padding]
        header = torch.tensor(fields, dtype=torch.int64, device=self._device)
        self._headers.append((transfer, self._start_send(transfer, header, header=True), header))

    def _receive_header(self, transfer: Transfer) -> tuple[torch.Size, torch.dtype]:
        header = torch.empty(2 + _MAX_DIMENSIONS, dtype=torch.int64, device=self._device)
        self._wait(self._start_receive(transfer, header, header=True), transfer)
        dtype, dimensions, *sizes = header.tolist()
        return torch.Size(sizes[:dimensions]), _DTYPES[dtype]

    def _start_send(self, transfer: Transfer, tensor: torch.Tensor, *, header: bool = False) -> dist.Work:
        group, peer = self._route(transfer, transfer.to_rank)
        try:
            work = dist.isend(tensor, group=group, group_dst=peer, tag=self._tag(transfer, header))
        except RuntimeError as error:
            raise self._lost(transfer, error) from None
        assert work is not None
        return work

    def _start_receive(self, transfer: Transfer, tensor: torch.Tensor, *, header: bool = False) -> dist.Work:
        group, peer = self._route(transfer, transfer.from_rank)
        try:
            work = dist.irecv(tensor, group=group, group_src=peer, tag=self._tag(transfer, header))
        except RuntimeError as error:
            raise self._lost(transfer, error) from None
        assert work is not None
        return work

    def _route(self, transfer: Transfer, peer: int) -> tuple[dist.ProcessGroup, int]:
        if self._channels is None:
            return self._group, peer
        return self._channels[channel_of(transfer)], int(peer > self._program.rank)  # of two, in rank order

    def _tag(self, transfer: Transfer, header: bool) -> int:
        if self._channels is not None:
            return 0
        kind = 2 if header else int(transfer.kind == "gradient")
        return (kind * self._program.num_stages + transfer.from_stage) * self._program.num_microbatches + (
            0 if header else transfer.microbatch
        )

    def _let_go(self, transfer: Transfer) -> None:
        if transfer not in self._outstanding:
            return
        work, _tensor = self._outstanding.pop(transfer)
        self._wait(work, transfer)

    def _wait(self, work: dist.Work, transfer: Transfer) -> None:
        try:
            work.wait()
        except RuntimeError as error:
            raise self._lost(transfer, error) from None

    def _lost(self, transfer: Transfer, error: RuntimeError) -> LostPeerError:
        me = self._program.rank
        other = transfer.from_rank if transfer.to_rank == me else transfer.to_rank
        return LostPeerError(
            f"pipeline rank {me} lost pipeline rank {other} over the {transfer}: {first_sentence(error)}"
        )

    def _count(self) -> None:
        self.peak_buffers = max(self.peak_buffers, len(self._posted) + len(self._outstanding))


def _boundary(transfer: Transfer) -> _Boundary:
    """The boundary that a transfer crosses."""
    if transfer.kind == "activation":
        return transfer.from_stage, transfer.from_rank, transfer.to_rank
    return transfer.to_stage, transfer.to_rank, transfer.from_rank


def _describe(shape: torch.Size, dtype: torch.dtype) -> str:
    return f"{str(dtype).removeprefix('torch.')} {list(shape)}"
