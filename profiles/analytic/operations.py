"""The operations layers are made of, each with its time, FLOPs and bytes on one device.

What a framework is assumed to do is decided here, operation by operation:

- Tensor parallelism splits matrix products over the devices. With sequence parallelism (arXiv 2205.05198) norms,
  dropout and residuals are split over the sequence, and what is kept between F, B and W is kept as shards;
  without it every device repeats and keeps them whole.
- Context parallelism gives a device s / cp tokens, in two pieces such that causal attention is even
  (ring attention, arXiv 2310.01889; striped as in Megatron-LM).
- Kernels are fused as in Megatron-LM or under torch.compile: a norm, a gated activation, or a dropout with
  the residual it is added to is one pass over memory.
- There is dropout where the norm is a LayerNorm (GPT-2, GPT-3 and their like), none with RMSNorm (Llama).
- Flash attention keeps its inputs, its output and one number per row and head, never the scores.
- W is the weight gradients of matrix products and their addition to the accumulated gradient. The
  gradients of norms and biases are small and stay in B.
"""

from dataclasses import dataclass
from math import ceil
from typing import Literal

from profiles.analytic.kernels import ALIGNMENT, CAUSAL_BLOCK, Machine
from profiles.errors import ProfileError
from profiles.model import ModelSpec, Variant

AttentionKernel = Literal["flash", "flash-2", "flash-1", "unfused"]
"""Causal attention: kernels written for the device (FlashAttention-3, cuDNN), the second or the first FlashAttention,
or scores in memory."""


VOCABULARY_MULTIPLE = 128  # Megatron-LM pads the vocabulary to a multiple of this times tp
FLASH_BACKWARD_FACTOR = 2.5  # five products against two: the scores are computed again
ROW_STATISTIC_BYTES = 4  # the log-sum-exp of one row of scores, in fp32
EAGER_NORM_PASSES = 8  # of an RMSNorm in fp32, one elementary kernel after the other, against a fused one
FLASH_1_PASSES = (15, 26)
"""Passes over one hidden state, in F and B, around the first FlashAttention as it was called from PyTorch.

Counted for MPT: Q, K and V clipped and gathered without padding, the output scattered back; the same backward, with
the gradients of Q, K and V laid side by side again. Later kernels take tensors as they lie.
"""
CAST_BYTES = 4  # of one element cast to 8 bits: read in 16, written twice, once of it transposed


@dataclass(frozen=True)
class Operation:
    """One step of a layer on one device: times in µs, sizes in bytes, for one microbatch."""

    name: str
    forward_us: float = 0.0
    backward_us: float = 0.0  # B
    weight_us: float = 0.0  # W
    forward_flops: float = 0.0
    backward_flops: float = 0.0
    weight_flops: float = 0.0
    saved_bytes: float = 0.0  # kept from F to B; a tensor that two operations keep is counted by one
    weight_saved_bytes: float = 0.0  # kept from B to W
    transient_bytes: float = 0.0  # the most it allocates on top while it runs
    num_parameters: float = 0.0  # on this device
    num_expert_parameters: float = 0.0  # of num_parameters
    core_bytes: float = 0.0  # of saved_bytes: what selective recompute makes again
    forward_launches: int = 1  # operations the host has to dispatch for F
    backward_launches: int = 1
    weight_launches: int = 0
    forward_sent_us: float = 0.0  # of forward_us: collectives, which need no multiprocessors
    backward_sent_us: float = 0.0
    hideable_us: float = 0.0  # of backward_us: collectives that the W of the next product does not wait for
    ring_bytes: float = 0.0
    exchange_bytes: float = 0.0


@dataclass(frozen=True)
class Shard:
    """What one device holds of a model; ProfileError for degrees that do not divide it."""

    spec: ModelSpec
    variant: Variant
    machine: Machine
    attention_kernel: AttentionKernel = "flash"
    fused: bool = True
    fused_loss: bool = False
    accumulated_bytes: float = 6.0  # per parameter: traffic of adding up weight gradients
    pads_vocabulary: bool = True

    def __post_init__(self) -> None:
        spec, tp = self.spec, self.variant.tp
        self._must_divide("num_heads", spec.num_heads)
        self._must_divide("sequence_length", self.variant.sequence_length)
        self._must_divide("sequence_length", self.variant.sequence_length, cp=self.variant.cp)
        if spec.moe is None or spec.moe.num_dense_layers:
            self._must_divide("ffn_size", spec.ffn_size)
        if spec.moe is not None:
            self._must_divide("moe.expert_ffn_size", spec.moe.expert_ffn_size)
            self._must_divide("moe.num_experts", spec.moe.num_experts, ep=self.variant.ep)
        elif self.variant.ep > 1:
            raise ProfileError(f"model {spec.name!r} has no experts: ep={self.variant.ep} means nothing; choose ep=1")
        heads = spec.num_kv_heads
        if spec.latent_attention is None and max(heads, tp) % min(heads, tp):
            raise ProfileError(
                f"model {spec.name!r} has num_kv_heads {heads}: tp={tp} neither divides it nor is a multiple "
                f"of it; choose tp from the divisors and multiples of {heads}"
            )

    def _must_divide(self, name: str, size: int, **degrees: int) -> None:
        for degree, value in (degrees or {"tp": self.variant.tp}).items():
            if size % value:
                raise ProfileError(
                    f"model {self.spec.name!r} has {name} {size}, which {degree}={value} does not divide; "
                    f"choose {'an' if degree == 'ep' else 'a'} {degree} that divides {size}"
                )

    @property
    def element_bytes(self) -> int:
        """Bytes of one activation or weight."""
        return self.machine.element_bytes

    @property
    def num_tokens(self) -> int:
        """Tokens of one microbatch on this device."""
        return self.variant.micro_batch_size * self.variant.sequence_length // self.variant.cp

    @property
    def num_parts(self) -> int:
        """Parts that what is outside of matrix products is split into over the tensor-parallel devices."""
        return self.variant.tp if self.variant.sequence_parallel else 1

    @property
    def part_width(self) -> float:
        """Elements per token that one device keeps of a hidden state."""
        return self.spec.hidden_size / self.num_parts

    @property
    def hidden_bytes(self) -> float:
        """Hidden states of one microbatch, whole."""
        return self.num_tokens * self.spec.hidden_size * self.element_bytes

    @property
    def shard_bytes(self) -> float:
        """Hidden states of the part of the sequence that this device normalizes and adds up."""
        return self.hidden_bytes / self.num_parts

    @property
    def has_dropout(self) -> bool:
        """Whether the model is taken to be trained with dropout."""
        return self.spec.norm == "layernorm"

    @property
    def vocabulary(self) -> int:
        """Rows of the embedding on this device, padding included."""
        if self.variant.tp == 1 and not self.pads_vocabulary:
            return self.spec.vocab_size
        multiple = VOCABULARY_MULTIPLE * self.variant.tp
        return ceil(self.spec.vocab_size / multiple) * VOCABULARY_MULTIPLE

    @property
    def heads(self) -> int:
        """Query heads of this device."""
        return self.spec.num_heads // self.variant.tp

    @property
    def kv_heads(self) -> int:
        """Key and value heads of this device; with fewer heads than devices, each is held more than once."""
        return max(1, self.spec.num_kv_heads // self.variant.tp)

    def linear(
        self,
        name: str,
        inputs: int,
        outputs: int,
        *,
        kept_inputs: float,
        kept_outputs: float,
        rows: float | None = None,
        groups: int = 1,
        bias: bool = False,
        experts: bool = False,
        narrow: bool | None = None,
    ) -> Operation:
        """Y = X W with `inputs` × `outputs` weights on this device; X has one row per token unless told.

        B is dX = dY Wᵀ and W is dW = Xᵀ dY: the FLOPs of F in other shapes. `kept_inputs` and
        `kept_outputs` are elements per token of the microbatch: what this device keeps of X from F to W,
        and of dY from B to W. With `groups` (experts), each has its own weights and an even part of `rows`.
        `narrow`: in 8 bits, as all linear layers of blocks are where the dtype is float8.
        """
        narrow = self.variant.dtype == "float8" if narrow is None else narrow
        machine, tokens = self.machine, self.num_tokens
        rows = tokens if rows is None else rows
        group_rows, weights = rows / groups, inputs * outputs * groups
        aligned = inputs % ALIGNMENT == 0 and outputs % ALIGNMENT == 0

        def product_us(rows: float, columns: float, depth: float) -> float:
            return machine.matmul_us(rows, columns, depth, groups=groups, wide=not narrow, aligned=aligned)

        flops = 2.0 * rows * inputs * outputs
        cast_us = [machine.memory_us(CAST_BYTES * rows * width) if narrow else 0.0 for width in (inputs, outputs)]
        bias_us = machine.memory_us(rows * outputs * self.element_bytes) if bias else 0.0  # its gradient: a sum
        return Operation(
            name,
            forward_us=product_us(group_rows, outputs, inputs) + cast_us[0],
            backward_us=product_us(group_rows, inputs, outputs) + cast_us[1] + bias_us,
            weight_us=product_us(inputs, outputs, group_rows) + self.accumulate_us(weights),
            forward_flops=flops,
            backward_flops=flops,
            weight_flops=flops,
            saved_bytes=tokens * kept_inputs * self.element_bytes,
            weight_saved_bytes=tokens * (kept_inputs + kept_outputs) * self.element_bytes,
            transient_bytes=max(rows * (inputs + outputs), weights) * self.element_bytes,
            num_parameters=weights + (outputs * groups if bias else 0),
            num_expert_parameters=weights if experts else 0,
            forward_launches=2,
            backward_launches=2,
            weight_launches=2,
        )

    def accumulate_us(self, num_parameters: float) -> float:
        """Adding a fresh weight gradient to the accumulated one."""
        if not self.accumulated_bytes:
            return 0.0
        return self.machine.memory_us(num_parameters * self.accumulated_bytes * self.element_bytes / 2)

    def elementwise(
        self,
        name: str,
        *,
        forward: float,
        backward: float,
        saved: float = 0.0,
        transient: float = 0.0,
        num_parameters: float = 0.0,
    ) -> Operation:
        """One pass over memory each way: bytes read and written in F and in B, saved, and transient."""
        return Operation(
            name,
            forward_us=self.machine.memory_us(forward),
            backward_us=self.machine.memory_us(backward),
            saved_bytes=saved,
            transient_bytes=transient,
            num_parameters=num_parameters,
        )

    def norm(self, name: str, width: int | None = None) -> Operation:
        """LayerNorm or RMSNorm of this part of the sequence: y from x; dx from x and dy. Keeps x."""
        width = self.spec.hidden_size if width is None else width
        size = self.num_tokens * width * self.element_bytes / self.num_parts
        num_parameters = width * (2 if self.spec.norm == "layernorm" else 1)
        passes = 1 if self.fused or self.spec.norm == "layernorm" or not self.spec.gated_mlp else EAGER_NORM_PASSES
        return self.elementwise(
            name, forward=2 * passes * size, backward=3 * passes * size, saved=size, num_parameters=num_parameters
        )

    def residual(self, name: str) -> Operation:
        """The sum with the residual after dropout; in B two gradients are summed. Keeps the mask."""
        size = self.shard_bytes
        if not self.has_dropout:
            return self.elementwise(name, forward=3 * size, backward=3 * size)
        mask = size / self.element_bytes  # one byte per element
        return self.elementwise(name, forward=3 * size + mask, backward=5 * size + mask, saved=mask)

    def gather(self, num_bytes: float | None = None) -> Operation:
        """Before a product whose columns are split: all-gather along the sequence in F, reduce-scatter in B.

        Without sequence parallelism nothing in F, and an all-reduce in B. W of the product waits for neither.
        """
        size = self.hidden_bytes if num_bytes is None else num_bytes
        if self.variant.tp == 1:
            return Operation("gather", forward_launches=0, backward_launches=0)
        if not self.variant.sequence_parallel:
            back_us = self.machine.all_reduce_us(size)
            return Operation(
                "all-reduce", backward_us=back_us, backward_sent_us=back_us, hideable_us=back_us, forward_launches=0
            )
        time_us = self.machine.gather_us(size)
        return Operation(
            "gather",
            forward_us=time_us,
            backward_us=time_us,
            forward_sent_us=time_us,
            backward_sent_us=time_us,
            hideable_us=time_us,
        )

    def scatter(self, num_bytes: float | None = None) -> Operation:
        """After a product whose rows are split: reduce-scatter along the sequence in F, all-gather in B.

        Without sequence parallelism an all-reduce in F, and nothing in B.
        """
        size = self.hidden_bytes if num_bytes is None else num_bytes
        if self.variant.tp == 1:
            return Operation("scatter", forward_launches=0, backward_launches=0)
        if not self.variant.sequence_parallel:
            time_us = self.machine.all_reduce_us(size)
            return Operation("all-reduce", forward_us=time_us, forward_sent_us=time_us, backward_launches=0)
        time_us = self.machine.gather_us(size)
        return Operation(
            "scatter", forward_us=time_us, backward_us=time_us, forward_sent_us=time_us, backward_sent_us=time_us
        )

    def activation(self, name: str, width: float, rows: float) -> Operation:
        """GeLU of `width` values per row, or silu(gate) · up of two times as many. Keeps what it read."""
        size = rows * width * self.element_bytes
        read = 2 * size if self.spec.gated_mlp else size
        again = 0 if self.fused or not self.spec.gated_mlp else 2 * size  # silu's result, written and read
        return self.elementwise(
            name, forward=read + size + again, backward=2 * read + size + 2 * again, saved=read, transient=read + size
        )

    def attention(self, qk_dim: int, value_dim: int, kv_heads: int) -> Operation:
        """softmax(Q Kᵀ) V, causal, for the heads of this device; without weights, so all of it is F and B.

        Flash attention computes the scores on and under the diagonal, in blocks. Keeps Q, K and V; the
        output is kept by the projection that reads it.
        """
        tokens, length, size = self.num_tokens, self.variant.sequence_length, self.element_bytes
        inputs = tokens * (self.heads * qk_dim + kv_heads * (qk_dim + value_dim)) * size
        output = tokens * self.heads * value_dim * size
        ring = tokens * kv_heads * (qk_dim + value_dim) * size if self.variant.cp > 1 else 0.0
        if self.attention_kernel == "unfused":
            return self._unfused_attention(qk_dim, value_dim, inputs, output, ring)
        scores_per_row = (length + min(length, CAUSAL_BLOCK)) / 2
        flops = 2.0 * tokens * self.heads * (qk_dim + value_dim) * scores_per_row
        backward_flops = FLASH_BACKWARD_FACTOR * flops
        head_dim, moved = (qk_dim + value_dim) / 2, inputs + output
        version = {"flash-1": 1, "flash-2": 2}.get(self.attention_kernel, 3)
        statistics = tokens * self.heads * ROW_STATISTIC_BYTES
        copied_us, copied_back_us = (
            self.machine.memory_us(passes * output) if version == 1 else 0.0 for passes in FLASH_1_PASSES
        )
        return Operation(
            "attention",
            forward_us=self.machine.flash_attention_us(flops, head_dim, moved, version=version) + copied_us,
            backward_us=self.machine.flash_attention_us(
                backward_flops, head_dim, 2 * moved + output, version=version, back=True
            )
            + copied_back_us,
            forward_flops=flops,
            backward_flops=backward_flops,
            saved_bytes=inputs + statistics,
            core_bytes=statistics,
            transient_bytes=moved,
            ring_bytes=ring,
        )

    def _unfused_attention(self, qk_dim: int, value_dim: int, inputs: float, output: float, ring: float) -> Operation:
        """As before flash attention: all scores computed, then masked; softmax and dropout in memory."""
        machine, length, size = self.machine, self.variant.sequence_length, self.element_bytes
        groups, rows = self.variant.micro_batch_size * self.heads, length // self.variant.cp
        scores = float(groups * rows * length)
        mask, dropped = (scores, 2 * scores * size) if self.has_dropout else (0.0, 0.0)
        aligned = qk_dim % ALIGNMENT == 0 and value_dim % ALIGNMENT == 0

        def product_us(columns: int, depth: int) -> float:
            return machine.matmul_us(rows, columns, depth, groups=groups, wide=True, tensor_cores=aligned)

        to_scores_us, to_values_us = product_us(length, qk_dim), product_us(value_dim, length)
        score_gradient_us, qk_gradient_us = product_us(length, value_dim), product_us(qk_dim, length)
        softmax_us = machine.memory_us(2 * scores * size + dropped + mask)
        softmax_gradient_us = machine.memory_us(3 * scores * size + dropped + mask)
        copied_us = machine.memory_us(2 * output)  # heads of the output laid side by side again
        flops = 2.0 * scores * (qk_dim + value_dim)
        core = scores * size * (2 if self.has_dropout else 1) + mask
        return Operation(
            "attention",
            forward_us=to_scores_us + softmax_us + to_values_us + copied_us,
            backward_us=to_values_us
            + score_gradient_us
            + softmax_gradient_us
            + 2 * qk_gradient_us
            + copied_us
            + machine.memory_us(2 * inputs),
            forward_flops=flops,
            backward_flops=2 * flops,
            saved_bytes=inputs + core,
            core_bytes=core,
            transient_bytes=inputs + output + 2 * scores * size,
            forward_launches=6,
            backward_launches=8,
            ring_bytes=ring,
        )
