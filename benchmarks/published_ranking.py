"""Groups of layouts: does the model pick the one that was measured best, and put the others in order?"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from published_fields import Row, UnpricedError
from published_files import Group
from published_pricing import predict


@dataclass
class Ranked:
    """What became of one group."""

    name: str
    regret: float | None = None  # measured time of the layout predicted best, over the best measured, less 1
    spearman: float | None = None  # correlation of predicted and measured ranks
    picked: str = ""
    judged: int = 0  # rows known to fit or not
    misjudged: list[str] = field(default_factory=list)
    unpriced: list[str] = field(default_factory=list)

    def line(self) -> str:
        """The group in one line."""
        if self.regret is None:
            return f"{self.name}: nothing to rank"
        correlation = "" if self.spearman is None else f", Spearman {self.spearman:.2f}"
        return f"{self.name}: picks {self.picked}, regret {100 * self.regret:.1f} %{correlation}"


def rank(group: Group, known: dict[str, Row]) -> Ranked:
    """Price a group; rows without a price are named, and left out."""
    ranked = Ranked(group.name, unpriced=[f"{group.name}: {name}: in no file" for name in group.missing])
    priced: list[tuple[float, float, str]] = []  # (predicted, measured, row)
    for row, facts, measured in group.members:
        name = str(row.get("id"))
        try:
            predicted = predict(row, facts, known)
        except UnpricedError as error:
            ranked.unpriced.append(f"{group.name}: {name}: {error}")
            continue
        ranked.judged += 1
        if predicted.fits != (measured is not None):
            ranked.misjudged.append(name)
        if measured is not None:
            priced.append((predicted.step_s, measured, name))
    if priced:
        _, picked, ranked.picked = min(priced)
        ranked.regret = picked / min(measured for _, measured, _ in priced) - 1
    if len(priced) > 1:
        ranked.spearman = spearman([entry[0] for entry in priced], [entry[1] for entry in priced])
    return ranked


def spearman(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Rank correlation; values that are equal share the mean of their ranks. None if one side is constant."""
    a, b = _ranks(first), _ranks(second)
    mean_a, mean_b = sum(a) / len(a), sum(b) / len(b)
    covariance = sum((x - mean_a) * (y - mean_b) for x, y in zip(a, b, strict=True))
    spread = sum((x - mean_a) ** 2 for x in a) * sum((y - mean_b) ** 2 for y in b)
    return None if spread == 0 else covariance / spread**0.5


def _ranks(values: Sequence[float]) -> list[float]:
    return [
        sum(other < value for other in values) + (sum(other == value for other in values) - 1) / 2 for value in values
    ]
