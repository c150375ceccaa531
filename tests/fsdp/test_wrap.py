"""Sharded training agrees with training on one process, for every strategy."""

from types import SimpleNamespace

import pytest
import torch
from support.dist import run_distributed
from support.toy_fsdp import make_toy
from torch import nn

from dinov2 import distributed, fsdp
from dinov2.errors import CheckpointError, ConfigError

MAX_NORM = 0.05
STRATEGIES = ["NO_SHARD", "SHARD_GRAD_OP", "FULL_SHARD", "HYBRID_SHARD"]


def _shard_toy(toy, **options):
    fsdp.shard(toy["backbone"], forward_methods=["features"], **options)
    fsdp.shard(toy["head"], **options)
    return toy


def _toy_without_memory():
    with torch.device("meta"):
        return make_toy()


def _train(student, teacher):
    """Steps with accumulation, an empty head batch, clipping and EMA; returns norms and teacher outputs."""
    rank, world_size = distributed.get_rank(), distributed.get_world_size()
    optimizer = torch.optim.AdamW([p for p in student.parameters() if p.requires_grad], lr=0.1)
    generator = torch.Generator().manual_seed(1)
    norms, outputs = [], []
    for _ in range(3):
        for _ in range(2):  # micro-batches
            mine = torch.randn(4 * world_size, 3, generator=generator).chunk(world_size)[rank]
            with torch.no_grad():
                target = teacher["head"](teacher["backbone"](mine)["features"])
            out = student["backbone"](mine)
            loss = (student["head"](out["features"]) - target - 1).square().sum() / 4 + out["penalty"]
            # the last rank's share of this head's batch is empty
            extra = student["head"](out["features"][:0] if rank == world_size - 1 else out["features"])
            (loss + extra.sum() / 8).backward()
        norms.append(fsdp.clip_grad_norm_(student.parameters(), MAX_NORM))
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            torch._foreach_lerp_(*fsdp.local_tensor_pairs(teacher, student), 0.3)
            outputs.append(teacher["head"](teacher["backbone"](torch.ones(1, 3))["features"]).clone())
    return norms, outputs


def _reference(world_size):
    """The same training on whole modules in this process, the ranks' losses averaged."""
    student, teacher = make_toy(1), make_toy(2)
    optimizer = torch.optim.AdamW([p for p in student.parameters() if p.requires_grad], lr=0.1)
    generator = torch.Generator().manual_seed(1)
    norms, outputs = [], []
    for _ in range(3):
        for _ in range(2):
            batch = torch.randn(4 * world_size, 3, generator=generator)
            for rank, mine in enumerate(batch.chunk(world_size)):
                with torch.no_grad():
                    target = teacher["head"](teacher["backbone"](mine)["features"])
                out = student["backbone"](mine)
                loss = (student["head"](out["features"]) - target - 1).square().sum() / 4 + out["penalty"]
                if rank < world_size - 1:
                    loss = loss + student["head"](out["features"]).sum() / 8
                (loss / world_size).backward()
        norms.append(nn.utils.clip_grad_norm_(student.parameters(), MAX_NORM))
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            for mine, other in zip(teacher.parameters(), student.parameters(), strict=True):
                if mine.is_floating_point():
                    mine.lerp_(other, 0.3)
            outputs.append(teacher["head"](teacher["backbone"](torch.ones(1, 3))["features"]))
    return norms, outputs, student, teacher


def train_sharded(strategies, hybrid_shard_size=None):
    rank, world_size = distributed.get_rank(), distributed.get_world_size()
    norms, outputs, ref_student, ref_teacher = _reference(world_size)
    results = {}
    for strategy in strategies:
        options = {"strategy": strategy, "hybrid_shard_size": hybrid_shard_size}
        student, teacher = _shard_toy(make_toy(1), **options), _shard_toy(make_toy(2), **options)
        teacher.requires_grad_(False)
        own_norms, own_outputs = _train(student, teacher)
        states = [fsdp.full_state_dict(module) for module in (student, teacher)]
        difference = 0.0
        for state, reference in zip(states, (ref_student, ref_teacher), strict=True):
            assert (state is None) == (rank > 0)
            if state is not None:
                assert list(state) == list(reference.state_dict())
                for name, tensor in reference.state_dict().items():
                    difference = max(difference, (state[name] - tensor).abs().max().item())
        # whole tensors loaded into another sharded module, built without memory, come out again
        copy = _shard_toy(_toy_without_memory(), **options)
        copy.to_empty(device="cpu")
        fsdp.load_full_state_dict(copy, states[0])
        again = fsdp.full_state_dict(copy)
        twin = _shard_toy(make_toy(3), **options)
        fsdp.copy_local_state(twin, copy)
        twins = fsdp.full_state_dict(twin)
        features = copy["backbone"].features(torch.ones(2, 3))
        # the same state given on every rank
        everywhere = distributed.broadcast_object(states[1])
        fsdp.load_full_state_dict(copy, everywhere)
        again_teacher = fsdp.full_state_dict(copy)
        results[strategy] = {
            "norms": own_norms,
            "outputs": own_outputs,
            "difference": difference,
            "reload": rank > 0
            or all(
                torch.equal(again[k], states[0][k])
                and torch.equal(again_teacher[k], states[1][k])
                and torch.equal(twins[k], states[0][k])
                for k in again
            ),
            "features": features.detach(),
            "rows": [t.shape[0] for t in fsdp.local_tensors(copy["head"])],
            "unlimited": fsdp.clip_grad_norm_(student.parameters(), None),
            "moved": (own_outputs[0] - own_outputs[1]).abs().max().item(),
        }
    return {
        "results": results,
        "norms": norms,
        "outputs": outputs,
        "features": ref_student["backbone"].features(torch.ones(2, 3)).detach(),
    }


@pytest.mark.dist
@pytest.mark.parametrize(
    ("num_processes", "strategies", "rows"),
    [
        (2, STRATEGIES, {"NO_SHARD": [6, 6, 5], "FULL_SHARD": [3, 3, 2], "HYBRID_SHARD": [3, 3, 2]}),
        (4, ["NO_SHARD", "FULL_SHARD", "HYBRID_SHARD"], {"FULL_SHARD": [0, 0, 0], "HYBRID_SHARD": [3, 3, 2]}),
    ],
)
def test_sharded_training_equals_one_process(num_processes, strategies, rows):
    ranks = run_distributed(
        train_sharded, num_processes=num_processes, args={"strategies": strategies, "hybrid_shard_size": 2}
    )
    for rank in ranks:
        for strategy, found in rank["results"].items():
            assert found["norms"][0].shape == () and type(found["norms"][0]) is torch.Tensor
            torch.testing.assert_close(found["norms"], rank["norms"], rtol=1e-5, atol=0, msg=strategy)
            # AdamW's first steps divide gradients by their own size, which magnifies rounding
            torch.testing.assert_close(found["outputs"], rank["outputs"], rtol=1e-3, atol=1e-4, msg=strategy)
            assert found["difference"] < 1e-4
            assert found["reload"]
            torch.testing.assert_close(found["features"], rank["features"], rtol=1e-3, atol=1e-4)
            assert found["moved"] > 1e-3  # the EMA reached the teacher's next forward pass
            assert found["unlimited"] == 0
    for strategy, last_rank_rows in rows.items():
        found = ranks[-1]["results"][strategy]["rows"]
        assert found == last_rank_rows, strategy
    first = ranks[0]["results"]["NO_SHARD"]["norms"]
    for rank in ranks:
        for found in rank["results"].values():
            torch.testing.assert_close(found["norms"], first, rtol=1e-6, atol=0)


def _refuse_damaged(tensor):
    raise CheckpointError("a file is damaged")


def scale_and_refuse():
    results = {"errors": []}
    for strategy in STRATEGIES[:3]:
        for fused in (False, True):
            toy = _shard_toy(make_toy(1), strategy=strategy, param_dtype=torch.float16)
            optimizer = torch.optim.AdamW([p for p in toy.parameters() if p.requires_grad], lr=0.1, fused=fused)
            scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
            before = fsdp.full_state_dict(toy)
            for poisoned in (True, False):
                out = toy["head"](toy["backbone"](torch.ones(2, 3))["features"])
                scaler.scale(out.sum()).backward()
                if poisoned:  # one element on the last rank only
                    rows = fsdp.local_tensors([toy["head"].last_layer.weight.grad])[0]
                    rows[-1, -1] = torch.inf if distributed.get_rank() == 1 or strategy == "NO_SHARD" else 1.0
                scaler.unscale_(optimizer)
                norm = fsdp.clip_grad_norm_(toy.parameters(), 1.0)
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad()
                after = fsdp.full_state_dict(toy)
                changed = before is not None and any(not torch.equal(before[k], after[k]) for k in before)
                results[f"{strategy} {fused} {poisoned}"] = [scaler.get_scale(), norm.isfinite().item(), changed]

    def refuse(call):
        try:
            call()
        except (CheckpointError, ConfigError, ValueError) as error:
            results["errors"].append(f"{type(error).__name__}: {error}")

    toy = _shard_toy(make_toy(1), strategy="FULL_SHARD")
    state = distributed.broadcast_object(fsdp.full_state_dict(toy))
    refuse(lambda: fsdp.load_full_state_dict(toy, {"other": torch.zeros(1)} | dict(list(state.items())[1:])))
    refuse(lambda: fsdp.load_full_state_dict(toy, state | {"head.mlp.bias": torch.zeros(7)}))
    mine = state if distributed.is_main_process() else None
    refuse(lambda: fsdp.load_full_state_dict(toy, mine, read=_refuse_damaged))
    refuse(lambda: fsdp.shard(nn.Linear(2, 2), strategy="FULL"))
    refuse(lambda: fsdp.shard(nn.Linear(2, 2), strategy="HYBRID_SHARD", hybrid_shard_size=3))
    trainable_scalar = nn.Linear(2, 2)
    trainable_scalar.temperature = nn.Parameter(torch.tensor(1.0))
    refuse(lambda: fsdp.shard(trainable_scalar, strategy="FULL_SHARD"))
    refuse(lambda: fsdp.local_tensor_pairs(nn.Linear(2, 2), nn.Linear(2, 2, bias=False)))
    low = make_toy(1)
    _shard_toy(low, strategy="SHARD_GRAD_OP", param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    out = low["head"](low["backbone"](torch.ones(2, 3))["features"])
    out.sum().backward()
    weight = low["head"].mlp.weight
    results["dtypes"] = [str(t.dtype) for t in (out, weight, weight.grad)]
    return results


@pytest.mark.dist
def test_ranks_agree_on_overflow_and_on_errors():
    first, second = run_distributed(scale_and_refuse)
    for strategy in STRATEGIES[:3]:
        for fused in (False, True):
            # overflow on one rank halves the scale and skips the step on both
            assert first[f"{strategy} {fused} True"] == [4.0, False, False]
            assert second[f"{strategy} {fused} True"] == [4.0, False, False]
            assert first[f"{strategy} {fused} False"] == [4.0, True, True]
            assert second[f"{strategy} {fused} False"][:2] == [4.0, True]
    assert first["errors"] == second["errors"]
    assert first["errors"] == [
        "CheckpointError: weights do not fit the model: 1 missing (first: backbone.scale), 1 unexpected (first: other)",
        "CheckpointError: weights do not fit the model: head.mlp.bias has shape [7], the model needs [6]",
        "CheckpointError: a file is damaged",
        "ValueError: strategy=FULL: must be one of NO_SHARD, SHARD_GRAD_OP, FULL_SHARD, HYBRID_SHARD",
        "ConfigError: compute_precision.hybrid_shard_size=3: 2 processes cannot be split into groups of 3; "
        "choose a divisor of 2",
        "ValueError: parameter temperature has no axes; give it shape [1] so that its gradient can be averaged",
        "ValueError: modules differ in bias",
    ]
    assert first["dtypes"] == ["torch.bfloat16", "torch.float32", "torch.float32"]


def test_one_process_needs_no_sharding():
    toy = make_toy(1)
    backbone = toy["backbone"]
    assert fsdp.shard(backbone, strategy="FULL_SHARD") is backbone
    assert type(backbone.embed.weight) is nn.Parameter
    state = fsdp.full_state_dict(toy)
    other = _toy_without_memory().to_empty(device="cpu")
    asked = []

    def read(name_and_tensor):
        asked.append(name_and_tensor.name)
        return name_and_tensor.tensor

    entries = {name: SimpleNamespace(name=name, tensor=t, shape=t.shape) for name, t in state.items()}
    fsdp.load_full_state_dict(other, entries, read=read)
    assert asked == list(state)
    assert all(torch.equal(value, state[name]) for name, value in other.state_dict().items())
    toy["head"](backbone(torch.ones(2, 3))["features"]).sum().backward()
    reference = [p.grad.clone() for p in toy.parameters() if p.grad is not None]
    expected = nn.utils.get_total_norm(reference)
    params = list(toy.parameters())
    torch.testing.assert_close(fsdp.grad_norms([params[:3], params[3:], []]).square().sum().sqrt(), expected)
    torch.testing.assert_close(fsdp.clip_grad_norm_(params, float("inf")), expected)
    torch.testing.assert_close(fsdp.clip_grad_norm_(params, 0.1), expected)
    torch.testing.assert_close(fsdp.clip_grad_norm_(params, None), torch.tensor(0.1), rtol=1e-4, atol=0)
