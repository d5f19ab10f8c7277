"""A measured profile for people."""

from planner.report.text import facts, grid, render
from profiles.model import ModelProfile


def render_profile(profile: ModelProfile) -> str:
    """What `pipewright profile` prints for people: one row per layer and variant."""
    origin = profile.origin
    rows = [
        ("model", f"{profile.model.name}, {profile.num_layers} layers with embedding and head"),
        ("measured on", f"{origin.device}, {origin.when}"),
        ("how", origin.how),
        ("backward split", _engine_in_words(profile)),
    ]
    if profile.links is not None:
        p2p, reduce = profile.links.point_to_point, profile.links.all_reduce
        rows.append(("point to point", f"{p2p.bandwidth_bytes_per_s / 1e9:.2f} GB/s, {p2p.latency_us:.0f} µs"))
        rows.append(("all-reduce", f"{reduce.bandwidth_bytes_per_s / 1e9:.2f} GB/s, {reduce.latency_us:.0f} µs"))
    measured = []
    for group in profile.layers:
        for costs in group.profiles:
            variant = costs.variant
            recompute = "" if variant.recompute == "none" else f" recompute={variant.recompute}"
            times_us = (
                costs.forward_us,
                costs.backward_input_us,
                costs.backward_weight_us,
                costs.fused_backward_us,
                costs.optimizer_us,
            )
            measured.append(
                [
                    group.name,
                    str(group.count),
                    f"mbs{variant.micro_batch_size}{recompute}",
                    *(f"{us / 1e3:.2f}" for us in times_us),
                    f"{costs.spread:.0%}",
                    f"{costs.activation_bytes / 2**20:.1f}",
                    f"{costs.weight_activation_bytes / 2**20:.1f}",
                ]
            )
    columns = ("layer", "count", "variant", "F", "B", "W", "BW", "optimizer", "spread", "held F–B", "held B–W")
    title = "Per layer (times in ms, sizes in MiB)"
    return render(facts(rows), grid(title, columns, measured, left=("layer", "variant")))


def _engine_in_words(profile: ModelProfile) -> str:
    """Which engine splits the backward, and how much of the weight gradients it leaves to W."""
    variant = profile.variants[0]
    layers = [(group.name, group.count, group.at(variant)) for group in profile.layers]
    engine = profile.origin.engine
    parameters = sum(count * costs.parameter_bytes for _, count, costs in layers)
    if not parameters or any(costs.deferred_parameter_bytes is None for _, _, costs in layers):
        return engine
    deferred = sum(count * (costs.deferred_parameter_bytes or 0) for _, count, costs in layers)
    whole = [name for name, _, costs in layers if costs.parameter_bytes and not costs.deferred_parameter_bytes]
    inside = f"; none of {', '.join(whole)}" if whole else ""
    return f"{engine}, W makes {deferred / parameters:.1%} of the weight gradients{inside}"
