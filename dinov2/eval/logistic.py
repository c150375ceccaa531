"""L2-regularised logistic regression for several strengths C at once.

For each C the weights W [D, K] and the bias b [K], which is not penalised, minimise

    mean of -log softmax(x W + b)[right class]  +  |W|^2 / (2 C n)

as scikit-learn's and cuML's `LogisticRegression`; of two classes one has logits 0, as there, so that a single column of
weights is penalised.

How: the features are centred and turned onto their principal axes, in float64, which changes neither the objective nor
its minimum. There the Hessian is nearly diagonal, and L-BFGS starts from that diagonal. The logits of all C come from
one product [K * G, D] x [D, rows], and so do their gradients.

Shapes: n images, D features, K columns of weights (classes, or 1 for two classes), G values of C.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from dinov2.eval.logistic_lbfgs import minimise

TOLERANCE = 1e-7  # estimated share of the objective by which a fit ends above its minimum; no score moves by 0.1 point
MAX_COLUMNS = 512  # of weights that are fitted together
_ROUNDING = {torch.float32: 1e-6, torch.float64: 1e-10}  # relative, of a mean loss
_CHUNK = {"cpu": 2**19}  # logits computed at a time, so that they stay in the processor's cache
_LARGE_CHUNK = 2**26  # on accelerators
_LEAST_ROWS = 256
_LINEAR_FROM = 40  # log(1 + exp(x)) is x to rounding, in float64, too
_ROWS = 8192  # of features that are turned at a time
_LEAST_VARIANCE = 1e-13  # of a principal axis, relative to the largest; an axis below it is rounding


@dataclass(frozen=True, kw_only=True)
class LogisticFit:
    """Classifier of one C."""

    c: float
    weight: Tensor  # [classes, D], float64, on the CPU
    bias: Tensor  # [classes]
    objective: float
    num_rounds: int  # evaluations of the objective
    has_converged: bool

    def logits(self, values: Tensor) -> Tensor:
        """Return the logits of images, [n, D] to [n, classes], float64."""
        return values.double() @ self.weight.T + self.bias


def group_cs(cs: Sequence[float], *, num_classes: int) -> list[list[float]]:
    """Divide values of C into groups that are fitted together, neighbours in one; whatever the number of processes."""
    size = max(1, MAX_COLUMNS // _num_columns(num_classes))
    ordered = sorted(cs)
    return [ordered[start : start + size] for start in range(0, len(ordered), size)]


class LogisticRegression:
    """Training data, made ready once for fits with any C.

    Args:
        values: features, [n, D], any float type; left unchanged.
        targets: class of each image, [n] int64, 0 .. num_classes - 1.
        num_classes: at least 2.
        dtype: of the passes over the data, float32 or float64; all else is float64.
        device: where they are computed.
    """

    def __init__(
        self, values: Tensor, targets: Tensor, *, num_classes: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.device, self.dtype = device, dtype
        self.num_classes = num_classes
        self.num_columns = _num_columns(num_classes)
        self.num_images = len(values)
        self.targets = targets.to(device)
        self.mean, self.axes, self.variances = _principal_axes(values, device=device)
        self.data = self._turned(values)  # [n, A + 1], a column of ones behind A principal coordinates

    def fit(self, cs: Sequence[float], *, max_rounds: int, tolerance: float = TOLERANCE) -> list[LogisticFit]:
        """Fit one classifier for each C, all together.

        Args:
            cs: strengths, > 0; the larger, the weaker the penalty.
            max_rounds: evaluations of each objective.
            tolerance: see `minimise`.
        """
        penalties = 1 / (torch.tensor(cs, dtype=torch.float64, device=self.device) * self.num_images)
        start = self.data.new_zeros(len(cs), self.data.shape[1] * self.num_columns, dtype=torch.float64)
        minima = minimise(
            lambda points, numbers: self._evaluate(points, penalties[numbers]),
            start,
            inverse_curvature=self._inverse_curvature(penalties),
            tolerance=tolerance,
            rounding=_ROUNDING[self.dtype],
            max_rounds=max_rounds,
        )
        weights = minima.points.unflatten(1, (self.num_columns, -1))  # [G, K, A + 1]
        fits = []
        for number, c in enumerate(cs):
            weight, bias = self._turned_back(weights[number])
            fits.append(
                LogisticFit(
                    c=c,
                    weight=weight,
                    bias=bias,
                    objective=minima.values[number].item(),
                    num_rounds=int(minima.num_rounds[number]),
                    has_converged=bool(minima.has_converged[number]),
                )
            )
        return fits

    def _evaluate(self, points: Tensor, penalties: Tensor) -> tuple[Tensor, Tensor]:
        """Objectives [g] and gradients [g, P] at points [g, P]."""
        count, columns = len(points), self.num_columns
        weights = points.unflatten(1, (columns, -1))  # [g, K, A + 1]
        flat = weights.transpose(0, 1).flatten(0, 1).to(self.dtype)  # [K * g, A + 1]
        losses = torch.zeros(count, dtype=torch.float64, device=self.device)
        gradient = torch.zeros_like(flat, dtype=torch.float64)
        rows = max(_LEAST_ROWS, _CHUNK.get(self.device.type, _LARGE_CHUNK) // len(flat))
        for data, targets in zip(self.data.split(rows), self.targets.split(rows), strict=True):
            logits = (flat @ data.T).unflatten(0, (columns, count))  # [K, g, rows]
            loss, residual = (_loss_of_two if columns == 1 else _loss)(logits, targets)
            losses += loss.sum(dim=1, dtype=torch.float64)
            gradient += residual.flatten(0, 1) @ data
        penalised = weights.clone()
        penalised[..., -1] = 0
        objectives = losses / self.num_images + penalties / 2 * penalised.square().sum(dim=(1, 2))
        gradients = (gradient / self.num_images).unflatten(0, (columns, count)).transpose(0, 1)
        return objectives, (gradients + penalties[:, None, None] * penalised).flatten(1)

    def _inverse_curvature(self, penalties: Tensor) -> Tensor:
        """Inverse of the Hessian's diagonal where all images have the classes' shares as probabilities, [G, P]."""
        shares = torch.bincount(self.targets, minlength=self.num_classes).double() / self.num_images
        spread = (shares * (1 - shares)).clamp(min=1 / self.num_images)[: self.num_columns]  # [K]
        variances = torch.cat([self.variances, self.variances.new_ones(1)])  # [A + 1]
        floor = penalties[:, None].repeat(1, len(variances))  # [G, A + 1]
        floor[:, -1] = 0
        return 1 / (spread[:, None] * variances + floor[:, None, :]).flatten(1)

    def _turned(self, values: Tensor) -> Tensor:
        data = torch.ones(len(values), len(self.variances) + 1, dtype=self.dtype, device=self.device)
        for part, place in zip(values.split(_ROWS), data.split(_ROWS), strict=True):
            place[:, :-1] = (part.to(self.device).double() - self.mean) @ self.axes
        return data

    def _turned_back(self, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Weight [classes, D] and bias [classes] for features as they are, from those for principal coordinates."""
        weight = weights[:, :-1] @ self.axes.T
        bias = weights[:, -1] - weight @ self.mean
        if self.num_columns == 1:  # of two classes, the first has logits 0
            weight, bias = torch.cat([torch.zeros_like(weight), weight]), torch.cat([torch.zeros_like(bias), bias])
        return weight.cpu(), bias.cpu()


def _num_columns(num_classes: int) -> int:
    return 1 if num_classes == 2 else num_classes


def _principal_axes(values: Tensor, *, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Mean [D], principal axes [D, A] and variances along them [A] of features, float64; no axes without variance."""
    mean = torch.zeros(values.shape[1], dtype=torch.float64, device=device)
    for part in values.split(_ROWS):
        mean += part.to(device).double().sum(dim=0)
    mean /= len(values)
    covariance = torch.zeros(values.shape[1], values.shape[1], dtype=torch.float64, device=device)
    for part in values.split(_ROWS):
        centred = part.to(device).double() - mean
        covariance += centred.T @ centred
    variances, axes = torch.linalg.eigh(covariance / len(values))
    kept = variances > _LEAST_VARIANCE * variances[-1].clamp(min=0)
    return mean, axes[:, kept].contiguous(), variances[kept]


def _loss(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropies [g, rows] and their gradients [K, g, rows], exact to rounding for probabilities near 0 and 1.

    The logits [K, g, rows] are overwritten.
    """
    place = targets.expand(1, *logits.shape[1:])
    above = logits.sub_(logits.gather(0, place)).scatter_(0, place, -torch.inf)  # the right class's logit
    largest = above.amax(dim=0)
    powers = above.sub_(largest).exp_()
    excess = largest + powers.sum(dim=0).log()  # log of the odds against the right class
    loss = F.softplus(excess, threshold=_LINEAR_FROM)
    residual = powers.mul_((largest - loss).exp())
    return loss, residual.scatter_(0, place, -excess.sigmoid()[None])


def _loss_of_two(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """The same with the second class's logits [1, g, rows] alone; the first's are 0."""
    sign = 1 - 2 * targets.to(logits.dtype)  # of the wrong class's logit over the right one's
    return F.softplus(logits[0] * sign, threshold=_LINEAR_FROM), sign * (logits * sign).sigmoid()
