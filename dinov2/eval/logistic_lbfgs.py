"""L-BFGS for several smooth convex problems at once: each has its own step length, memory and end.

All problems are evaluated together, once a round; those that have converged are left out. A trial point that fails the
line search of its problem costs that problem a round and the others nothing.

Shapes: G problems (active ones in a round), P variables.
Source: Nocedal and Wright, Numerical Optimization, algorithm 7.4; points are accepted by their slopes, as in the
approximate Wolfe conditions of Hager and Zhang 2005, because near the minimum rounding hides the function's decrease.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

_MEMORY = 10  # rounds whose steps and gradient differences are kept
_FLATTEST = 0.9  # share of the downhill slope that may be left at an accepted point
_STEEPEST = 0.8  # of it that may go uphill there
_STRETCH = 4.0  # of a step that was too short
_CUTS = (0.1, 0.9)  # smallest and largest factor of a step that was too long
_TINIEST = 1e-300  # keeps divisions finite

Evaluate = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True, kw_only=True)
class Minima:
    """Where the problems ended."""

    points: Tensor  # [G, P]
    values: Tensor  # [G]
    gaps: Tensor  # [G], estimated distance of the value from the minimum
    num_rounds: Tensor  # [G], int64, evaluations of each problem
    has_converged: Tensor  # [G], bool


def minimise(
    evaluate: Evaluate,
    start: Tensor,
    *,
    inverse_curvature: Tensor,
    tolerance: float,
    rounding: float,
    max_rounds: int,
) -> Minima:
    """Minimise G functions of P variables, all bounded from below by 0.

    Args:
        evaluate: (points [g, P], numbers of their problems [g]) to values [g] and gradients [g, P].
        start: [G, P], left unchanged.
        inverse_curvature: what the inverse Hessian is taken for at first, up to a factor, > 0, [G, P].
        tolerance: a problem ends when its estimated gap, half the decrease that the quasi-Newton model promises, is at
            most this share of its value and of its decrease since the start.
        rounding: relative increase of a value that counts as none; a gap below its square, relative to the value, ends
            a problem too.
        max_rounds: evaluations of one problem, at least 1.

    Returns:
        The last accepted points, in the type of `start`.
    """
    search = _Search(evaluate, start, inverse_curvature, rounding=rounding)
    search.end_converged(tolerance)
    for _ in range(max_rounds - 1):
        if not len(search.active):
            break
        search.advance()
        search.end_converged(tolerance)
    return search.minima()


class _Search:
    """State of all problems; every tensor but the results holds the active ones alone, in the order of `active`."""

    def __init__(self, evaluate: Evaluate, start: Tensor, inverse_curvature: Tensor, *, rounding: float) -> None:
        count, size = start.shape
        self.evaluate, self.rounding = evaluate, rounding
        self.active = torch.arange(count, device=start.device)
        self.point = start.clone()
        self.value, self.gradient = evaluate(self.point, self.active)
        self.first_value = self.value
        self.inverse_curvature = inverse_curvature
        self.scale = start.new_ones(count)  # of the inverse curvature
        self.length = start.new_ones(count)  # of the trial step
        self.rounds = torch.ones(count, dtype=torch.int64, device=start.device)
        # the memory, a ring of rounds; zeros, which change nothing, where a problem did not move
        self.num_moves = 0
        self.steps = start.new_zeros(_MEMORY, count, size)
        self.changes = start.new_zeros(_MEMORY, count, size)  # of the gradient
        self.weights = start.new_zeros(_MEMORY, count)  # 1 / (step * change)
        self.direction = self._directions()
        self._results = {
            "points": start.clone(),
            "values": self.value.clone(),
            "gaps": torch.full_like(self.value, torch.inf),
            "num_rounds": self.rounds.clone(),
            "has_converged": torch.zeros(count, dtype=torch.bool, device=start.device),
        }

    @property
    def slope(self) -> Tensor:
        """Of each value along its direction, < 0, [g]."""
        return (self.direction * self.gradient).sum(dim=1)

    def advance(self) -> None:
        """Evaluate one trial point of each active problem; go there where it is good enough."""
        trial = self.point + self.length[:, None] * self.direction
        value, gradient = self.evaluate(trial, self.active)
        self.rounds = self.rounds + 1
        before, after = -self.slope, (self.direction * gradient).sum(dim=1)
        is_low = value <= self.value * (1 + self.rounding)  # False for NaN
        is_short = is_low & (after < -_FLATTEST * before)
        is_good = is_low & ~is_short & (after <= _STEEPEST * before)
        # a slope that changes evenly is 0 at this share of the step
        cut = (before / (before + after).clamp(min=_TINIEST)).nan_to_num(0.0).clamp(*_CUTS)
        cut = torch.where(is_low, cut, cut.clamp(max=0.5))
        self.length = torch.where(is_good, 1.0, self.length * torch.where(is_short, _STRETCH, cut))
        if is_good.any():
            self._remember(is_good, trial - self.point, gradient - self.gradient)
            self.value = torch.where(is_good, value, self.value)
            is_good = is_good[:, None]
            self.point = torch.where(is_good, trial, self.point)
            self.gradient = torch.where(is_good, gradient, self.gradient)
            self.direction = torch.where(is_good, self._directions(), self.direction)

    def end_converged(self, tolerance: float) -> None:
        """Note where the active problems are, and drop those whose value can hardly fall further."""
        gaps = -self.slope / 2
        is_done = gaps <= tolerance * torch.minimum(self.value, self.first_value - self.value)
        is_done |= gaps <= self.rounding**2 * self.value  # of the gradient, nothing but rounding may be left
        found = (self.point, self.value, gaps, self.rounds, is_done)
        for result, values in zip(self._results.values(), found, strict=True):
            result[self.active] = values
        if is_done.any():
            rows = (~is_done).nonzero()[:, 0]
            for name in ("active", "point", "value", "first_value", "gradient", "direction", "inverse_curvature"):
                setattr(self, name, getattr(self, name)[rows])
            for name in ("scale", "length", "rounds"):
                setattr(self, name, getattr(self, name)[rows])
            for name in ("steps", "changes", "weights"):
                setattr(self, name, getattr(self, name)[:, rows])

    def minima(self) -> Minima:
        """Return where the problems are."""
        return Minima(**self._results)

    def _remember(self, is_good: Tensor, step: Tensor, change: Tensor) -> None:
        """Put a pair of each problem in the place of the oldest ones; a pair without curvature is left out."""
        product = torch.linalg.vecdot(step, change)
        is_kept = is_good & (product > 0)
        place = self.num_moves % _MEMORY
        self.num_moves += 1
        self.steps[place] = torch.where(is_kept[:, None], step, 0.0)
        self.changes[place] = torch.where(is_kept[:, None], change, 0.0)
        self.weights[place] = torch.where(is_kept, 1 / product, 0.0)
        curvature = (change.square() * self.inverse_curvature).sum(dim=1)
        self.scale = torch.where(is_kept, product / curvature, self.scale)

    def _directions(self) -> Tensor:
        """Minus the inverse Hessian, as far as it is known, times the gradient, by the two loops; [g, P]."""
        places = [move % _MEMORY for move in range(max(0, self.num_moves - _MEMORY), self.num_moves)]
        direction = -self.gradient
        shares = {}
        for place in reversed(places):
            shares[place] = self.weights[place] * torch.linalg.vecdot(self.steps[place], direction)
            direction.addcmul_(shares[place][:, None], self.changes[place], value=-1)
        direction *= self.inverse_curvature * self.scale[:, None]
        for place in places:
            share = shares[place] - self.weights[place] * torch.linalg.vecdot(self.changes[place], direction)
            direction.addcmul_(share[:, None], self.steps[place])
        return direction
