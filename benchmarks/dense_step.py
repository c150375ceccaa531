"""A training step written the plain way: every matrix of scores and assignments exists in full.

It uses the networks of an `SSLMetaArch` and gives the same losses and gradients. The benchmark measures against it and
the tests compare with it.

Shapes: B images, L local crops, M masked patches, K prototypes.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from dinov2.train.ssl_meta_arch import SSLMetaArch

STUDENT_TEMP = 0.1


def dense_sinkhorn(scores: Tensor, *, temperature: float, num_steps: int = 3) -> Tensor:
    """Sinkhorn-Knopp that rewrites the matrix [N, K] in every half step."""
    q = torch.exp(scores.float() / temperature).T  # [K, N]
    num_prototypes, num_rows = q.shape
    q /= q.sum()
    for _ in range(num_steps):
        q /= q.sum(dim=1, keepdim=True)
        q /= num_prototypes
        q /= q.sum(dim=0, keepdim=True)
        q /= num_rows
    return (q * num_rows).T


def dense_forward_backward(model: SSLMetaArch, images: dict[str, Tensor], *, teacher_temp: float) -> Tensor:
    """Run one step with Sinkhorn-Knopp targets and add up gradients; returns the total loss, 0-dim."""
    global_crops, local_crops = images["collated_global_crops"], images["collated_local_crops"]
    masks, indices = images["collated_masks"], images["mask_indices_list"]
    num_images = len(global_crops) // 2
    patch_head = "ibot_head" if "ibot_head" in model.student else "dino_head"

    with torch.no_grad():
        tokens = model.teacher["backbone"](global_crops, is_training=True)
        scores = model.teacher["dino_head"](tokens["x_norm_clstoken"])
        cls_targets = dense_sinkhorn(scores, temperature=teacher_temp).unflatten(0, (2, num_images))  # [2, B, K]
        masked = tokens["x_norm_patchtokens"].flatten(0, 1)[indices]
        patch_targets = dense_sinkhorn(model.teacher[patch_head](masked), temperature=teacher_temp)  # [M, K]

    student_global = model.student["backbone"](global_crops, masks=masks, is_training=True)
    student_local = model.student["backbone"](local_crops, is_training=True)
    global_cls = student_global["x_norm_clstoken"]
    scores = model.student["dino_head"](torch.cat([global_cls, student_local["x_norm_clstoken"]]))
    log_p = F.log_softmax(scores.float() / STUDENT_TEMP, dim=-1).unflatten(0, (-1, num_images))  # [2 + L, B, K]
    pairs = -torch.einsum("sbk,tbk->st", log_p, cls_targets) / num_images  # [2 + L, 2]
    num_local = len(log_p) - 2
    dino = (pairs[2:].sum() + pairs[0, 1] + pairs[1, 0]) / (2 + max(2 * num_local, 1))

    masked = student_global["x_norm_patchtokens"].flatten(0, 1)[indices]
    log_p = F.log_softmax(model.student[patch_head](masked).float() / STUDENT_TEMP, dim=-1)
    ibot = -((patch_targets * log_p).sum(dim=-1) * images["masks_weight"]).sum() / len(global_crops)

    koleo = sum(model.koleo_loss(crop) for crop in global_cls.chunk(2))
    total = model.dino_loss_weight * dino + model.ibot_loss_weight * ibot + model.koleo_loss_weight * koleo
    total.backward()
    return total.detach()
