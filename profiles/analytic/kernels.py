"""How long one kernel takes: matrix products, attention, memory traffic and tensor-parallel collectives.

Everything is closed form in the shape of the kernel and the `DeviceSpec`. The constants below describe
how far a kernel stays behind what the device reaches on large shapes; each is a length or an area with a
meaning, the same for every model and every device of a kind.
"""

from dataclasses import dataclass

from profiles.cluster import DeviceSpec, Link
from profiles.errors import ProfileError
from profiles.model import BYTES_PER_ELEMENT, Dtype

HALF_WAVE_ELEMENTS = {"cuda": 128 * 256 * 108 // 2, "rocm": 128 * 256 * 108 // 2, "cpu": 0}
"""Elements of the result that are idle in the last wave, on average, by kind of device.

A matrix product cuts its result into tiles, one per multiprocessor at a time; the last round is on
average half full. The tile (128 × 256) and the number of multiprocessors (108) are the A100's; most other
GPUs are within a factor of two of that. A CPU has too few cores for it to show.
"""

TILE_PASSES = 2
"""Passes over a tile's worth of memory, at memory speed, during which the multipliers wait.

One to write the tile's result and one to fetch the first operands of the next. A faster multiplier on
the same memory loses more to this: it is what keeps H100 layers further below peak than A100 layers.
"""

SOFTMAX_HEAD_DIM = 48
"""Head size whose two matrix products take as long as the softmax that flash attention does between them.

The exponentials cost the same per score whatever the head size, so the rate goes as d / (d + this).
FlashAttention-3 on H100 (arXiv 2407.08608, figure 5, no mask, 16k tokens) reaches 648 TFLOP/s with heads of
128 and 756 with heads of 256: a ratio of 1.17, which 48 reproduces within 1 %.
"""

CAUSAL_BLOCK = 128
"""Rows and columns of the score blocks of flash attention; those on the diagonal are computed whole."""


@dataclass(frozen=True)
class Machine:
    """One device computing in one dtype, as one of `tp` tensor-parallel peers."""

    device: DeviceSpec
    dtype: Dtype
    tp: int
    tp_link: Link

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
    def flops_per_us(self) -> float:
        """What large matrix products reach, in FLOP/µs."""
        return self.device.peak_flops[self.dtype] * self.device.matmul_efficiency / 1e6

    @property
    def bytes_per_us(self) -> float:
        """What large elementwise kernels reach, in bytes/µs."""
        return self.device.memory_bandwidth_bytes_per_s * self.device.memory_efficiency / 1e6

    def matmul_us(self, rows: float, columns: float, depth: float, *, groups: int = 1) -> float:
        """`groups` products (rows × depth) · (depth × columns) in one launch, in µs.

        Per element of the result, 2 · depth FLOPs at the rate of large products and `TILE_PASSES` passes
        at memory speed, for all elements and half a wave more; or the time to move both factors and the
        result once, if that is longer.
        """
        area = rows * columns * groups + HALF_WAVE_ELEMENTS[self.device.kind]
        pass_us = self.element_bytes / self.bytes_per_us
        compute_us = area * (2 * depth / self.flops_per_us + TILE_PASSES * pass_us)
        moved = groups * (rows * depth + depth * columns + rows * columns)
        return self.device.kernel_launch_us + max(compute_us, moved * pass_us)

    def flash_attention_us(self, flops: float, head_dim: float, num_bytes: float) -> float:
        """Flash attention of this many FLOPs over heads of this size, moving `num_bytes`, in µs."""
        compute_us = flops / self.flops_per_us * (1 + SOFTMAX_HEAD_DIM / head_dim)
        return self.device.kernel_launch_us + max(compute_us, num_bytes / self.bytes_per_us)

    def memory_us(self, num_bytes: float) -> float:
        """One kernel that only moves data: `num_bytes` read and written in total, in µs."""
        return self.device.kernel_launch_us + num_bytes / self.bytes_per_us

    def gather_us(self, num_bytes: float) -> float:
        """All-gather, or reduce-scatter, of `num_bytes` in total over the tensor-parallel peers, in µs."""
        return self.tp_link.reduce_scatter_us(num_bytes, self.tp)

    def all_reduce_us(self, num_bytes: float) -> float:
        """All-reduce of `num_bytes` over the tensor-parallel peers, in µs."""
        return self.tp_link.all_reduce_us(num_bytes, self.tp)
