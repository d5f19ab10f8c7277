"""Predictions for published runs: step time, memory of each kind, and whether the run fits."""

from dataclasses import dataclass
from itertools import accumulate

from published_fields import Row, UnpricedError, stated
from published_rows import Run, run_of

from planner.candidate_costs import Job
from planner.memory import observed_bytes
from planner.pricing import PricedLayout, Pricer
from planner.schedule.families import FAMILIES
from profiles.analytic import profile_model
from profiles.collectives import Fabric
from profiles.errors import PipewrightError
from profiles.model import ModelProfile, Variant

GIB = 2**30


@dataclass(frozen=True)
class Predicted:
    """What the model says about one run."""

    run: Run
    priced: PricedLayout

    @property
    def step_s(self) -> float:
        """Step time."""
        return self.priced.step_us / 1e6

    @property
    def fits(self) -> bool:
        """Whether no device runs out of memory."""
        return self.priced.fits

    def memory_gb(self, kind: str) -> float:
        """Peak memory of the kind that the row prints: in GB unless it says GiB, by the allocator or from outside.

        What nvidia-smi showed was read on the nodes of the first pipeline rank.
        """
        outside = "nvidia-smi" in kind
        ranks = self.priced.memory[:1] if outside else self.priced.memory
        peak = max(observed_bytes(memory, outside=outside, reserved="allocated" not in kind) for memory in ranks)
        return peak / (GIB if "gib" in kind.lower() else 1e9)


def predict(row: Row, facts: Row, shapes: dict[str, Row]) -> Predicted:
    """Price one row; UnpricedError says why not. Where recomputation is not stated, the least that fits."""
    try:
        first = _predicted(run_of(row, facts, shapes))
        if stated(row, "recompute") is not None or first.fits:
            return first
        for recompute in ("selective", "full"):
            again = _predicted(run_of(row, facts, shapes, recompute))
            if again.fits:
                return again
        return first
    except (PipewrightError, ValueError) as error:
        raise UnpricedError(str(error)) from error
    except (ArithmeticError, AssertionError, LookupError, TypeError) as error:  # a field of a kind nobody thought of
        raise UnpricedError(f"the row has a field that cannot be read: {error!r}") from error


def _predicted(run: Run) -> Predicted:
    return Predicted(run, price(run))


def price(run: Run) -> PricedLayout:
    """The layout as it was run."""
    c = run.candidate
    mixed = 0.0 < run.partial_recompute < 1.0
    candidate = c._replace(recompute="mixed") if mixed else c
    variants = candidate.variants(run.sequence_length, run.precision.compute)
    profile = _profile(run, variants)
    job = Job((profile,), run.cluster, run.global_batch, run.sequence_length, run.precision, run.overlaps)
    pricer, family = Pricer(job), FAMILIES[run.family]
    if not mixed:
        return pricer.price_fixed(candidate, run.layers_per_stage, family)
    names = pricer.options(candidate).choices
    share, count = run.partial_recompute, len(pricer.options(candidate).base)
    picked = [int((layer + 1) * share) > int(layer * share) for layer in range(count)]
    choices = [names.index(c.recompute if again else "none") for again in picked]
    cuts = list(accumulate(run.layers_per_stage))[:-1]
    placement = family.placement(c.pp, c.virtual_stages)
    return pricer.price_order(pricer.cut(candidate, cuts, placement, choices), family)


def _profile(run: Run, variants: tuple[Variant, ...]) -> ModelProfile:
    fabric = Fabric.of(run.cluster)
    device = run.cluster.groups[0].device
    return profile_model(run.spec, device, variants, fabric=fabric, attention=run.attention, software=run.software)
