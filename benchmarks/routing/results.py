"""What was measured, as plain data. Losses are nats per token of held-out text, one for each domain."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from statistics import fmean

from benchmarks.results import Machine, Spread, spread
from benchmarks.routing.settings import Settings


@dataclass(frozen=True, slots=True)
class Reference:
    """The ends of the scale, on each domain.

    0 % is `base`, the dense base. 100 % is `oracle`, the base with the MLPs of the domain's own expert. `own` is that
    expert as a whole.
    """

    base: tuple[float, ...]
    oracle: tuple[float, ...]
    own: tuple[float, ...]

    def quality(self, losses: tuple[float, ...]) -> float:
        """How much of the way from the base to the oracle a model has come, in percent."""
        return 100 * (fmean(self.base) - fmean(losses)) / (fmean(self.base) - fmean(self.oracle))


@dataclass(frozen=True, slots=True)
class Run:
    """One merged model. `losses` are empty where it could not be made, and `error` says why."""

    seed: int
    losses: tuple[float, ...] = ()
    merge_seconds: float = 0.0
    evaluation_seconds: float = 0.0
    error: str | None = None


@dataclass(frozen=True, slots=True)
class Result:
    """A row's runs in one variant, one for each seed; none where it was skipped, and `skipped` says why."""

    key: str
    name: str
    variant: str
    runs: tuple[Run, ...] = ()
    skipped: str | None = None

    @property
    def failure(self) -> str | None:
        """Why a run failed, or why it was never run; None where all is well."""
        return self.skipped or next((run.error for run in self.runs if run.error), None)

    def spread(self, of: Callable[[Run], float]) -> Spread:
        """The spread of a quantity over the seeds."""
        return spread([of(run) for run in self.runs])


@dataclass(frozen=True, slots=True)
class Phase:
    """A part of the run, and how long it took."""

    name: str
    seconds: float


@dataclass(frozen=True, slots=True)
class Report:
    """One run of the suite. `references` are by variant."""

    started: str
    seconds: float
    tiny: bool
    settings: Settings
    num_parameters: int
    machine: Machine
    phases: tuple[Phase, ...]
    references: dict[str, Reference]
    results: tuple[Result, ...]

    def result(self, key: str, variant: str) -> Result | None:
        """The row's result in this variant, where it was run."""
        return next((result for result in self.results if (result.key, result.variant) == (key, variant)), None)

    def qualities(self, result: Result) -> list[float]:
        """How far it has come with each seed, in percent; of a result without failure."""
        return [self.references[result.variant].quality(run.losses) for run in result.runs]
