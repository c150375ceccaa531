"""What do heads that start from the images, and queues for Sinkhorn-Knopp, change in the first step of a small batch?

Takes two global crops of each image, as training makes them, through a pretrained backbone, and heads over it, and
measures before any training, on images that the heads have not seen.

For heads with random weights and heads started by prototype_init=kmeans:

- knn_pct: 10-NN accuracy of labels in the heads' bottleneck (beside it: of the backbone's class tokens).
- entropy: of the targets that Sinkhorn-Knopp makes of a batch, in nats; log K is no target at all.
- match_pct: how often the nearest neighbour of an image's first crop, among the second crops of 256 images, is the same
  image's, before and after one step of the class tokens against the gradient that the head sends them, a fifth of
  their length. That is what the loss is there for; what it does to a backbone begins with it.
- stepped_knn_pct: 10-NN accuracy of the class tokens after that step.

For targets of small passes, with queues of several sizes over started heads: how far they are from those that the same
images get in one large pass (total variation, 0 the same, 1 nothing in common), and their entropy. The queue's features
are of the same network, as at the start of a run.

    python benchmarks/small_batches.py --weights dinov2_vits14.pth --dataset ImageFolder:root=photos [--images 768]
"""

import argparse
import json
import statistics
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from dinov2.configs import load_config
from dinov2.data.random_streams import shuffled
from dinov2.data.samples import TrainingSamples
from dinov2.eval.build import build_backbone
from dinov2.hub.weights import load_backbone_weights
from dinov2.layers.dino_head import DINOHead
from dinov2.loss import DINOLoss
from dinov2.loss.assignments import sinkhorn
from dinov2.train.build import build_augmentation, build_dataset
from dinov2.train.prototype_init import start_head

CPU = torch.device("cpu")
PER_PASS = 32
POOL = 256  # images that are measured; the others are clustered and are neighbours
TEMPERATURE = 0.05
STEP = 0.2  # of a class token's length
REPEATS = 3  # draws of the heads
QUEUES = (0, 64, 128, 384)  # images


def main() -> None:
    """Measure, print a table and one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", required=True, help="of a ViT-S/14")
    parser.add_argument("--dataset", required=True, help="labelled images, as train.dataset_path")
    parser.add_argument("--images", type=int, default=768, help="of them, at random; default: 768")
    parser.add_argument("--size", type=int, default=56, help="of a crop, px; default: 56")
    parser.add_argument("--prototypes", type=int, default=1024, help="of a head; default: 1024")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        views, labels = class_tokens(options, folder=folder)
    baseline = {"backbone_knn_pct": knn_pct(views[0], labels), "match_pct": match_pct(*views[:, -POOL:])}
    results = {
        f"{kind} batch={batch}": median(
            [
                measure(views, labels, kind=kind, batch=batch, num_prototypes=options.prototypes, seed=seed)
                for seed in range(REPEATS)
            ]
        )
        for batch in (16, 64)
        for kind in ("random", "kmeans")
    }
    print("before: " + "  ".join(f"{key}={value:.2f}" for key, value in baseline.items()))
    for name, values in results.items():
        print(f"{name:18s}" + "  ".join(f"{key}={value:.2f}" for key, value in values.items()))
    targets = {
        f"targets batch={batch} queue={queue}": values
        for batch in (4, 16)
        for queue, values in targets_beside(views, batch=batch, num_prototypes=options.prototypes).items()
    }
    for name, values in targets.items():
        print(f"{name:28s}" + "  ".join(f"{key}={value:.3f}" for key, value in values.items()))
    results |= targets
    print(json.dumps({"options": vars(options), "torch": str(torch.__version__), "before": baseline, **results}))


def class_tokens(options: argparse.Namespace, *, folder: str) -> tuple[Tensor, Tensor]:
    """Class tokens of two crops of each image, [2, images, D], and labels [images]; `folder` is for lists of files."""
    cfg = load_config(
        None,
        [
            "student.arch=vit_small",
            "student.patch_size=14",
            f"student.pretrained_weights={options.weights}",
            f"crops.global_crops_size={options.size}",
            "crops.local_crops_number=0",
            f"train.dataset_path={options.dataset}",
        ],
    )
    backbone = build_backbone(cfg).eval()
    load_backbone_weights(backbone, options.weights, allow_partial=True)
    dataset, augmentation = build_dataset(cfg, output_dir=Path(folder)), build_augmentation(cfg)
    samples = TrainingSamples(dataset, augmentation, seed=0)
    places = shuffled(len(dataset), 0)[: options.images].tolist()
    parts = []
    for first in range(0, len(places), PER_PASS):
        batch = [samples[place, place] for place in places[first : first + PER_PASS]]
        crops = augmentation.stack([sample.crops for sample in batch])
        finished = augmentation.finish(crops, torch.tensor([sample.seed for sample in batch]))
        with torch.no_grad():
            tokens = backbone(finished["collated_global_crops"], is_training=True)["x_norm_clstoken"]
        parts.append(tokens.unflatten(0, (2, -1)))
    return torch.cat(parts, dim=1), torch.tensor([int(dataset[place][1]) for place in places])


def measure(
    views: Tensor, labels: Tensor, *, kind: str, batch: int, num_prototypes: int, seed: int
) -> dict[str, float]:
    """Measure one draw of a head."""
    generator = torch.Generator().manual_seed(seed)
    head, loss = DINOHead(views.shape[2], num_prototypes), DINOLoss(num_prototypes)
    head.init_weights(generator)
    if kind == "kmeans":
        start_head(head, views[0, :-POOL], generator=generator, device=CPU)
    pool, stepped, entropies = views[:, -POOL:], [], []
    for start in range(0, POOL, batch):
        x = pool[:, start : start + batch].flatten(0, 1).requires_grad_()
        with torch.no_grad():
            targets = loss.sinkhorn_knopp_teacher(head(x), TEMPERATURE)
        entropies.append(torch.special.entr(targets.dense()).sum(dim=1).mean().item())
        (gradient,) = torch.autograd.grad(head(x, loss.criterion(targets, num_local_crops=0))[0], x)
        moved = x.detach() - STEP * x.detach().norm(dim=1, keepdim=True) * F.normalize(gradient, dim=1)
        stepped.append(moved.unflatten(0, (2, -1)))
    after = torch.cat(stepped, dim=1)
    with torch.no_grad():
        bottleneck = head.mlp(views[0])
    return {
        "knn_pct": knn_pct(bottleneck, labels),
        "entropy": statistics.mean(entropies),
        "match_pct": match_pct(*after),
        "stepped_knn_pct": knn_pct(torch.cat([views[0, :-POOL], after[0]]), labels),
    }


@torch.no_grad()
def targets_beside(views: Tensor, *, batch: int, num_prototypes: int) -> dict[int, dict[str, float]]:
    """Measure the targets of passes of `batch` images, by the number of images in the queue, against those of all."""
    generator, head = torch.Generator().manual_seed(0), DINOHead(views.shape[2], num_prototypes)
    head.init_weights(generator)
    clustered, others = views[:, :POOL], views[:, POOL:]  # a crop that prototypes were made of is like no other one
    start_head(head, clustered[0], generator=generator, device=CPU)
    scores = head(others.transpose(0, 1).flatten(0, 1)).unflatten(0, (-1, 2))  # [images, 2, K]

    def assign(start: int, stop: int, *, queue: int = 0) -> Tensor:
        past = scores[start - queue : start].flatten(0, 1)
        given = (past.clone(), torch.ones(len(past), dtype=torch.bool)) if queue else None
        return sinkhorn(scores[start:stop].flatten(0, 1).clone(), temperature=TEMPERATURE, past=given).dense()

    last = len(scores)
    large = assign(0, last).unflatten(0, (last, 2))
    found = {}
    for queue in QUEUES:
        distances, entropies = [], []
        for start in range(last - POOL // 2, last, batch):
            small = assign(start, start + batch, queue=queue)
            distances.append((small - large[start : start + batch].flatten(0, 1)).abs().sum(dim=1).mean().item() / 2)
            entropies.append(torch.special.entr(small).sum(dim=1).mean().item())
        found[queue] = {"distance": statistics.mean(distances), "entropy": statistics.mean(entropies)}
    return found


def knn_pct(features: Tensor, labels: Tensor, *, k: int = 10) -> float:
    """Accuracy of the last POOL rows among the others, by the votes of k neighbours weighed with exp(cosine / 0.07)."""
    rows = F.normalize(features, dim=1)
    cosines, nearest = (rows[-POOL:] @ rows[:-POOL].T).topk(k, dim=1)
    votes = torch.zeros(POOL, int(labels.max()) + 1).scatter_add_(1, labels[nearest], (cosines / 0.07).exp())
    return 100 * (votes.argmax(dim=1) == labels[-POOL:]).float().mean().item()


def match_pct(first: Tensor, second: Tensor) -> float:
    """How often the second view nearest to a first one is of the same image; both centred."""
    first, second = (F.normalize(view - view.mean(dim=0), dim=1) for view in (first, second))
    return 100 * ((first @ second.T).argmax(dim=1) == torch.arange(len(first))).float().mean().item()


def median(results: list[dict[str, float]]) -> dict[str, float]:
    """Take the median of each measure."""
    return {key: statistics.median(result[key] for result in results) for key in results[0]}


if __name__ == "__main__":
    main()
