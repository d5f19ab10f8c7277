import itertools

import pytest
import torch
from torch import Tensor, nn

from profiles.errors import ProfileError
from profiles.measure.layers import ProfiledLayer, measure_model
from profiles.measure.memory import recording_memory
from profiles.measure.split_backward import storage_bytes
from profiles.model import LayerGroup, Variant

FLOAT = 4
ROWS, WIDTH, HIDDEN, CLASSES = 6, 8, 12, 10
CPU = torch.device("cpu")


def variants(sizes=(1,), recompute=("none",)) -> list[Variant]:
    return [
        Variant(micro_batch_size=size, sequence_length=ROWS, dtype="float32", recompute=mode)
        for mode, size in itertools.product(recompute, sizes)
    ]


def make_batch(micro_batch_size: int) -> tuple[Tensor, Tensor]:
    rows = ROWS * micro_batch_size
    return torch.randn(2 * rows, WIDTH)[:rows], torch.arange(rows) % CLASSES  # inputs: half of a larger storage


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    return nn.functional.cross_entropy(logits, targets)


def measure(*modules: nn.Module, **options) -> tuple[LayerGroup, ...]:
    kinds = ["embedding", *["block"] * (len(modules) - 2), "head"]
    layers = [
        ProfiledLayer(f"layer {index}", kind, module)
        for index, (kind, module) in enumerate(zip(kinds, modules, strict=True))
    ]
    options = {"variants": variants(), "device": CPU, "warmups": 0, "repeats": 2, **options}
    return measure_model(layers, make_batch, cross_entropy, **options)


def test_bytes_of_a_linear_are_its_input_and_its_output_gradient():
    linear = nn.Linear(WIDTH, HIDDEN)
    _, group, _ = measure(nn.Linear(WIDTH, WIDTH), linear, nn.Linear(HIDDEN, CLASSES))
    profile = group.profiles[0]
    assert profile.parameter_bytes == (WIDTH + 1) * HIDDEN * FLOAT
    assert profile.activation_bytes == ROWS * WIDTH * FLOAT
    assert profile.weight_activation_bytes == ROWS * (WIDTH + HIDDEN) * FLOAT
    assert profile.output_bytes == ROWS * HIDDEN * FLOAT
    # fused: dx, dW and db come together
    assert profile.temporary_bytes == (ROWS * WIDTH + (WIDTH + 1) * HIDDEN) * FLOAT


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.inner = nn.Linear(WIDTH, HIDDEN)
        self.outer = nn.Linear(HIDDEN, WIDTH)
        self.register_buffer("scale", torch.ones(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.outer(torch.nn.functional.gelu(self.inner(self.norm(x)))) * self.scale


def test_bytes_of_a_block_add_up_by_hand():
    _, group, _ = measure(nn.Linear(WIDTH, WIDTH), Block(), nn.Linear(WIDTH, CLASSES))
    profile = group.profiles[0]
    norm = ROWS * (WIDTH + 2) * FLOAT  # its input, mean and inverse deviation
    inner = ROWS * WIDTH * FLOAT  # its input
    gelu = ROWS * HIDDEN * FLOAT  # its input
    outer = ROWS * HIDDEN * FLOAT  # its input; the scale is a buffer, and asks for no product
    assert profile.activation_bytes == norm + inner + gelu + outer
    gradients = ROWS * (HIDDEN + WIDTH) * FLOAT
    assert profile.weight_activation_bytes == inner + outer + gradients


def test_bytes_are_what_saved_tensor_hooks_see():
    block = Block()
    _, group, _ = measure(nn.Linear(WIDTH, WIDTH), block, nn.Linear(WIDTH, CLASSES))
    saved: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    x = torch.randn(ROWS, WIDTH, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        output = block(x)
    own = {tensor.untyped_storage().data_ptr() for tensor in [*block.parameters(), *block.buffers()]}
    held = [tensor for tensor in saved if tensor.untyped_storage().data_ptr() not in own]
    assert group.profiles[0].activation_bytes == storage_bytes(held)
    del output


def test_bytes_grow_with_the_micro_batch_and_all_variants_are_there():
    wanted = variants(sizes=(1, 2, 4), recompute=("none", "full"))
    groups = measure(nn.Linear(WIDTH, WIDTH), Block(), nn.Linear(WIDTH, CLASSES), variants=wanted)
    for group in groups:
        assert [profile.variant for profile in group.profiles] == wanted
        for profile in group.profiles:
            assert profile.forward_us > 0
            assert profile.backward_input_us > 0
            assert profile.backward_weight_us > 0
            assert profile.fused_backward_us > 0
            assert profile.optimizer_us > 0
    one, two, four = (profile.activation_bytes for profile in groups[1].profiles[:3])
    assert (two, four) == (2 * one, 4 * one)


def test_recompute_holds_the_input_of_blocks_and_leaves_the_other_layers_alone():
    none, full = variants(recompute=("none", "full"))
    groups = measure(nn.Linear(WIDTH, WIDTH), Block(), nn.Linear(WIDTH, CLASSES), variants=[none, full])
    random_state = torch.get_rng_state().nbytes  # kept so that dropout can be repeated
    block = groups[1]
    assert block.at(full).activation_bytes == ROWS * WIDTH * FLOAT + random_state
    assert block.at(full).weight_activation_bytes == block.at(none).weight_activation_bytes
    assert block.at(full).temporary_bytes > block.at(none).temporary_bytes
    for group in (groups[0], groups[2]):
        assert group.at(full).activation_bytes == group.at(none).activation_bytes


def test_the_last_layer_holds_what_the_loss_needs_and_sends_nothing():
    *_, head = measure(nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, CLASSES))
    profile = head.profiles[0]
    total_weight = FLOAT  # that the mean divides by
    assert profile.activation_bytes == ROWS * (WIDTH + CLASSES) * FLOAT + total_weight
    assert profile.output_bytes == 0


def test_measuring_leaves_parameters_and_drops_gradients():
    modules = [nn.Linear(WIDTH, WIDTH), Block(), nn.Linear(WIDTH, CLASSES)]
    before = [parameter.clone() for module in modules for parameter in module.parameters()]
    measure(*modules)
    after = [parameter for module in modules for parameter in module.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert all(parameter.grad is None for parameter in after)


def test_a_frozen_first_layer_has_no_backward_and_no_optimizer_step():
    frozen = nn.Linear(WIDTH, WIDTH).requires_grad_(False)
    embed, _ = measure(nn.Sequential(nn.Flatten(), frozen), nn.Linear(WIDTH, CLASSES))
    profile = embed.profiles[0]
    assert profile.weight_activation_bytes == 0
    assert profile.optimizer_us == 0


def test_equal_layers_are_measured_once_and_counted():
    layers = [
        ProfiledLayer("in", "embedding", nn.Linear(WIDTH, WIDTH)),
        ProfiledLayer("block", "block", Block(), count=5),
        ProfiledLayer("out", "head", nn.Linear(WIDTH, CLASSES)),
    ]
    groups = measure_model(layers, make_batch, cross_entropy, variants=variants(), device=CPU, warmups=0, repeats=1)
    assert [(group.name, group.kind, group.count) for group in groups] == [
        ("in", "embedding", 1),
        ("block", "block", 5),
        ("out", "head", 1),
    ]


def test_progress_counts_every_run():
    seen = []
    measure(
        nn.Linear(WIDTH, CLASSES),
        nn.Identity(),
        variants=variants(sizes=(1, 2)),
        warmups=1,
        repeats=2,
        on_progress=lambda *step: seen.append(step),
    )
    assert [(done, total) for _, done, total in seen] == [(run, 6) for run in range(6)]
    assert seen[0][0] == "micro_batch_size=1 sequence_length=6 float32"


def test_layers_that_do_not_chain_are_named():
    with pytest.raises(ProfileError, match=r"layer 'layer 1' at micro_batch_size=1 .* cannot be run: .*shapes"):
        measure(nn.Linear(WIDTH, 3), nn.Linear(4, CLASSES))


class Pair(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, x


def test_a_layer_that_returns_no_tensor_is_named():
    with pytest.raises(
        ProfileError, match="layer 'layer 0' returns tuple; wrap it in a module that returns one tensor"
    ):
        measure(Pair(), nn.Linear(WIDTH, CLASSES))


class OutOfMemory(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore")


def test_a_variant_that_does_not_fit_is_named_with_its_layer():
    with pytest.raises(
        ProfileError, match=r"layer 'layer 0' at .* does not fit .* Tried to allocate 2.00 GiB\.; measure"
    ):
        measure(OutOfMemory(), nn.Linear(WIDTH, CLASSES))


def test_at_least_one_repeat_is_asked_for():
    with pytest.raises(ValueError, match="repeats=0"):
        measure(nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, CLASSES), repeats=0)


def test_memory_phases_see_peak_and_what_stays(capfd):
    with recording_memory(CPU) as recorder:
        with recorder.phase("make"):
            kept = torch.ones(100)
            dropped = torch.ones(300)
            del dropped
        with recorder.phase("drop"):
            del kept
    make, drop = recorder.phases["make"], recorder.phases["drop"]
    assert make.end_bytes - make.start_bytes == 400
    assert make.peak_bytes - make.start_bytes == 1600
    assert drop.end_bytes == make.start_bytes
    assert capfd.readouterr().err == ""


@pytest.mark.gpu
def test_bytes_of_a_block_on_cuda_are_those_on_the_cpu_up_to_rounding():
    modules = [nn.Linear(WIDTH, WIDTH), Block(), nn.Linear(WIDTH, CLASSES)]
    cpu = measure(*modules)[1].profiles[0]
    layers = [ProfiledLayer("l", "block", module.cuda()) for module in modules]

    def make_cuda_batch(size: int) -> tuple[Tensor, Tensor]:
        inputs, targets = make_batch(size)
        return inputs.cuda(), targets.cuda()

    groups = measure_model(
        layers,
        make_cuda_batch,
        cross_entropy,
        variants=variants(),
        device=torch.device("cuda", 0),
        warmups=1,
        repeats=2,
    )
    gpu = groups[1].profiles[0]
    assert gpu.weight_activation_bytes == pytest.approx(cpu.weight_activation_bytes, abs=512 * 8)
    assert gpu.activation_bytes == pytest.approx(cpu.activation_bytes, abs=512 * 8)
    assert gpu.forward_us > 0
