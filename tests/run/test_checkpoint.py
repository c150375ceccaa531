"""`run/checkpoint.py`: list, verify, inspect and diff; tables, sentences and exit codes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.toy_fsdp import make_toy
from torch import nn

from dinov2 import checkpoint_format as files
from dinov2 import fsdp
from dinov2.configs import load_config, to_dict
from dinov2.run.checkpoint import main

ROOT = Path(__file__).resolve().parents[2]


class Stateful:
    """Something that is saved per rank."""

    def __init__(self, state):
        self.state = state

    def state_dict(self):
        return self.state


def save(folder, iteration=3, *, change=0.0, settings=(), best=None):
    """Save a run of one process with a step of its optimiser behind it."""
    model = nn.ModuleDict({"student": make_toy(1), "teacher": make_toy(2), "loss": nn.LayerNorm(3)})
    groups = [
        {"params": list(model["student"]["backbone"].embed.parameters()), "lr": 0.1},
        {"params": list(model["student"]["head"].parameters()), "lr": 0.2},
    ]
    optimizer = torch.optim.AdamW(groups)
    with torch.no_grad():
        model["student"]["head"].mlp.bias[1] += change
    for group in groups:
        for param in group["params"]:
            param.grad = torch.ones_like(param)
    optimizer.step()
    cfg = load_config(None, ["checkpointing.period=2", "checkpointing.keep_every=4", *settings])
    checkpointer = fsdp.FSDPCheckpointer(
        model,
        str(folder),
        config_text=json.dumps(to_dict(cfg)),
        config_digest="d1g3s7",
        global_batch_size=24,
        background=False,
        optimizer=optimizer,
        rng=Stateful({"torch": torch.arange(8)}),
    )
    checkpointer.save(files.checkpoint_name(iteration), iteration=iteration, samples_seen=96, metrics={"knn": 80.25})
    checkpointer.close()
    if best:
        files.write_text(folder / "best_checkpoint.json", json.dumps(best))
    return str(folder / files.checkpoint_name(iteration))


def run(capsys, *argv):
    """Return the exit code, the lines printed, and the last line of errors."""
    capsys.readouterr()  # what came before
    code = main([str(text) for text in argv])
    captured = capsys.readouterr()
    return code, captured.out.splitlines(), (captured.err.splitlines() or [""])[-1]


def columns(lines):
    """Split the lines of a table at two or more spaces."""
    return [[cell.strip() for cell in line.split("  ") if cell.strip()] for line in lines]


def flip_byte(path, position):
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


def test_list_shows_what_is_complete_kept_best_and_newest(tmp_path, capsys):
    best = {"name": "model_0000001", "metric": "knn", "value": 80.25}
    for iteration in (1, 3, 5):
        save(tmp_path, iteration, best=best)
    save(tmp_path, 7), save(tmp_path, 9)
    (tmp_path / "model_0000007.rank_0.pth").unlink()
    (tmp_path / "model_0000009.manifest.json").unlink()
    code, lines, err = run(capsys, "list", tmp_path)
    assert (code, err) == (0, "")
    rows = columns(lines)
    assert rows[0] == ["checkpoint", "iteration", "saved (UTC)", "ranks", "strategy", "size", "state"]
    assert [(row[0], row[1], row[3], row[4], row[-1]) for row in rows[1:]] == [
        ("model_0000001", "1", "1", "NO_SHARD", "complete, best (knn=80.25)"),
        ("model_0000003", "3", "1", "NO_SHARD", "complete, kept"),
        ("model_0000005", "5", "1", "NO_SHARD", "complete, newest"),
        ("model_0000007", "7", "?", "?", "damaged: 0 of 1 rank files found, model_0000007.rank_0.pth is missing"),
        ("model_0000009", "9", "?", "?", "incomplete: 1 rank file but no manifest, which is written last"),
    ]
    manifest = files.open_checkpoint(tmp_path, "model_0000001")
    assert rows[1][2] == manifest.time[:19].replace("T", " ") and rows[1][5].endswith(" kB")
    listed = json.loads("\n".join(run(capsys, "list", tmp_path, "--json")[1]))
    assert listed[0] == {
        "name": "model_0000001",
        "iteration": 1,
        "saved": manifest.time[:19],
        "ranks": 1,
        "strategy": "NO_SHARD",
        "size_bytes": sum(path.stat().st_size for path in tmp_path.glob("model_0000001.*")),
        "state": "complete",
        "problem": None,
        "marks": ["best (knn=80.25)"],
    }


def test_list_of_nothing(tmp_path, capsys):
    sentence = f"error: {tmp_path}: holds no checkpoint of a training run"
    assert run(capsys, "list", tmp_path) == (1, [], sentence)
    missing = tmp_path / "missing"
    assert run(capsys, "list", missing)[::2] == (1, f"error: {missing}: is no folder; give the folder of a run")


def test_verify_finds_sound_checkpoints_sound(tmp_path, capsys):
    save(tmp_path, 3), save(tmp_path, 5)
    size = (tmp_path / "model_0000003.rank_0.pth").stat().st_size / 1000
    sound = [f"{tmp_path}/model_000000{number} (1 file, {size:.1f} kB): sound" for number in (3, 5)]
    assert run(capsys, "verify", tmp_path) == (0, sound, "")
    assert run(capsys, "verify", tmp_path / "model_0000005.rank_0.pth") == (0, sound[1:], "")


def test_verify_names_the_file_and_the_tensors_of_a_flipped_byte(tmp_path, capsys):
    save(tmp_path, 3)
    path = tmp_path / "model_0000003.rank_0.pth"
    place = path.read_bytes().index(make_toy(2)["backbone"].embed.weight.detach().numpy().tobytes())
    flip_byte(path, place)
    code, lines, err = run(capsys, "verify", tmp_path)
    assert (code, err) == (1, "error: 1 of 1 checkpoint not sound")
    assert lines[0].startswith(
        f"{path}: bytes 0 to {path.stat().st_size - 1} do not match their checksum (there: model/"
    )


def test_verify_finds_any_flipped_byte(tmp_path, capsys):
    save(tmp_path, 3)
    for path in (tmp_path / "model_0000003.rank_0.pth", tmp_path / "model_0000003.manifest.json"):
        for position in range(0, path.stat().st_size, path.stat().st_size // 20):
            flip_byte(path, position)
            assert run(capsys, "verify", tmp_path / "model_0000003")[0] == 1, (path, position)
            flip_byte(path, position)
    assert run(capsys, "verify", tmp_path)[0] == 0


def test_verify_goes_on_after_a_damaged_checkpoint(tmp_path, capsys):
    save(tmp_path, 3), save(tmp_path, 5), save(tmp_path, 7)
    os.truncate(tmp_path / "model_0000003.rank_0.pth", 10)
    (tmp_path / "model_0000005.rank_0.pth").unlink()
    size = (tmp_path / "model_0000007.rank_0.pth").stat().st_size
    code, lines, err = run(capsys, "verify", tmp_path)
    assert (code, err) == (1, "error: 2 of 3 checkpoints not sound")
    assert lines == [
        f"{tmp_path}/model_0000003.rank_0.pth has 10 bytes but {size} were written",
        f"{tmp_path}/model_0000005: 0 of 1 rank files found, model_0000005.rank_0.pth is missing",
        f"{tmp_path}/model_0000007 (1 file, {size / 1000:.1f} kB): sound",
    ]


class CreatesAFile:
    """What a hostile pickle does: reading it calls a function."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_a_rank_file_that_would_run_code_is_refused_by_every_command(tmp_path, capsys):
    save(tmp_path, 3)
    manifest, trap = files.open_checkpoint(tmp_path, "model_0000003"), tmp_path / "executed"
    data = {"format_version": 2, "model": {"teacher.backbone.x": CreatesAFile(trap)}}
    record = files.write_rank_file(tmp_path, name="model_0000003", rank=0, data=data)
    files.publish_rank_file(tmp_path, name="model_0000003", rank=0)
    files.write_manifest(tmp_path, files.Manifest(**vars(manifest) | {"files": {"model_0000003.rank_0.pth": record}}))
    out = tmp_path / "out"
    for command in (
        ["verify", tmp_path],
        ["inspect", tmp_path],
        ["consolidate", tmp_path, "--output", out / "t.pth"],
        ["reshard", tmp_path, "--ranks", 2, "--output-dir", out],
        ["diff", tmp_path, tmp_path],
        ["list", tmp_path],
    ):
        code, lines, err = run(capsys, *command)
        assert code == {"list": 0, "diff": 2}.get(command[0], 1)
        if command[0] != "list":
            assert "model_0000003.rank_0.pth cannot be read: Weights only load failed" in "\n".join([*lines, err])
    assert not trap.exists() and not out.exists()


def test_inspect_says_what_a_checkpoint_holds(tmp_path, capsys):
    path = save(tmp_path, 3, settings=["student.patch_size=8"])
    code, lines, err = run(capsys, "inspect", tmp_path)
    assert (code, err) == (0, "")
    manifest = files.open_checkpoint(tmp_path, "model_0000003")
    facts = dict(row for row in columns(lines) if len(row) == 2)
    assert facts == {
        "checkpoint": path,
        "iteration": "3, training goes on with 4",
        "saved": manifest.time,
        "by": "1 process, NO_SHARD",
        "global batch": "24 images",
        "size": f"{manifest.size_bytes / 1000:.1f} kB, format version 2",
        "versions": f"torch={torch.__version__}",
        "metrics": "knn=80.25",
        "also": "samples_seen=96",
        "kept per rank": "rng",
        "settings": facts["settings"],
    }
    assert facts["settings"].endswith(", 3 of them not the defaults")
    assert [line for line in lines if line.startswith("  ")] == [
        "  student.patch_size=8",
        "  checkpointing.period=2",
        "  checkpointing.keep_every=4",
    ]
    rows = columns(lines)
    assert ["teacher.backbone", "15", "145", "600 bytes"] in rows
    assert ["loss.weight", "1", "3", "12 bytes"] in rows
    assert next(line for line in lines if line.startswith("optimizer: ")).startswith("optimizer: betas=(0.9, 0.999), ")
    assert ["0", "2", "24", "200 bytes", "lr=0.1"] in rows and ["1", "3", "72", "588 bytes", "lr=0.2"] in rows


def test_inspect_as_json_and_by_deeper_modules(tmp_path, capsys):
    save(tmp_path, 3)
    code, lines, _ = run(capsys, "inspect", tmp_path / "model_0000003.rank_{rank}.pth", "--json", "--depth", 3)
    found = json.loads("\n".join(lines))
    assert (code, found["iteration"], found["metrics"]) == (0, 3, {"knn": 80.25})
    assert found["config_digest"] == "d1g3s7" and found["config"]["checkpointing.period"] == 2
    assert found["modules"]["teacher.backbone.embed"] == {"tensors": 2, "values": 24, "bytes": 96}
    assert [group["settings"] for group in found["optimizers"]["optimizer"]["groups"]] == [{"lr": 0.1}, {"lr": 0.2}]


def test_paths_that_are_no_checkpoint(tmp_path, capsys):
    give = "give RUN/model_0003749, a rank file, or the folder of a run"
    weights = tmp_path / "teacher_checkpoint.pth"
    weights.touch()
    for path, sentence in (
        (weights, f"{weights}: is no checkpoint of a training run; {give}"),
        (tmp_path / "nothing", f"{tmp_path}/nothing: no such checkpoint; {give}"),
        (tmp_path, f"{tmp_path}: holds no complete checkpoint of a training run"),
        (
            tmp_path / "model_0000009",
            f"{tmp_path}/model_0000009: there is no model_0000009.manifest.json in {tmp_path}, so it is not complete",
        ),
    ):
        assert run(capsys, "inspect", path) == (1, [], f"error: {sentence}")


def test_a_damaged_checkpoint_points_to_another(tmp_path, capsys):
    save(tmp_path, 3), save(tmp_path, 5)
    (tmp_path / "model_0000005.rank_0.pth").unlink()
    assert run(capsys, "inspect", tmp_path)[2] == (
        f"error: {tmp_path}/model_0000005: 0 of 1 rank files found, model_0000005.rank_0.pth is missing; "
        "the folder also has model_0000003"
    )


def test_diff_of_equal_checkpoints(tmp_path, capsys):
    first, second = save(tmp_path / "a"), save(tmp_path / "b", settings=["logging.period_steps=7"])
    code, lines, err = run(capsys, "diff", first, second)
    assert (code, err) == (0, "")
    assert lines == ["54 tensors compared, 0 with other values; equal"]
    assert run(capsys, "diff", tmp_path / "a", tmp_path / "b", "--json")[:2] == (0, ["[]"])


def test_diff_shows_tensors_settings_and_optimiser(tmp_path, capsys):
    save(tmp_path / "a"), save(tmp_path / "b", 5, change=0.5, settings=["optim.weight_decay=0.5"])
    code, lines, err = run(capsys, "diff", tmp_path / "a", tmp_path / "b")
    assert (code, err) == (1, "")
    assert columns(lines) == [
        ["config", "optim.weight_decay 0.04 -> 0.5"],
        ["extra iteration", "3 -> 5"],
        ["student.head.mlp.bias", "1 of 6 values differ, by at most 0.499"],
        ["54 tensors compared, 1 with other values, largest difference 0.499; 2 other differences"],
    ]
    found = json.loads("\n".join(run(capsys, "diff", tmp_path / "a", tmp_path / "b", "--json")[1]))
    assert found[2]["name"] == "student.head.mlp.bias" and found[2]["max_abs"] == pytest.approx(0.499)


def test_diff_of_files_of_weights(tmp_path, capsys):
    nan, inf = float("nan"), float("inf")
    first = {"a": torch.tensor([1.0, nan, 2.0]), "b": torch.zeros(2), "c": torch.ones(2), "d": torch.ones(1)}
    second = {"a": torch.tensor([1.0, nan, inf]), "b": torch.zeros(3), "c": torch.ones(2).half(), "e": torch.ones(1)}
    torch.save({"teacher": first}, tmp_path / "a.pth"), torch.save({"teacher": second}, tmp_path / "b.pth")
    code, lines, _ = run(capsys, "diff", tmp_path / "a.pth", tmp_path / "b.pth")
    assert code == 1 and columns(lines) == [
        ["teacher.a", "1 of 3 values differ, by at most inf"],
        ["teacher.b", "[2] float32 -> [3] float32"],
        ["teacher.c", "[2] float32 -> [2] float16"],
        ["teacher.d", "only in the first"],
        ["teacher.e", "only in the second"],
        ["3 tensors compared, 1 with other values, largest difference inf; 4 other differences"],
    ]
    assert run(capsys, "diff", tmp_path / "a.pth", tmp_path / "a.pth")[0] == 0


def test_diff_that_cannot_compare_has_an_exit_code_of_its_own(tmp_path, capsys):
    sound = save(tmp_path / "a")
    path = tmp_path / "a" / "model_0000003.rank_0.pth"
    assert run(capsys, "diff", sound, tmp_path / "b.pth") == (
        2,
        [],
        f"error: {tmp_path}/b.pth: no such file of weights",
    )
    os.truncate(path, 10)
    code, lines, err = run(capsys, "diff", sound, sound)
    assert (code, lines) == (2, []) and err.startswith(f"error: {path} has 10 bytes but ")


@pytest.mark.parametrize("argv", [[], ["unknown"], ["diff", "a"], ["verify"], ["inspect", "a", "--depth", "0"]])
def test_bad_usage(capsys, argv):
    assert run(capsys, *argv)[0] == 2


@pytest.mark.parametrize("command", ["list", "verify", "inspect", "consolidate", "reshard", "diff"])
def test_help_of_every_command(capsys, command):
    code, lines, _ = run(capsys, command, "--help")
    assert code == 0 and "default: " in " ".join(lines) or command == "verify"


def test_the_program(tmp_path):
    save(tmp_path)
    done = subprocess.run(
        [sys.executable, ROOT / "run" / "checkpoint.py", "verify", tmp_path],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "") and done.stdout.endswith(": sound\n")
