"""The launcher: what it passes on, what Slurm would get, wrong options, and a real job on this machine."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dinov2.models import build_model
from dinov2.run import submit_options
from dinov2.run.submit import main

ROOT = Path(__file__).resolve().parents[2]
KNN = ROOT / "eval" / "knn.py"
MODEL = ["student.arch=vit_tiny", "student.depth=2", "student.embed_dim=48", "student.patch_size=4"]
SIZES = ["crops.global_crops_size=16", "crops.local_crops_size=8"]
CPU = "compute_precision.device=cpu"

TELL = """
import json, os, sys
from pathlib import Path
names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "CUDA_VISIBLE_DEVICES")
told = {"argv": sys.argv[1:], "cwd": os.getcwd(), **{name: os.environ.get(name) for name in names}}
Path(f"told_{os.environ.get('RANK', 'alone')}.json").write_text(json.dumps(told))
print("rank", os.environ.get("RANK"), "speaks")
sys.exit(int(sys.argv[-1]) if os.environ.get("RANK", "1") == "1" else 0)
"""


@pytest.fixture
def program(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", "/usr/bin:/bin")  # no sbatch, whatever this machine has
    monkeypatch.setattr(submit_options.shutil, "which", lambda name: None)
    path = tmp_path / "program.py"
    path.write_text(TELL)
    return path


def told(rank):
    return json.loads(Path(f"told_{rank}.json").read_text())


def script(capsys, *options, program=KNN):
    assert main(["--cluster", "slurm", "--dry-run", *options], program=program) == 0
    return capsys.readouterr().out.splitlines()


def fails_with(capsys, argv, *, program=None):
    assert main(argv, program=program) == 2
    return capsys.readouterr().err.splitlines()[-1]


def test_the_script_for_slurm_says_what_the_options_say(program, tmp_path, capsys):
    options = ["--partition", "gpu", "--account", "lab", "--qos", "high", "--constraint", "a100", "--exclude", "n[1-3]"]
    size = ["--nodes", "2", "--ngpus", "4", "--timeout", "60", "--cpus-per-task", "10", "--mem", "120"]
    lines = script(capsys, *options, *size, "--slurm-extra", "reservation=mine", "--comment", "paper 1")
    wanted = {
        "nodes=2",
        "ntasks-per-node=4",
        "gpus-per-node=4",
        "time=60",
        "cpus-per-task=10",
        "mem=120GB",
        "partition=gpu",
        "account=lab",
        "qos=high",
        "constraint=a100",
        "exclude='n[1-3]'",
        "reservation=mine",
        "comment='paper 1'",
        "job-name=dinov2-knn",
        f"output={tmp_path}/jobs/%j_0_log.out",
    }
    assert wanted <= {line.removeprefix("#SBATCH --") for line in lines if "SBATCH" in line}
    (srun,) = (line for line in lines if line.startswith("srun"))
    assert "--kill-on-bad-exit=1" in srun and f"{tmp_path}/jobs/%j_%t_log.out" in srun
    assert lines[-1] == f"# {sys.executable} {KNN}"
    assert not (tmp_path / "jobs" / "submission.sh").exists()


@pytest.mark.parametrize("how", ["argument", "config file", "config file="])
def test_no_gpu_is_asked_for_where_the_program_computes_on_the_cpu(program, capsys, tmp_path, how):
    (tmp_path / "cpu.yaml").write_text("compute_precision:\n  device: cpu\n")
    arguments = {
        "argument": [CPU],
        "config file": ["--config-file", str(tmp_path / "cpu.yaml")],
        "config file=": [f"--config={tmp_path / 'cpu.yaml'}"],
    }[how]
    assert not any("gpus" in line for line in script(capsys, "--ngpus", "2", *arguments))
    auto = script(capsys, "--ngpus", "2", *arguments, "compute_precision.device=auto")
    assert "#SBATCH --gpus-per-node=2" in auto


def test_everything_else_is_passed_on_in_its_order(program, capsys):
    own = ["--train-dataset", "A:x=1", "--nb_knn", "10", "20", "--n-per-class-list", "-1", "--exclude-group", "a.b=c d"]
    lines = script(capsys, *own[:5], "--output-dir", "runs/%j", *own[5:], "--partition=p")
    expected = (
        "--output-dir runs/%j --train-dataset A:x=1 --nb_knn 10 20 --n-per-class-list -1 --exclude-group 'a.b=c d'"
    )
    assert lines[-1] == f"# {sys.executable} {KNN} {expected}"
    assert any(line.endswith("/runs/jobs/%j_0_log.out") for line in lines if "SBATCH" in line)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--nodes", "0"], "--nodes 0: must be above 0"),
        (["--timeout", "-5"], "--timeout -5: must be above 0"),
        (["--mem", "0"], "--mem 0: must be above 0"),
        (
            ["--cluster", "slurm"],
            "--cluster slurm: there is no sbatch here; submit on a machine of the cluster, or use --cluster local",
        ),
        (["--nodes", "2"], "--nodes 2: --cluster local has one machine; use --nodes 1, or a Slurm cluster"),
        (
            ["--cluster", "debug", "--ngpus", "2"],
            "--ngpus 2: --cluster debug runs one process; use --ngpus 1, or --cluster local",
        ),
        (
            ["--partition", "p", "--slurm-extra", "a=b"],
            "--partition, --slurm-extra: only a Slurm cluster knows it, and the job runs with --cluster local",
        ),
        (
            ["--cluster", "slurm", "--dry-run", "--slurm-extra", "exclusive"],
            "--slurm-extra exclusive: must be an option of sbatch and its value, e.g. reservation=mine",
        ),
        (["--config-file", "none.yaml"], "none.yaml"),
    ],
)
def test_wrong_options_are_a_sentence(program, capsys, options, message):
    line = fails_with(capsys, options, program=program)
    assert line == f"error: {message}" if " " in message else message in line
    assert not Path("jobs").exists()


def test_the_program_is_named_before_its_options(program, capsys):
    ending = "name the program before its own options, e.g. submit.py --ngpus 2 eval/knn.py ..."
    assert fails_with(capsys, ["--ngpus", "2"]) == f"error: {ending}"
    given = fails_with(capsys, ["--nb_knn", "10", str(program)])
    assert given == f"error: --nb_knn is no option of the launcher; {ending}"
    assert fails_with(capsys, ["none.py"]) == "error: none.py: there is no such program"


def test_debug_runs_the_program_here_and_ends_with_its_exit_code(program, tmp_path):
    assert main(["--cluster", "debug", str(program), "--mine", "3"]) == 3
    assert told("alone")["argv"] == ["--mine", "3"] and told("alone")["cwd"] == str(tmp_path)
    assert main(["--cluster", "debug", "--output-dir", "runs/%j", str(program), "0"]) == 0
    assert told("alone")["argv"] == ["--output-dir", "runs/debug", "0"]


def test_a_dry_run_on_this_machine_shows_the_command(program, tmp_path, capsys):
    assert main(["--ngpus", "2", "--dry-run", str(program), "x=1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"2 process(es) on this machine, at most 1440 min, in {tmp_path}:"
    assert lines[1:] == [f"{sys.executable} {program} x=1"]


@pytest.mark.dist
def test_a_job_on_this_machine_ends_with_the_exit_code_of_the_process_that_failed(program, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "7")  # of a launcher around this one
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5")
    assert main(["--cluster", "local", "--ngpus", "2", "--output-dir", "runs/%j", str(program), "3"]) == 3
    out, err = capsys.readouterr()
    job = out.splitlines()[0].partition(":")[0].removeprefix("job ")
    assert "rank 0 speaks" in out and "rank 1 speaks" in err
    log = Path.cwd() / "runs" / "jobs" / f"{job}_1_log.out"
    assert f"error: job {job}: process 1 ended with exit code 3; log: {log}" in err
    for rank in (0, 1):
        found = told(rank)
        assert found.pop("argv") == ["--output-dir", f"runs/{job}", "3"] and found.pop("cwd") == str(Path.cwd())
        ranks = {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": "2"}
        assert found == ranks | {"CUDA_VISIBLE_DEVICES": "5"}


@pytest.mark.dist
def test_knn_runs_as_a_job_of_two_processes(tmp_path):
    model = build_model("vit_tiny", depth=2, embed_dim=48, patch_size=4, img_size=16, init_values=1.0)
    model.init_weights(torch.Generator().manual_seed(0))
    torch.save({"teacher": {f"backbone.{name}": value for name, value in model.state_dict().items()}}, tmp_path / "w")
    job = ["--cluster", "local", "--ngpus", "2", "--timeout", "5", "--output-dir", "runs/%j"]
    sets = ["--pretrained-weights", "w", "--train-dataset", "Digits:split=TRAIN", "--val-dataset", "Digits:split=VAL"]
    command = [
        sys.executable,
        str(ROOT / "run" / "eval" / "knn.py"),
        *job,
        *sets,
        "--num-workers",
        "0",
        "--num-bootstrap",
        "0",
    ]
    result = subprocess.run([*command, *MODEL, *SIZES, CPU], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    number = lines[0].partition(":")[0].removeprefix("job ")
    assert lines[-1] == f"job {number}: done"
    results = json.loads((tmp_path / "runs" / number / "results_eval_knn.json").read_text())
    assert f"{results['top1_pct']:.2f}" in result.stdout and results["top1_pct"] > 30


def test_each_evaluation_has_a_launcher():
    programs = {path.name for path in (ROOT / "eval").glob("*.py")} - {"knn_curve.py"}  # which computes nothing
    launchers = {path.name: path.read_text() for path in (ROOT / "run" / "eval").glob("*.py")}
    assert launchers.keys() == programs
    for name, text in launchers.items():
        assert f'parents[2] / "eval" / "{name}"' in text
