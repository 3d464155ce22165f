"""Schedules: which sparsity holds after how many optimizer steps, and at which steps masks change.

Step `t` means "after t optimizer steps"; an update at step 0 happens before training.
"""

from dataclasses import dataclass

from ..ranking import check_sparsity


class Schedule:
    """Base of all schedules: frozen, and a function of the step alone, so that runs can resume.

    Attributes:
        final: Sparsity in [0, 1) that holds from the last update on.
    """

    final: float

    @property
    def last(self) -> int | None:
        """Step of the last update; None if updates never end."""
        raise NotImplementedError

    def sparsity(self, step: int) -> float:
        """Sparsity wanted after `step` optimizer steps."""
        raise NotImplementedError

    def is_update(self, step: int) -> bool:
        """Say whether masks are chosen anew after `step` optimizer steps."""
        raise NotImplementedError

    def _check(self, **at_least: int) -> None:
        check_sparsity(f"schedules.{type(self).__name__}", self.final)
        for name, low in at_least.items():
            self._check_count(name, low)

    def _check_count(self, name: str, low: int) -> None:
        value = getattr(self, name)
        if not isinstance(value, int) or isinstance(value, bool) or value < low:
            kind = f"schedules.{type(self).__name__}"
            raise ValueError(f"{kind}: expected {name} to be an int >= {low}, got {value!r}")


@dataclass(frozen=True)
class OneShot(Schedule):
    """Dense until step `at`, then pruned once.

    Attributes:
        final: Sparsity from then on.
        at: Step of the only update.
    """

    final: float
    at: int = 0

    def __post_init__(self):
        """Check the fields."""
        self._check(at=0)

    @property
    def last(self) -> int:
        """Step of the only update."""
        return self.at

    def sparsity(self, step: int) -> float:
        """0 before step `at`, `final` from it on."""
        return self.final if step >= self.at else 0.0

    def is_update(self, step: int) -> bool:
        """True at step `at` alone."""
        return step == self.at


@dataclass(frozen=True)
class Constant(Schedule):
    """The same sparsity throughout, with masks chosen anew every so often (RigL, SET, SR-STE).

    Attributes:
        final: Sparsity from step 0 on.
        every: Steps between updates; None updates at step 0 only.
        end: No update after this step; None goes on for ever.
    """

    final: float
    every: int | None = None
    end: int | None = None

    def __post_init__(self):
        """Check the fields."""
        self._check(
            **({} if self.every is None else {"every": 1}),
            **({} if self.end is None else {"end": 0}),
        )

    @property
    def last(self) -> int | None:
        """The last multiple of `every` up to `end`."""
        if self.every is None:
            return 0
        return None if self.end is None else self.end // self.every * self.every

    def sparsity(self, step: int) -> float:
        """Always `final`."""
        return self.final

    def is_update(self, step: int) -> bool:
        """True at step 0 and at every multiple of `every` up to `end`."""
        if self.every is None:
            return step == 0
        return step % self.every == 0 and (self.end is None or step <= self.end)


@dataclass(frozen=True)
class Cubic(Schedule):
    """Fast at first, slow towards the end (Zhu & Gupta 2017, arXiv:1710.01878, eq. 1).

    `s_t = s_f + (s_i - s_f) (1 - (t - start) / (end - start))^3`, clamped outside.

    Attributes:
        initial: Sparsity `s_i` at step `start`.
        final: Sparsity `s_f`, reached exactly at step `end`.
        start: Step of the first update.
        end: Step of the last update, > start.
        every: Steps between updates; the last interval may be shorter.
    """

    initial: float
    final: float
    start: int
    end: int
    every: int = 1

    def __post_init__(self):
        """Check the fields."""
        self._check(start=0, end=0, every=1)
        check_sparsity("schedules.Cubic: initial", self.initial)
        if self.initial > self.final:
            got = f"{self.initial!r} > {self.final!r}"
            raise ValueError(f"schedules.Cubic: expected initial <= final, got {got}")
        if self.end <= self.start:
            raise ValueError(
                f"schedules.Cubic: expected end > start, got start={self.start}, end={self.end}"
            )

    @property
    def last(self) -> int:
        """Step `end`."""
        return self.end

    def sparsity(self, step: int) -> float:
        """The cubic between `start` and `end`, `initial` before and `final` after."""
        if step <= self.start:
            return self.initial
        if step >= self.end:
            return self.final
        left = (self.end - step) / (self.end - self.start)
        return self.final + (self.initial - self.final) * left**3

    def is_update(self, step: int) -> bool:
        """True at `start`, every `every` steps after it, and at `end`."""
        inside = self.start <= step <= self.end
        return inside and ((step - self.start) % self.every == 0 or step == self.end)


@dataclass(frozen=True)
class Iterative(Schedule):
    """Rounds of training and pruning that each drop the same share of what is left.

    After round r the density is `(1 - final)^(r / rounds)`, as iterative magnitude pruning wants
    (Han et al. 2015, arXiv:1506.02626; Frankle & Carbin 2019, arXiv:1803.03635).

    Attributes:
        final: Sparsity after the last round.
        rounds: Number of prunings.
        every: Optimizer steps from one pruning to the next.
        start: Step of the first pruning; default `every`, so that training comes first.
    """

    final: float
    rounds: int
    every: int
    start: int | None = None

    def __post_init__(self):
        """Check the fields."""
        self._check(rounds=1, every=1, **({} if self.start is None else {"start": 0}))

    @property
    def first(self) -> int:
        """Step of the first pruning."""
        return self.every if self.start is None else self.start

    @property
    def last(self) -> int:
        """Step of the last pruning."""
        return self.first + (self.rounds - 1) * self.every

    def sparsity(self, step: int) -> float:
        """A staircase: 0 before the first pruning, `final` from the last on."""
        done = (step - self.first) // self.every + 1
        if done <= 0:
            return 0.0
        return self.final if done >= self.rounds else 1 - (1 - self.final) ** (done / self.rounds)

    def is_update(self, step: int) -> bool:
        """True at each pruning."""
        return self.first <= step <= self.last and (step - self.first) % self.every == 0


def final_sparsity(sparsity: float | None, schedule: Schedule | None) -> float | None:
    """Sparsity that a schedule and a wish come to, None for neither; they must agree."""
    if schedule is None:
        return sparsity
    if not isinstance(schedule, Schedule):
        got = type(schedule).__name__
        raise TypeError(f"Pruner: expected a schedule of sparsekern.schedules, got {got}")
    if sparsity is not None and sparsity != schedule.final:
        raise ValueError(
            f"Pruner: expected sparsity {schedule.final!r}, as the schedule ends, got {sparsity!r}"
        )
    return schedule.final
