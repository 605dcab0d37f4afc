"""Which environment the next group is of: weights, or weights that change over the steps. Pure.

Smooth weighted round-robin: deterministic, and close to the weights over any stretch, also while they change.
"""

from __future__ import annotations

from collections.abc import Sequence

from broker.process.settings import EnvironmentSection, Weight, weight_at


def largest_weight(weight: Weight) -> float:
    """The largest one of a schedule."""
    return max(value for _, value in weight) if isinstance(weight, tuple) else float(weight)


class Mixture:
    """Draws environments. `credits`: all of its state, what each environment is owed, in draws times weight."""

    def __init__(self, environments: Sequence[EnvironmentSection], credit: Sequence[float] | None = None) -> None:
        self._environments = environments
        # The settings may have changed since a checkpoint: another number of environments begins afresh.
        fits = credit is not None and len(credit) == len(environments)
        self.credit = list(credit) if fits and credit is not None else [0.0] * len(environments)

    def draw(self, step: int) -> str:
        """The next environment's name, by the weights of this step."""
        weights = [weight_at(environment.weight, step) for environment in self._environments]
        owed = [credit + weight for credit, weight in zip(self.credit, weights, strict=True)]
        # One of weight 0 may be owed something from before; it is drawn by none.
        chosen = max((i for i, weight in enumerate(weights) if weight > 0), key=lambda i: (owed[i], -i))
        self._charge(owed, weights, chosen)
        return self._environments[chosen].name

    def repeat(self, step: int, name: str) -> None:
        """A draw that was made before, by the process that this one continues."""
        names = [environment.name for environment in self._environments]
        if name not in names:
            return
        weights = [weight_at(environment.weight, step) for environment in self._environments]
        owed = [credit + weight for credit, weight in zip(self.credit, weights, strict=True)]
        self._charge(owed, weights, names.index(name))

    def _charge(self, owed: list[float], weights: list[float], chosen: int) -> None:
        owed[chosen] -= sum(weights)
        self.credit = owed


def spread(environments: Sequence[EnvironmentSection], num_draws: int) -> list[tuple[str, int]]:
    """(environment, how many of it came before) of the first draws by the largest weights: the same at every step."""
    fixed = [
        environment.model_copy(update={"weight": largest_weight(environment.weight)}) for environment in environments
    ]
    mixture, counts = Mixture(fixed), dict[str, int]()
    drawn = []
    for _ in range(num_draws):
        name = mixture.draw(0)
        drawn.append((name, counts.get(name, 0)))
        counts[name] = counts.get(name, 0) + 1
    return drawn
