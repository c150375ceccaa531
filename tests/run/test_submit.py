"""The launcher: what it passes on, what Slurm would get, wrong options, and a real job on this machine."""

import json
import os
import runpy
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dinov2.models import build_model
from dinov2.run import submit_options, submit_snapshot
from dinov2.run.submit import main
from dinov2.run.submit_options import TRAIN_PROGRAM

ROOT = Path(__file__).resolve().parents[2]
KNN = ROOT / "eval" / "knn.py"
MODEL = ["student.arch=vit_tiny", "student.depth=2", "student.embed_dim=48", "student.patch_size=4"]
DATA = "train.dataset_path=Digits:split=TRAIN"
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
    options = ["--partition", "gpu", "--account", "lab", "--qos", "high", "--use-volta32", "--exclude", "n[1-3]"]
    options += ["--dependency", "afterok:123", "--signal-delay", "90"]
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
        "constraint=volta32gb",
        "dependency=afterok:123",
        "signal=USR2@90",
        "requeue",
        "exclude='n[1-3]'",
        "reservation=mine",
        "comment='paper 1'",
        "job-name=dinov2-knn",
        f"output={tmp_path}/jobs/%j_0_log.out",
    }
    assert wanted <= {line.removeprefix("#SBATCH --") for line in lines if "SBATCH" in line}
    (srun,) = (line for line in lines if line.startswith("srun"))
    assert "--kill-on-bad-exit=1" in srun and f"{tmp_path}/jobs/%j_%t_log.out" in srun
    after = lines[lines.index(srun) :]
    assert f"{sys.executable} -P -m dinov2.run.submit_after {tmp_path}/jobs $?" in after
    assert lines[-1] == f"# {sys.executable} {KNN}"
    assert not (tmp_path / "jobs" / "submission.sh").exists()


def test_a_job_that_may_not_be_requeued_says_so_to_slurm(program, capsys):
    lines = script(capsys, "--max-requeues", "0")
    assert "#SBATCH --no-requeue" in lines and "#SBATCH --requeue" not in lines


def test_slurm_warns_half_the_time_ahead_of_a_short_time_limit(program, capsys):
    assert "#SBATCH --signal=USR2@120" in script(capsys, "--timeout", "60")
    assert "#SBATCH --signal=USR2@30" in script(capsys, "--timeout", "1")


def test_a_sweep_is_one_array_with_a_folder_for_each_run(program, capsys):
    sweep = ["--sweep", "train.num_workers=1,2", "--sweep", "train.seed=0,1", "--array", "3", "--output-dir", "runs/%j"]
    lines = script(capsys, *sweep, DATA, CPU, program=TRAIN_PROGRAM)
    assert "#SBATCH --array=0-3%3" in lines
    commands = [line for line in lines if line.startswith(f"# {sys.executable}")]
    assert len(commands) == 4
    name = "train.num_workers=2,train.seed=0"
    arguments = f"--output-dir runs/%j/{name} {DATA} {CPU} train.num_workers=2 train.seed=0"
    assert commands[2] == f"# {sys.executable} {TRAIN_PROGRAM} {arguments}"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([DATA, "optim.epoch=1"], "unknown key optim.epoch on the command line; the nearest known key is optim.epochs"),
        ([DATA, "--sweep", "optim.epoch=1,2"], "unknown key optim.epoch on the command line; the nearest known key is"),
        ([], "train.dataset_path"),
        ([DATA, "--ngpus", "3", "train.global_batch_size=8"], "train.global_batch_size=8"),
    ],
    ids=["key", "swept key", "no data", "batch"],
)
def test_wrong_settings_of_a_training_are_said_before_it_waits(program, capsys, arguments, message):
    assert message in fails_with(capsys, arguments, program=TRAIN_PROGRAM)
    assert not Path("jobs").exists()


def test_a_config_file_out_of_a_sweep_is_no_setting(program, capsys):
    path = Path("sweep/train.seed=3/config.yaml")
    path.parent.mkdir(parents=True)
    path.write_text("train:\n  dataset_path: Digits:split=TRAIN\n")
    lines = script(capsys, "--config-file", str(path), CPU, program=TRAIN_PROGRAM)
    assert lines[-1] == f"# {sys.executable} {TRAIN_PROGRAM} --config-file {path} {CPU}"


def test_logs_of_a_training_lie_where_its_settings_say(program, capsys, tmp_path):
    lines = script(capsys, DATA, "train.output_dir=runs/first", program=TRAIN_PROGRAM)
    assert f"#SBATCH --output={tmp_path}/runs/first/jobs/%j_0_log.out" in lines
    assert lines[-1] == f"# {sys.executable} {TRAIN_PROGRAM} {DATA} train.output_dir=runs/first"
    lines = script(capsys, DATA, "train.output_dir=runs/%j", program=TRAIN_PROGRAM)
    assert lines[-1].endswith(f"{TRAIN_PROGRAM} --output-dir runs/%j {DATA} train.output_dir=runs/%j")


def test_a_snapshot_is_run_and_is_not_changed_by_editing(program, monkeypatch, tmp_path):
    root = tmp_path / "project"
    for name in ("dinov2/a.py", "dinov2/b.txt", "eval/told.py", "configs/c.yaml"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(TELL)
    monkeypatch.setattr(submit_snapshot, "_ROOT", root)
    (tmp_path / "mine.yaml").write_text("train:\n  seed: 3\n")
    options = ["--snapshot", "--cluster", "debug", "--output-dir", "runs/x"]
    for _ in range(2):
        assert main([*options, str(root / "eval" / "told.py"), "--config-file", "mine.yaml", "0"]) == 0
    (code,) = (tmp_path / "runs" / "x" / "jobs").glob("code-*")
    files = {str(path.relative_to(code)) for path in code.rglob("*") if path.is_file()}
    assert files == {"dinov2/a.py", "eval/told.py", "configs/c.yaml"}
    _, _, option, config, _ = told("alone")["argv"]
    assert option == "--config-file" and Path(config).parent == code.parent
    assert Path(config).read_text() == (tmp_path / "mine.yaml").read_text()
    (root / "dinov2" / "a.py").write_text("edited")
    assert (code / "dinov2" / "a.py").read_text() == TELL
    assert main([*options, str(root / "eval" / "told.py"), "0"]) == 0
    assert len(list(Path("runs/x/jobs").glob("code-*"))) == 2


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
        (["--max-restarts", "-1"], "--max-restarts -1: must be 0 or more"),
        (["--timeout", "1", "--signal-delay", "60"], "--signal-delay 60: is not less than --timeout, 60 s; give less"),
        (["--array", "2"], "--array 2: says how many jobs of a --sweep run at the same time; there is none"),
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
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_signal_to_the_launcher_lets_its_job_save_and_end(program, capsys, name):
    program.write_text(
        "import os, signal, sys\n"
        "def save(number, frame):\n    print('saved', flush=True)\n    sys.exit(0)\n"
        "signal.signal(signal.SIGTERM, save)\n"
        f"os.kill(int(sys.argv[-1]), signal.{name})\n"
        "signal.pause()\n"
    )
    before = signal.getsignal(signal.Signals[name])
    assert main(["--cluster", "local", str(program), str(os.getpid())]) == 0
    out = capsys.readouterr().out
    job = out.splitlines()[0].partition(":")[0]
    assert f"{job} saves and ends; Ctrl-C again to wait no longer\n" in out and "saved\n" in out
    assert out.endswith(f"{job}: stopped by SIGTERM; submit again to go on\n")
    assert signal.getsignal(signal.Signals[name]) == before


@pytest.mark.dist
def test_a_program_ends_with_the_process_that_runs_it(program, capsys, tmp_path):
    program.write_text(
        "import os, signal, sys\n"
        "def save(number, frame):\n    open('saved', 'w').close()\n    sys.exit(0)\n"
        "signal.signal(signal.SIGTERM, save)\n"
        "os.kill(os.getppid(), signal.SIGKILL)\n"
        "signal.pause()\n"
    )
    assert main(["--cluster", "local", str(program)]) == 1
    assert "was ended before its program was; log: " in capsys.readouterr().err
    assert (tmp_path / "saved").exists()


@pytest.mark.dist
def test_a_sweep_on_this_machine_runs_its_jobs_in_turn(program, capsys):
    program.write_text("import sys\nprint('runs', *sys.argv[1:])\nsys.exit(sys.argv[-1] == 'b=2')\n")
    options = ["--cluster", "local", "--output-dir", "out/%j", "--sweep", "b=1,2"]
    assert main([*options, str(program), "a=0"]) == 1
    out, err = capsys.readouterr()
    ran = [line for line in out.splitlines() if line.startswith("runs")]
    assert ran == [f"runs --output-dir out/{os.getpid()}/b={value} a=0 b={value}" for value in (1, 2)]
    assert "process 0 ended with exit code 1; log: " in err
    assert main([*options, "--array", "2", str(program), "a=0"]) == 1
    assert f"[b=2] runs --output-dir out/{os.getpid()}/b=2 a=0 b=2" in capsys.readouterr().out


@pytest.mark.dist
def test_jobs_that_run_together_share_out_the_gpus(program, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6")
    program.write_text("import os, sys\nprint(sys.argv[-1], os.environ['CUDA_VISIBLE_DEVICES'])\n")
    sweep = ["--cluster", "local", "--sweep", "b=1,2", "--array", "2"]
    assert main([*sweep, str(program)]) == 0
    out = capsys.readouterr().out
    assert "[b=1] b=1 4\n" in out and "[b=2] b=2 5\n" in out
    ending = "4 GPUs would be in use at the same time and this machine has 3; give a smaller --array"
    assert fails_with(capsys, [*sweep, "--ngpus", "2", str(program)]) == f"error: --array 2 --ngpus 2: {ending}"


@pytest.mark.integration
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


def test_the_launcher_of_training_names_its_program(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["train.py", "--cluster", "debug", "--dry-run", DATA])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / "run" / "train" / "train.py"), run_name="__main__")
    assert ended.value.code == 0 and capsys.readouterr().out.endswith(f"{TRAIN_PROGRAM} {DATA}\n")
