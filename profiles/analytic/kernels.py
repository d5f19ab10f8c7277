"""How long one kernel takes: matrix products, attention, memory traffic and tensor-parallel collectives.

Everything is closed form in the shape of the kernel and the `DeviceSpec`. The constants below describe
how far a kernel stays behind what the device reaches on large shapes; each is a length, an area or a time with a
meaning, the same for every model and every device of a kind (docs/price_model.md lists them with their sources).
"""

from dataclasses import dataclass
from math import ceil

from profiles.cluster import DeviceSpec
from profiles.collectives import Fabric, Span
from profiles.errors import ProfileError
from profiles.model import BYTES_PER_ELEMENT, Dtype

TILES = ((256, 128, 1.0), (128, 128, 0.98), (128, 64, 0.65), (64, 64, 0.45))
"""Tiles a matrix product may be cut into: rows, columns, and the share of a multiprocessor's rate that one reaches.

A tile of r × c needs r + c words of its factors per r · c products, so smaller ones wait for shared memory more.
"""

TILE_PASSES = 2
"""Passes over a tile's worth of memory, at memory speed, during which the multipliers wait.

One to write the tile's result and one to fetch the first operands of the next. A faster multiplier on
the same memory loses more to this: it is what keeps H100 layers further below peak than A100 layers.
"""

SUSTAINED = 0.94
"""Share of the best rate of a matrix product, found by running one shape alone, that is left while a model trains.

Clocks fall when every part of the device is busy for hours, and matrices come cold from memory.
"""

CACHED_BYTES = 20e6
"""What one kernel leaves in the L2 cache for the next: half of the 40 MB of an A100."""

CACHE_SPEED = 2.5
"""Bandwidth of the L2 cache over that of memory, as kernels reach it."""

FLOAT8_SHARE = 0.92
"""What an 8-bit product reaches of its peak, against what a 16-bit one reaches of its own.

Mean over H100, GH200, B200, B300 and GB200 of the best products found (ml-engineering, accelerator page): 0.88 to 0.99.
"""

SOFTMAX_HEAD_DIM = 48
"""Head size whose two matrix products take as long as the softmax that flash attention does between them.

The exponentials cost the same per score whatever the head size, so the rate goes as d / (d + this).
FlashAttention-3 on H100 (arXiv 2407.08608, figure 5, no mask, 16k tokens) reaches 648 TFLOP/s with heads of
128 and 756 with heads of 256: a ratio of 1.17, which 48 reproduces within 1 %.
"""

FLASH_1_SHARE = 0.38
"""Share of the peak that the first FlashAttention reached, whatever the head size.

Fitted on the A100 runs of llm-foundry with 16k to 64k tokens; arXiv 2307.08691, section 1, says 25 to 40 %.
"""

FLASH_BACKWARD_SHARE = 0.73
"""What the backward of flash attention reaches of the rate of its forward.

Arithmetic mean of FlashAttention-2 on A100 (arXiv 2307.08691, figures 5 and 6) and FlashAttention-3 on H100.
"""

FLASH_2_SHARE = 0.6
"""What FlashAttention-2 reaches on Hopper and Blackwell of what kernels written for them do.

It uses the older matrix instructions; about 350 to 400 TFLOP/s on H100 (arXiv 2407.08608, section 1: 35 % of peak).
"""

AFTER_AMPERE = ("h100", "h200", "h800", "gh200", "b200", "b300", "gb200")

CAUSAL_BLOCK = 128
"""Rows and columns of the score blocks of flash attention; those on the diagonal are computed whole."""

ALIGNMENT = 8
"""Products of heads whose size is no multiple of this do not run on tensor cores, but at the float32 rate.

NVIDIA's matrix multiplication guide, for 16-bit elements; sweeps of head sizes before BLOOM show it.
"""


UNALIGNED_SHARE = 0.33
"""What a product of a linear layer reaches when rows of a factor do not begin at a multiple of 16 bytes.

Fitted on one-node runs whose vocabulary of 50257 is not padded: the head takes three times as long.
"""


@dataclass(frozen=True)
class Machine:
    """One device computing in one dtype, as one of a tensor-parallel group."""

    device: DeviceSpec
    dtype: Dtype
    fabric: Fabric
    span: Span  # of the tensor-parallel group

    def __post_init__(self) -> None:
        if self.dtype not in self.device.peak_flops:
            known = ", ".join(sorted(self.device.peak_flops))
            raise ProfileError(
                f"device {self.device.name!r} has no peak FLOP/s for dtype {self.dtype!r}, only for {known}; "
                f"choose one of these or add {self.dtype!r} to the device's peak_flops"
            )

    @property
    def element_bytes(self) -> int:
        """Bytes of one element of an activation or a weight."""
        return BYTES_PER_ELEMENT[self.dtype]

    @property
    def wide_dtype(self) -> Dtype:
        """What is computed in outside the products of linear layers."""
        return "bfloat16" if self.dtype == "float8" else self.dtype

    def flops_per_us(self, dtype: Dtype) -> float:
        """What large matrix products reach in training, in FLOP/µs."""
        share = self.device.matmul_efficiency * SUSTAINED * (FLOAT8_SHARE if dtype == "float8" else 1.0)
        return self.device.peak_flops[dtype] * share / 1e6

    @property
    def bytes_per_us(self) -> float:
        """What large elementwise kernels reach, in bytes/µs."""
        return self.device.memory_bandwidth_bytes_per_s * self.device.memory_efficiency / 1e6

    @property
    def slots(self) -> int:
        """Tiles that are computed at a time; 0 where products are not cut into tiles."""
        return self.device.num_multiprocessors if self.device.kind != "cpu" else 0

    def matmul_us(
        self,
        rows: float,
        columns: float,
        depth: float,
        *,
        groups: int = 1,
        wide: bool = False,
        tensor_cores: bool = True,
        aligned: bool = True,
    ) -> float:
        """`groups` products (rows × depth) · (depth × columns) in one launch, in µs.

        Cut into the tiles that take least: whole rounds of one tile per multiprocessor, each 2 · depth FLOPs
        per element at the rate of large products and `TILE_PASSES` passes at memory speed; or the time to
        move both factors and the result once, if that is longer. `wide`: not in 8 bits even where linear layers are.
        Not `aligned`: at `UNALIGNED_SHARE` of the rate.
        """
        pass_us = self.element_bytes / self.bytes_per_us
        rate = self.flops_per_us(self.wide_dtype if wide else self.dtype)
        if not tensor_cores and "float32" in self.device.peak_flops:
            rate = min(rate, self.device.peak_flops["float32"] / 1e6)
        if not aligned and self.slots:
            rate *= UNALIGNED_SHARE
        per_element_us = 2 * depth / rate + TILE_PASSES * pass_us
        moved = groups * (rows * depth + depth * columns + rows * columns)
        compute_us = self._area(rows, columns, groups) * per_element_us
        return self.device.kernel_launch_us + max(compute_us, moved * pass_us)

    def _area(self, rows: float, columns: float, groups: int) -> float:
        """Elements of the result that are computed in the same time, idle places of tiles and rounds included."""
        if not self.slots:
            return rows * columns * groups
        best = float("inf")
        for height, width, share in TILES:
            for tall, wide in ((height, width), (width, height)):
                tiles = ceil(rows / tall) * ceil(columns / wide) * groups
                rounds = ceil(tiles / self.slots)
                best = min(best, rounds * self.slots * tall * wide / share)
        return best

    def flash_attention_us(
        self, flops: float, head_dim: float, num_bytes: float, *, version: int = 3, back: bool = False
    ) -> float:
        """Flash attention of this many FLOPs over heads of this size, moving `num_bytes`, in µs."""
        rate = self.flops_per_us(self.wide_dtype) / (1 + SOFTMAX_HEAD_DIM / head_dim)
        if version == 1:
            rate = self.device.peak_flops[self.wide_dtype] * FLASH_1_SHARE / 1e6
        elif version == 2 and self.device.name.startswith(AFTER_AMPERE):
            rate *= FLASH_2_SHARE
        compute_us = flops / (rate * (FLASH_BACKWARD_SHARE if back else 1.0))
        return self.device.kernel_launch_us + max(compute_us, num_bytes / self.bytes_per_us)

    def memory_us(self, num_bytes: float) -> float:
        """One kernel that only moves data: `num_bytes` read and written in total, in µs.

        As much of it as the cache holds was left there by the kernel before.
        """
        cached = min(num_bytes, CACHED_BYTES) if self.device.kind != "cpu" else 0.0
        return self.device.kernel_launch_us + (num_bytes - cached + cached / CACHE_SPEED) / self.bytes_per_us

    def gather_us(self, num_bytes: float) -> float:
        """All-gather, or reduce-scatter, of `num_bytes` in total over the tensor-parallel peers, in µs."""
        return self.fabric.gather_us(num_bytes, self.span)

    def all_reduce_us(self, num_bytes: float) -> float:
        """All-reduce of `num_bytes` over the tensor-parallel peers, in µs."""
        return self.fabric.all_reduce_us(num_bytes, self.span)
