"""Clip gradients per sub-module and decide, on all ranks together, whether the step may be taken."""

import logging
import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dinov2.distributed import all_gather_objects, all_reduce_max
from dinov2.errors import TrainingError
from dinov2.fsdp import clip_grad_norm_

logger = logging.getLogger(__name__)

_MAX_CANCELLED_IN_A_ROW = 3


@dataclass(frozen=True)
class Verdict:
    """What all ranks agreed on after the backward pass of a step."""

    is_finite: bool  # loss and gradients are finite on every rank
    stop: bool  # some rank was asked to stop
    save_due: bool = False  # some rank finds that it is time to save
    failed: bool = False  # some rank could not write its part of a checkpoint


def clip_gradients(student: nn.ModuleDict, *, max_norm: float | None) -> dict[str, Tensor]:
    """Scale the gradients of each sub-module to a norm of at most `max_norm`, in place.

    Returns:
        Norms before clipping, 0-dim, over all ranks: one per sub-module, and `grad_norm` of all together.
    """
    norms = {
        f"grad_norm_{name}": clip_grad_norm_(module.parameters(), max_norm or None) for name, module in student.items()
    }
    norms["grad_norm"] = torch.linalg.vector_norm(torch.stack(list(norms.values())))
    return norms


def agree(loss: Tensor, grad_norm: Tensor, *, stop: bool, save_due: bool = False, failed: bool = False) -> Verdict:
    """Find out whether every rank is fine and what any of them asks for.

    Args:
        loss: of this rank, 0-dim.
        grad_norm: of this rank, 0-dim.
        stop: this rank was asked to stop.
        save_due: this rank finds that it is time to save.
        failed: this rank could not write a checkpoint.

    Cost: one all-reduce of 4 floats, one host sync.
    """
    is_bad = ~(torch.isfinite(loss) & torch.isfinite(grad_norm))
    flags = torch.stack([is_bad.float(), *(is_bad.new_full((), flag).float() for flag in (stop, save_due, failed))])
    any_bad, any_stop, any_save_due, any_failed = map(bool, all_reduce_max(flags).tolist())
    return Verdict(is_finite=not any_bad, stop=any_stop, save_due=any_save_due, failed=any_failed)


class CancelledSteps:
    """Count steps cancelled in a row and end the run when there are too many."""

    def __init__(self) -> None:
        self.in_a_row = 0

    def note(self, verdict: Verdict, *, step: int, loss: Tensor, scaler: torch.amp.GradScaler) -> None:
        """Take note of a step.

        Args:
            loss: this rank's loss, 0-dim.
            scaler: while it can lower its scale, overflowing gradients in float16 are no failure.

        Raises:
            TrainingError: three steps in a row had a non-finite loss or gradient.
        """
        if verdict.is_finite:
            self.in_a_row = 0
            return
        bad = [str(rank) for rank, value in enumerate(all_gather_objects(loss.item())) if not math.isfinite(value)]
        if scaler.is_enabled() and not bad and scaler.get_scale() > 1:
            return
        self.in_a_row += 1
        where = f"the loss on rank {', '.join(bad)}" if bad else "the gradients"
        if self.in_a_row >= _MAX_CANCELLED_IN_A_ROW:
            raise TrainingError(
                f"iteration {step}: {where} became NaN or infinite {self.in_a_row} times in a row; nothing of these "
                f"steps was kept. Lower optim.base_lr, lengthen optim.warmup_epochs, or look for broken images; the "
                f"last checkpoint is intact"
            )
        logger.warning("step=%d cancelled: %s became NaN or infinite", step, where)
