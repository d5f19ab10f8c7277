"""What a candidate is made of: its layers under each choice of recomputation, groups, traffic, memory, and its floor.

`CandidateCosts` knows the job and its machines; it holds no search state, so equal questions get equal answers.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from planner.cost import least_back_us, least_work_us, slowest_group, smallest_device
from planner.floor import LayerFloor, StepFloor, total
from planner.layout import Candidate
from planner.memory import bucket_bytes, buffer_bytes, capacity_bytes, model_state_bytes
from planner.plans import Precision
from planner.topology import kind_of_rank
from planner.traffic import (
    Spans,
    StepTraffic,
    boundary_us,
    optimizer_us,
    sharded_layers,
    step_overhead_us,
    step_traffic,
)
from profiles.cluster import Cluster
from profiles.collectives import Fabric
from profiles.model import BYTES_PER_ELEMENT, Dtype, LayerProfile, ModelProfile, Recompute

_NUM_ROUNDED = 6  # numbers of bytes that a rank rounds: weights, gradients, optimizer, of dense layers and experts


@dataclass(frozen=True)
class Job:
    """What is to be trained where.

    `profiles` are of every node group of the cluster in turn, or one for all of them.
    """

    profiles: tuple[ModelProfile, ...]
    cluster: Cluster
    global_batch_size: int
    sequence_length: int
    precision: Precision
    overlaps: bool = True  # data-parallel traffic with computing

    def __post_init__(self) -> None:
        if len(self.profiles) not in (1, len(self.cluster.groups)):
            raise ValueError(f"{len(self.profiles)} profiles for {len(self.cluster.groups)} node groups")

    @property
    def profile(self) -> ModelProfile:
        """The profile of the slowest devices."""
        if len(self.profiles) == 1:
            return self.profiles[0]
        return self.profiles[self.cluster.groups.index(slowest_group(self.cluster, self.dtype))]

    @property
    def dtype(self) -> Dtype:
        """What it computes in."""
        return self.precision.compute


@dataclass(frozen=True)
class LayerOptions:
    """Every layer of a candidate under each choice of recomputation; the first choice takes the least time."""

    choices: tuple[Recompute, ...]
    layers: tuple[tuple[LayerProfile, ...], ...]  # shape (choices, L)

    @property
    def base(self) -> tuple[LayerProfile, ...]:
        """The layers under the first choice."""
        return self.layers[0]

    @cached_property
    def parameter_bytes(self) -> int:
        """Weights of all layers, on one device."""
        return sum(layer.parameter_bytes for layer in self.base)

    @cached_property
    def expert_parameter_bytes(self) -> int:
        """Of these, experts."""
        return sum(layer.expert_parameter_bytes for layer in self.base)

    @cached_property
    def least_activation_bytes(self) -> int:
        """What one microbatch keeps in all layers under the choices that keep least."""
        return sum(min(layer.activation_bytes for layer in same) for same in zip(*self.layers, strict=True))

    @cached_property
    def least_output_bytes(self) -> int:
        """The smallest boundary tensor."""
        return min((layer.output_bytes for layer in self.base[:-1]), default=0)

    @cached_property
    def least_temporary_bytes(self) -> int:
        """The least that any layer needs while it runs."""
        return min(layer.temporary_bytes for layers in self.layers for layer in layers)

    @cached_property
    def least_parameter_bytes(self) -> int:
        """The smallest layer's weights."""
        return min(layer.parameter_bytes for layer in self.base)

    @cached_property
    def boundary_bytes(self) -> int:
        """The largest."""
        return max((layer.output_bytes for layer in self.base[:-1]), default=0)

    def chosen(self, choices: Sequence[int] | None) -> tuple[LayerProfile, ...]:
        """Each layer under its choice; None is the first for all."""
        if choices is None:
            return self.base
        return tuple(self.layers[choice][index] for index, choice in enumerate(choices))


class CandidateCosts:
    """Answers what candidates of one job cost, part by part."""

    def __init__(self, job: Job, spans: Mapping[tuple[int, ...], Spans] | None = None) -> None:
        """`spans`: how the groups of some candidates lie, by `span_key`, where that is not the usual order."""
        self.job = job
        links = job.profile.links if job.cluster.num_nodes == 1 else None
        self.fabric = (
            Fabric.of(job.cluster)
            if links is None
            else Fabric((job.cluster.num_devices, 1), (links.all_reduce, links.all_reduce))
        )
        self._point_to_point = None if links is None else links.point_to_point
        self.capacity_bytes = capacity_bytes(smallest_device(job.cluster))
        self._kinds: dict[int, tuple[tuple[int, ...], list[int]]] = {}
        self.known_variants = frozenset(job.profile.variants)
        self._options: dict[tuple[tuple[object, ...], int | None, bool], LayerOptions] = {}
        self._floors: dict[tuple[int, ...], tuple[tuple[LayerFloor, ...], LayerFloor]] = {}
        self._traffic: dict[tuple[object, ...], StepTraffic] = {}
        self._spans: dict[tuple[int, ...], Spans] = dict(spans or {})

    def group_of_rank(self, candidate: Candidate) -> tuple[int, ...]:
        """The node group of every pipeline rank, devices taken in order, shape (pp,); of several, the slowest."""
        return self._kinds_and_rooms(candidate)[0]

    def capacities(self, candidate: Candidate) -> list[int]:
        """What a process of each pipeline rank may use, in bytes, shape (pp,)."""
        return self._kinds_and_rooms(candidate)[1]

    def _kinds_and_rooms(self, candidate: Candidate) -> tuple[tuple[int, ...], list[int]]:
        if candidate.pp not in self._kinds:
            cluster, dtype = self.job.cluster, self.job.dtype
            rates = [g.device.peak_flops.get(dtype, 0.0) * g.device.matmul_efficiency for g in cluster.groups]
            rooms = [capacity_bytes(group.device) for group in cluster.groups]
            slowest, smallest = (
                kind_of_rank(candidate, cluster, range(cluster.num_devices), least) for least in (rates, rooms)
            )
            self._kinds[candidate.pp] = slowest, [rooms[group] for group in smallest]
        return self._kinds[candidate.pp]

    def _speeds(self, candidate: Candidate) -> tuple[tuple[float, ...], int]:
        """How fast the devices of each rank are against the fastest group (at most 1), and which group that is."""
        if len(self.job.profiles) == 1:
            return (1.0,) * candidate.pp, 0
        all_options = [self.options(candidate, group).base for group in range(len(self.job.profiles))]
        fastest = min(range(len(all_options)), key=lambda group: sum(map(least_work_us, all_options[group])))
        speed = [
            min(1.0, max(least_work_us(f) / least_work_us(o) for f, o in zip(all_options[fastest], own, strict=True)))
            for own in all_options
        ]
        return tuple(speed[group] for group in self.group_of_rank(candidate)), fastest

    def choices(self, candidate: Candidate) -> tuple[Recompute, ...]:
        """What its layers may recompute, as far as the profile knows."""
        return tuple(
            choice
            for choice in candidate.recompute_choices()
            if candidate.variant(self.job.sequence_length, self.job.dtype, choice) in self.known_variants
        )

    def options(self, candidate: Candidate, group: int | None = None) -> LayerOptions:
        """The costs of every layer, in order, under each choice, on the slowest devices or those of one node group."""
        c = candidate
        shared = self.job.profile.model.tied_embeddings and (c.pp == 1 or c.virtual_stages > 1)
        layer: tuple[object, ...] = (c.tp, c.micro_batch_size, c.recompute, c.sequence_parallel)
        if c.zero_stage >= 2 or c.ep * c.cp > 1:  # else nothing is sent that depends on the rest
            layer += (c.pp, c.dp, c.zero_stage, c.cp, c.ep, c.shard_degree)
        key = layer, group, shared
        if key not in self._options:
            job, spans = self.job, self.spans(candidate)
            profile = job.profile if group is None else job.profiles[group]
            names = self.choices(candidate)
            layers = []
            for name in names:
                own = profile.at(candidate.variant(job.sequence_length, job.dtype, name))
                if shared:
                    own[-1] = self._without_matrix(own[-1])
                layers.append(sharded_layers(own, candidate, self.fabric, spans, job.precision, overlaps=job.overlaps))
            self._options[key] = LayerOptions(names, tuple(layers))
        return self._options[key]

    def _without_matrix(self, head: LayerProfile) -> LayerProfile:
        """A tied head beside the embedding, on the same device: the matrix is there already."""
        spec = self.job.profile.model
        norm = spec.hidden_size * BYTES_PER_ELEMENT[self.job.dtype] * (2 if spec.norm == "layernorm" else 1)
        left = min(norm, head.parameter_bytes)
        share = left / head.parameter_bytes if head.parameter_bytes else 1.0
        return head.model_copy(update={"parameter_bytes": left, "optimizer_us": head.optimizer_us * share})

    def spans(self, candidate: Candidate) -> Spans:
        """How its groups lie: devices in order, unless told otherwise."""
        key = span_key(candidate)
        if key not in self._spans:
            self._spans[key] = Spans.packed(candidate, self.fabric)
        return self._spans[key]

    def traffic(self, candidate: Candidate) -> StepTraffic:
        """What it sends once per step."""
        key = (*candidate.degrees, candidate.zero_stage, candidate.shard_degree)
        if key not in self._traffic:
            self._traffic[key] = step_traffic(
                candidate,
                self.fabric,
                self.spans(candidate),
                self.job.precision,
                overlaps=self.job.overlaps,
                overhead_us=self.overhead_us(candidate),
            )
        return self._traffic[key]

    def transfer_us(self, candidate: Candidate, num_bytes: int) -> float:
        """From one pipeline rank to the next."""
        if self._point_to_point is not None:
            return self._point_to_point.transfer_us(num_bytes)
        return boundary_us(num_bytes, candidate, self.fabric, self.spans(candidate))

    def overhead_us(self, candidate: Candidate) -> float:
        """What every step takes beside all that is priced; nothing where costs were measured on the machine itself."""
        return 0.0 if self.job.profile.origin.kind == "measured" else step_overhead_us(candidate)

    # bounds

    def floor(self, candidate: Candidate) -> StepFloor:
        """A lower bound on every step time of this candidate."""
        speeds, fastest = self._speeds(candidate)
        options = self.options(candidate, fastest if len(self.job.profiles) > 1 else None)
        beside = self._least_beside_bytes(candidate, options)
        room = sum(self.capacities(candidate)) - candidate.pp * beside - self.all_states_bytes(candidate)
        hop_us = self.transfer_us(candidate, options.least_output_bytes)
        layers, totals = self._layer_floors(candidate, options)
        return StepFloor(
            layers=layers,
            totals=totals,
            candidate=candidate,
            traffic=self.traffic(candidate),
            speeds=speeds,
            hop_us=hop_us if candidate.pp > 1 else 0.0,
            capacity_bytes=max(self.capacities(candidate)) - beside,
            room_bytes=max(1, room),
        )

    def _least_beside_bytes(self, candidate: Candidate, options: LayerOptions) -> int:
        """What every device of a pipeline takes at least beside model states and activations."""
        parameters = options.least_parameter_bytes // BYTES_PER_ELEMENT[self.job.dtype]
        buckets = bucket_bytes(parameters, candidate, self.job.precision)
        boundaries = buffer_bytes(options.least_output_bytes, 1) if candidate.pp > 1 else 0
        return options.least_temporary_bytes + boundaries + buckets

    def _layer_floors(self, candidate: Candidate, options: LayerOptions) -> tuple[tuple[LayerFloor, ...], LayerFloor]:
        key = id(options), candidate.zero_stage, candidate.shard_degree, candidate.dp * candidate.cp
        if key not in self._floors:  # options are kept as long as this pricer
            states: dict[int, int] = {}
            for layer in options.base:
                if id(layer) not in states:
                    states[id(layer)] = self.states_bytes(candidate, [layer])
            layers = _layer_floors(options, self.job.dtype, states)
            self._floors[key] = layers, total(layers)
        return self._floors[key]

    def states_bytes(self, candidate: Candidate, layers: Sequence[LayerProfile]) -> int:
        """Weights, gradients and optimizer state of these layers on one device."""
        parameters = sum(layer.parameter_bytes for layer in layers)
        experts = sum(layer.expert_parameter_bytes for layer in layers)
        return sum(model_state_bytes(parameters, experts, candidate, self.job.precision))

    def all_states_bytes(self, candidate: Candidate) -> int:
        """The same of all layers, at least: on every rank, shards that do not divide are rounded down."""
        options = self.options(candidate)
        parameters, experts = options.parameter_bytes, options.expert_parameter_bytes
        whole = sum(model_state_bytes(parameters, experts, candidate, self.job.precision))
        return max(0, whole - _NUM_ROUNDED * candidate.pp)

    def least_bytes(self, candidate: Candidate) -> int:
        """What all ranks of a replica together hold at least: model states and one microbatch."""
        return self.all_states_bytes(candidate) + self.options(candidate).least_activation_bytes

    def step_times_us(
        self, candidate: Candidate, layers: Sequence[LayerProfile], splits_backward: bool
    ) -> tuple[int, ...]:
        """What every layer adds to its rank's step: all microbatches, traffic that shows, optimizer; whole µs."""
        m, traffic, size = candidate.num_microbatches, self.traffic(candidate), BYTES_PER_ELEMENT[self.job.dtype]
        made: dict[int, int] = {}
        for layer in layers:
            if id(layer) not in made:
                experts = layer.expert_parameter_bytes / size
                busy = traffic.busy_us(layer.parameter_bytes / size - experts, experts)
                hidden = traffic.hidden_us(layer.forward_us, layer.fused_backward_us)
                shown = max(traffic.shown_share * busy, busy - hidden)
                after = shown + optimizer_us(layer.optimizer_us, candidate)
                made[id(layer)] = round(m * work_us(layer, splits_backward) + after)
        return tuple(made[id(layer)] for layer in layers)


def span_key(candidate: Candidate) -> tuple[int, ...]:
    """What decides how a candidate's groups may lie."""
    return (*candidate.degrees, candidate.shard_degree)


def _layer_floors(options: LayerOptions, dtype: Dtype, states: Mapping[int, int]) -> tuple[LayerFloor, ...]:
    """What each layer costs at least; layers that repeat are worked out once. `states`: bytes by id of a base layer."""
    size, made = BYTES_PER_ELEMENT[dtype], dict[tuple[int, ...], LayerFloor]()
    floors = []
    for same in zip(*options.layers, strict=True):
        base, key = same[0], tuple(map(id, same))
        if key not in made:
            experts = base.expert_parameter_bytes / size
            made[key] = LayerFloor(
                forward_us=min(layer.forward_us for layer in same),
                most_forward_us=max(layer.forward_us for layer in same),
                backward_us=min(min(layer.backward_input_us, layer.fused_backward_us) for layer in same),
                fused_us=min(layer.fused_backward_us for layer in same),
                back_us=min(map(least_back_us, same)),
                work_us=min(layer.forward_us for layer in same) + min(map(least_back_us, same)),
                dense_parameters=base.parameter_bytes / size - experts,
                expert_parameters=experts,
                optimizer_us=base.optimizer_us,
                state_bytes=states[id(base)],
                kept_bytes=_kept_bytes(same),
                hull=_hull([(least_work_us(layer), float(layer.activation_bytes)) for layer in same]),
            )
        floors.append(made[key])
    return tuple(floors)


def _kept_bytes(same: Sequence[LayerProfile]) -> float:
    """The least a layer keeps under choices that save a larger share of its memory than of its F they repeat."""
    base, most_us = same[0], max(layer.forward_us for layer in same)
    least = float(base.activation_bytes)
    for layer in same[1:]:
        saved = 1 - layer.activation_bytes / base.activation_bytes if base.activation_bytes else 0.0
        more_us = least_work_us(layer) - least_work_us(base)
        if more_us < saved * most_us * (1 - 1e-9):
            least = min(least, layer.activation_bytes)
    return least


def _hull(points: Sequence[tuple[float, float]]) -> tuple[tuple[float, float], ...]:
    """The lower left hull of (work, bytes): from the least work on, each step saving less memory per work."""
    hull: list[tuple[float, float]] = []
    for point in sorted(set(points)):
        if hull and point[1] >= hull[-1][1]:
            continue
        while len(hull) > 1 and (hull[-1][1] - point[1]) * (hull[-1][0] - hull[-2][0]) >= (
            hull[-2][1] - hull[-1][1]
        ) * (point[0] - hull[-1][0]):
            hull.pop()
        hull.append(point)
    return tuple(hull)


def work_us(layer: LayerProfile, splits_backward: bool) -> float:
    """F and the backward of one microbatch, apart where it may be split."""
    if splits_backward and layer.variant.recompute == "none":
        return layer.forward_us + layer.backward_input_us + layer.backward_weight_us
    return layer.forward_us + layer.fused_backward_us
