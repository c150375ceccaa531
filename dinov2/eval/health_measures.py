"""How healthy features are, from the features alone: nobody needs to have labelled an image.

| measure | says | healthy | collapsed |
| --- | --- | --- | --- |
| RankMe, effective rank | how many directions the features use | many | few |
| feature std | how far unit features spread; 1 - its square is the mean cosine of two images | towards 1 | 0 |
| uniformity | how evenly unit features cover the sphere | -3 to -4 | 0 |
| alignment | how far two crops of one image lie apart | small beside 2 | 0 too: read it with uniformity |
| neighbour overlap | what share of an image's nearest neighbours two networks have in common | | |

All is computed in float64. n images, D features.

Source: RankMe, Garrido et al. 2023, arXiv:2210.02885; effective rank, Roy and Vetterli 2007; alignment and uniformity,
Wang and Isola 2020, arXiv:2005.10242; participation ratio, Gao et al. 2017, doi:10.1101/214262.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

_ROWS_AT_ONCE = 4096
_RANKME_EPSILON = 1e-7  # of the paper, added to each share


def singular_values(values: Tensor, *, is_centred: bool) -> Tensor:
    """Find the singular values of a matrix of features.

    They are roots of the eigenvalues of a D x D or n x n matrix, whichever is smaller; those below 1e-8 of the largest
    are rounding noise.

    Args:
        values: [n, D], any float dtype; left unchanged.
        is_centred: take the mean of all images away first.

    Returns:
        [min(n, D)] float64, on the CPU, largest first.

    Cost: about n * D * min(n, D) multiplications and memory for min(n, D) squared numbers.
    """
    mean = torch.zeros(values.shape[1], dtype=torch.float64)
    if is_centred:
        mean = sum((rows.double().cpu().sum(dim=0) for rows in values.split(_ROWS_AT_ONCE)), mean) / len(values)
    if len(values) < values.shape[1]:
        rows = values.double().cpu() - mean
        products = rows @ rows.T  # [n, n]
    else:
        products = torch.zeros(values.shape[1], values.shape[1], dtype=torch.float64)
        for part in values.split(_ROWS_AT_ONCE):
            rows = part.double().cpu() - mean
            products.addmm_(rows.T, rows)  # [D, D]
    return torch.linalg.eigvalsh(products).clamp_(min=0).sqrt_().flip(0)


def rankme(singular: Tensor) -> float:
    """Turn singular values of features, not centred, into a smooth number of directions: exp of their shares' entropy.

    Returns:
        1 (all images alike but for their lengths) to min(n, D); 0 where all features are 0. It grows with n as long as
        n is not far above D, so compare numbers of one n.
    """
    return _exp_entropy(singular, epsilon=_RANKME_EPSILON)


def effective_rank(singular: Tensor) -> float:
    """Turn singular values of centred features into a smooth number of directions, in which images differ.

    Unlike RankMe it does not see a mean that all images share: a network all of whose features are nearly the same has
    a RankMe near 1, but may differ in many directions, only by little.
    """
    return _exp_entropy(singular, epsilon=0.0)


def _exp_entropy(singular: Tensor, *, epsilon: float) -> float:
    if singular.sum() == 0:
        return 0.0
    shares = singular / singular.sum() + epsilon
    return torch.special.entr(shares).sum().exp().item()


def participation_ratio(singular: Tensor) -> float:
    """Turn singular values of centred features into the number of equally strong directions that would vary as they do.

    Returns:
        (sum of variances) squared over sum of squared variances, 1 to min(n, D); 0 where all images are alike. Weak
        directions count for less than in the effective rank.
    """
    if singular.sum() == 0:
        return 0.0
    shares = singular.square() / singular.square().sum()
    return 1 / shares.square().sum().item()


def feature_std(values: Tensor) -> float:
    """Measure how far unit features spread around their mean: 1 = over the whole sphere, 0 = collapsed to a point.

    The same measure is recorded in each step of training, there of one batch of augmented crops.
    """
    return max(0.0, 1 - _mean_of_unit(values).square().sum().item()) ** 0.5


def mean_cosine(values: Tensor) -> float:
    """Average the cosine of two different images over all pairs; n >= 2."""
    num = len(values)
    return (num * num * _mean_of_unit(values).square().sum().item() - num) / (num * (num - 1))


def _mean_of_unit(values: Tensor) -> Tensor:
    total = torch.zeros(values.shape[1], dtype=torch.float64)
    for rows in values.split(_ROWS_AT_ONCE):
        total += F.normalize(rows.double().cpu(), dim=1).sum(dim=0)
    return total / len(values)


def alignment(one: Tensor, other: Tensor) -> float:
    """Average the squared distance of the unit features of two views of each image.

    Args:
        one: features of the first views, [n, D].
        other: of the second views of the same images, in the same order.

    Returns:
        0 (the views make no difference) to 4; 2 where they have nothing in common.
    """
    return (F.normalize(one.double(), dim=1) - F.normalize(other.double(), dim=1)).square().sum(dim=1).mean().item()


def neighbour_overlap_pct(one: Tensor, other: Tensor) -> float:
    """Say which share of an image's nearest neighbours two networks agree on, in percent, as the mean over images.

    Args:
        one: places of the neighbours of each image, [n, k], no place twice in a row.
        other: places by another network, [n, k].
    """
    is_common = (one[:, :, None] == other[:, None, :]).any(dim=2)  # [n, k]
    return 100 * is_common.double().mean().item()
