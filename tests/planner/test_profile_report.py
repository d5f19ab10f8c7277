"""What `pipewright profile` prints of the engine that splits the backward."""

import pytest

from planner.report.profile import render_profile
from profiles.measure import profile_bundled
from profiles.measure.models import model_spec_for
from profiles.model import LayerGroup, ModelProfile


@pytest.fixture(scope="module")
def profile():
    spec = model_spec_for("llama", num_layers=2, hidden_size=16, num_heads=2, vocab_size=31, sequence_length=8)
    return profile_bundled("llama", spec, micro_batch_sizes=(1,), repeats=1, warmups=0, num_threads=1, with_links=False)


def text_of(profile: ModelProfile) -> str:
    return " ".join(render_profile(profile).split())


def with_deferred_bytes(profile: ModelProfile, layer: int, size: int | None) -> ModelProfile:
    group = profile.layers[layer]
    costs = group.profiles[0].model_copy(update={"deferred_parameter_bytes": size})
    layers = list(profile.layers)
    layers[layer] = LayerGroup(name=group.name, kind=group.kind, count=group.count, profiles=(costs,))
    return profile.model_copy(update={"layers": tuple(layers)})


def test_it_says_how_much_of_the_weight_gradients_w_makes(profile):
    sizes = [(g.count * g.profiles[0].parameter_bytes, g.count * 2 * 16 * 4) for g in profile.layers]
    norms = sizes[1][1] + 16 * 4  # two in a block, one in the head, float32
    share = 1 - norms / sum(size for size, _ in sizes)
    assert f"backward split deferred-linear, W makes {share:.1%} of the weight gradients" in text_of(profile)


def test_it_names_layers_whose_backward_is_not_split(profile):
    assert "of the weight gradients; none of block" in text_of(with_deferred_bytes(profile, 1, 0))


def test_it_says_no_more_than_a_profile_that_does_not_tell(profile):
    text = text_of(with_deferred_bytes(profile, 1, None))
    assert "backward split deferred-linear" in text
    assert "W makes" not in text
