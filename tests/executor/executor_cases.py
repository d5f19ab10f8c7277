"""Plans, models and schedules that the executor's tests share, in pytest and in the processes it launches."""

import random
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from planner.plans import Certificate, Layout, Plan, Precision, Prediction, Provenance, RankMemory, StageCosts
from planner.schedule.actions import Action, Kind, Schedule
from profiles.model import Dtype, ModelSpec

VOCABULARY = 11
WIDTH = 6
LENGTH = 3


def make_plan(
    schedule: Schedule,
    *,
    layers_per_stage: Sequence[int] | None = None,
    rank_of_stage: Sequence[int] | None = None,
    dp: int = 1,
    tp: int = 1,
    micro_batch_size: int = 2,
    zero_stage: int = 0,
    recompute: str = "none",
    model: ModelSpec | None = None,
    architecture: str | None = None,
    sequence_length: int = LENGTH,
    dtype: Dtype = "float64",
    family: str = "auto",
) -> Plan:
    """The least a plan must hold to be run; what it predicts means nothing."""
    p, num_stages = schedule.num_ranks, schedule.num_stages
    layers_per_stage = tuple(layers_per_stage or [1] * num_stages)
    home = schedule.rank_of_stage
    costs = StageCosts(
        forward_us=1.0,
        backward_input_us=1.0,
        backward_weight_us=1.0,
        fused_backward_us=2.0,
        optimizer_us=0.5,
        parameter_bytes=1,
        activation_bytes=1,
        weight_activation_bytes=1,
        output_bytes=1,
        temporary_bytes=0,
        transfer_us=0.0,
    )
    memory = RankMemory(
        weight_bytes=1,
        gradient_bytes=1,
        optimizer_bytes=1,
        activation_bytes=1,
        temporary_bytes=0,
        buffer_bytes=0,
        capacity_bytes=10,
    )
    return Plan(
        model=model
        or ModelSpec(
            name="tiny",
            num_layers=max(1, sum(layers_per_stage) - 2),
            hidden_size=WIDTH,
            num_heads=1,
            num_kv_heads=1,
            head_dim=WIDTH,
            ffn_size=WIDTH,
            gated_mlp=False,
            vocab_size=VOCABULARY,
            sequence_length=sequence_length,
            tied_embeddings=False,
            source="test",
        ),
        architecture=architecture,
        sequence_length=sequence_length,
        global_batch_size=micro_batch_size * schedule.num_microbatches * dp,
        precision=Precision.of(dtype),
        layout=Layout(
            tp=tp,
            pp=p,
            dp=dp,
            virtual_stages=num_stages // p,
            micro_batch_size=micro_batch_size,
            num_microbatches=schedule.num_microbatches,
            zero_stage=zero_stage,
            shard_degree=dp if zero_stage else 1,
            recompute=recompute,
            layers_per_stage=layers_per_stage,
            rank_of_stage=tuple(rank_of_stage or [home[s] for s in range(num_stages)]),
            devices=tuple(range(p * dp * tp)),
            num_replicas=schedule.num_replicas,
        ),
        stages=(costs,) * num_stages,
        family=family,
        schedule=schedule.to_lines(),
        prediction=Prediction(
            step_time_us=10.0,
            pipeline_us=8.0,
            exposed_data_parallel_us=1.0,
            optimizer_us=1.0,
            bubble_rate_span=0.1,
            bubble_rate_makespan=0.2,
            model_flops=1.0,
            mfu=0.1,
            tokens_per_s=1.0,
            memory=(memory,) * p,
        ),
        certificate=Certificate(
            objective_us=10.0,
            lower_bound_us=10.0,
            lower_bound_kind="work",
            gap=0.0,
            status="optimal",
            schedule_solver="test",
            schedule_lower_bound_us=8.0,
            num_candidates=1,
            num_evaluated=1,
            num_overflowing=0,
            num_pruned=0,
            num_unreached=0,
            refused={},
            dropped={},
            interrupted=False,
            limited_by_time=False,
            seconds=0.0,
            seed=0,
            time_limit_s=1.0,
        ),
        provenance=Provenance(
            pipewright_version="0",
            command="test",
            cluster="here",
            device="cpu",
            profile_origin="none",
            profile_sha256="",
            cluster_sha256="",
            assumptions=(),
        ),
    )


class Block(nn.Module):
    """Linear layers that can be deferred, beside parameters that cannot."""

    def __init__(self, generator: torch.Generator) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH, dtype=torch.float64)
        self.inner = nn.Linear(WIDTH, 2 * WIDTH, dtype=torch.float64)
        self.outer = nn.Linear(2 * WIDTH, WIDTH, dtype=torch.float64)
        self.gain = nn.Parameter(torch.ones(WIDTH, dtype=torch.float64))
        draw_weights(self, generator)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.gain * self.outer(nn.functional.gelu(self.inner(self.norm(x))))


def draw_weights(module: nn.Module, generator: torch.Generator) -> None:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.5)


def make_layer(index: int, num_layers: int, seed: int) -> nn.Module:
    """Layer `index`, the same whoever builds it: an embedding, blocks, a head."""
    generator = torch.Generator().manual_seed(1000 * seed + index)
    if index == 0:
        layer: nn.Module = nn.Embedding(VOCABULARY, WIDTH, dtype=torch.float64)
    elif index == num_layers - 1:
        layer = nn.Linear(WIDTH, VOCABULARY, dtype=torch.float64)
    else:
        return Block(generator)
    draw_weights(layer, generator)
    return layer


def loss_fn(logits: Tensor, targets: Tensor) -> Tensor:
    return nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())


def make_batch(rows: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(VOCABULARY, (rows, LENGTH + 1), generator=generator)
    return tokens[:, :-1], tokens[:, 1:]


def random_schedule(seed: int, num_ranks: int, *, recomputes: bool = False) -> Schedule:
    """Any order that can run: stages and microbatches in any order, some backwards split, W early or late.

    With `recomputes`, some have an R somewhere between F and the backward.
    """
    rng = random.Random(seed)
    num_stages = num_ranks * rng.randint(1, 3)
    num_microbatches = rng.randint(1, 5)
    home = [*range(num_ranks), *(rng.randrange(num_ranks) for _ in range(num_stages - num_ranks))]
    rng.shuffle(home)
    cells = [(s, j) for s in range(num_stages) for j in range(num_microbatches)]
    share_split = rng.choice([0.0, 0.5, 1.0])
    split = {cell for cell in cells if rng.random() < share_split}
    share_again = rng.choice([0.5, 1.0]) if recomputes else 0.0
    again = {cell for cell in cells if rng.random() < share_again}
    forward, backward, weight, recomputed = set(), set(), set(), set()
    orders: list[list[Action]] = [[] for _ in range(num_ranks)]
    while len(backward) + len(weight & split) < len(cells) + len(split):
        ready = []
        for stage, j in cells:
            cell = stage, j
            if cell not in forward:
                if stage == 0 or (stage - 1, j) in forward:
                    ready.append(Action(Kind.F, *cell))
            elif cell not in backward:
                if cell in again and cell not in recomputed:
                    ready.append(Action(Kind.R, *cell))
                elif stage == num_stages - 1 or (stage + 1, j) in backward:
                    ready.append(Action(Kind.B if cell in split else Kind.BW, *cell))
            elif cell in split and cell not in weight:
                ready.append(Action(Kind.W, *cell))
        action = rng.choice(ready)
        done = {Kind.F: forward, Kind.R: recomputed, Kind.B: backward, Kind.BW: backward, Kind.W: weight}[action.kind]
        done.add((action.stage, action.microbatch))
        orders[home[action.stage]].append(action)
    return Schedule(tuple(map(tuple, orders)))


def can_run(schedule: Schedule, num_stages: int, num_microbatches: int) -> bool:
    """Whether all of the schedule runs when every rank does its next action as soon as it may. Slow and plain."""
    every = [action for actions in schedule.ranks for action in actions]
    if len(set(every)) < len(every) or any(not actions for actions in schedule.ranks):
        return False
    home: dict[int, int] = {}
    for rank, actions in enumerate(schedule.ranks):
        if any(home.setdefault(action.stage, rank) != rank for action in actions):
            return False
    wanted = []
    for stage in range(num_stages):
        for j in range(num_microbatches):
            halves = [Action(kind, stage, j) in every for kind in (Kind.B, Kind.W)]
            if Action(Kind.BW, stage, j) in every:
                wanted += [Action(Kind.F, stage, j), Action(Kind.BW, stage, j)]
                if any(halves):
                    return False
            else:
                wanted += [Action(kind, stage, j) for kind in (Kind.F, Kind.B, Kind.W)]
    if not set(wanted) <= set(every) or {a for a in every if a.kind is not Kind.R} - set(wanted):
        return False
    if any(a.stage >= num_stages or a.microbatch >= num_microbatches for a in every):
        return False
    done: set[Action] = set()

    def back(stage: int, j: int) -> bool:
        return Action(Kind.B, stage, j) in done or Action(Kind.BW, stage, j) in done

    def may(action: Action) -> bool:
        kind, stage, j = action
        if kind is Kind.F:
            return stage == 0 or Action(Kind.F, stage - 1, j) in done
        if kind is Kind.W:
            return Action(Kind.B, stage, j) in done
        if kind is Kind.R:
            return Action(Kind.F, stage, j) in done and not back(stage, j)
        again = Action(Kind.R, stage, j)
        return (
            Action(Kind.F, stage, j) in done
            and (again not in every or again in done)
            and (stage == num_stages - 1 or back(stage + 1, j))
        )

    left = [list(actions) for actions in schedule.ranks]
    progress = True
    while progress:
        progress = False
        for actions in left:
            while actions and may(actions[0]):
                done.add(actions.pop(0))
                progress = True
    return not any(left)
