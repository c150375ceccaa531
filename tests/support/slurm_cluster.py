"""A real Slurm of two virtual nodes on this machine, for integration tests; see tests/slurm/README.md."""

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

TESTS = Path(__file__).resolve().parents[1]
SCRIPTS = TESTS / "slurm"
PYTHONPATH = f"{TESTS}:{TESTS.parent}"  # for programs that tests start: the library beside them, and their datasets
_DAEMONS = ("slurmctld", "slurmd", "munged", "sbatch")
_NAMESPACES = ("--net", "--uts", "--mount", "--pid")


def why_no_cluster() -> str | None:
    """Say why a cluster cannot be started here; None if it can."""
    if os.geteuid() != 0:
        return "a real Slurm needs root"
    if missing := [name for name in _DAEMONS if shutil.which(name) is None]:
        return f"a real Slurm needs {', '.join(missing)}: run tests/slurm/install.sh"
    probe = subprocess.run(["unshare", *_NAMESPACES, "--fork", "true"], capture_output=True, text=True)
    return None if probe.returncode == 0 else f"a real Slurm needs namespaces of its own: {probe.stderr.strip()}"


class SlurmCluster:
    """While entered, two nodes are up; commands are run beside them, in their namespaces.

    Raises:
        AssertionError: on entering: it did not start; the message holds what it wrote.
    """

    def __enter__(self) -> Self:
        # It ends with `cat`, whose input ends with this process, however that ends.
        told = 'echo "$CLUSTER_PID $SLURM_CONF"; exec cat'
        self._process = subprocess.Popen(
            [SCRIPTS / "with_cluster.sh", "sh", "-c", told],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        line = self._process.stdout.readline()
        if not line:
            raise AssertionError(f"the cluster did not start\n{self._process.communicate()[1]}")
        self._pid, self.configuration = line.split(maxsplit=1)
        self.configuration = self.configuration.strip()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.communicate()

    def start(self, *command: str | Path, cwd: Path, env: Mapping[str, str] | None = None) -> subprocess.Popen[str]:
        """Start a command beside the cluster, as a user of it would; its output can be read from pipes."""
        others = ("SLURM_", "SUBMITIT_", "TORCHELASTIC_", "SBATCH_")
        variables = {name: value for name, value in os.environ.items() if not name.startswith(others)}
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
            variables.pop(name, None)
        variables |= {
            "SLURM_CONF": self.configuration,
            "PATH": f"{SCRIPTS / 'bin'}:{variables['PATH']}",
            "GLOO_SOCKET_IFNAME": "lo",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": PYTHONPATH,
        }
        enter = ["nsenter", "--target", self._pid, *_NAMESPACES, f"--wd={cwd}", "--"]
        return subprocess.Popen(
            [*enter, *map(str, command)],
            env=variables | dict(env or {}),
            text=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )

    def run(self, *command: str | Path, cwd: Path, timeout_s: float = 300) -> subprocess.CompletedProcess[str]:
        """Run a command beside the cluster to its end.

        Raises:
            AssertionError: it takes longer than `timeout_s`.
        """
        process = self.start(*command, cwd=cwd)
        try:
            stdout, stderr = process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            process.kill()
            stdout, stderr = process.communicate()
            raise AssertionError(f"{command} did not end within {timeout_s} s\n{stdout}\n{stderr}") from None
        return subprocess.CompletedProcess(command, process.returncode, stdout, stderr)

    def ask(self, *command: str) -> str:
        """Return what a command of Slurm answers; it must succeed."""
        result = self.run(*command, cwd=Path("/"), timeout_s=30)
        assert result.returncode == 0, f"{command}: {result.stderr}"
        return result.stdout.strip()

    def state(self, job: str) -> str:
        """Return the state of a job in capitals, PENDING, RUNNING, COMPLETED, ..."""
        return self.ask("squeue", "--noheader", "--states=all", f"--jobs={job}", "--format=%T")

    def restarts(self, job: str) -> int:
        """Return how often Slurm has started a job again."""
        return int(self.detail(job, "Restarts"))

    def detail(self, job: str, name: str) -> str:
        """Return one of the fields that scontrol shows of a job."""
        fields = (field.partition("=") for field in self.ask("scontrol", "--oneliner", "show", "job", job).split())
        return {key: value for key, _, value in fields}[name]

    def kill_task(self, job: str, *, rank: int, program: str) -> None:
        """End the program of one task of a running job as kill -9 does."""
        wanted = {"SLURM_JOB_ID": job, "SLURM_PROCID": str(rank), "SLURM_CONF": self.configuration}
        pids = processes_with(wanted, program=program)
        assert pids, f"job {job}: rank {rank} does not run {program}"
        for pid in pids:
            os.kill(pid, signal.SIGKILL)


def processes_with(variables: Mapping[str, str], *, program: str, argument: str | None = None) -> list[int]:
    """Find processes with these environment variables that run a Python program of this name with this argument."""
    wanted = {f"{name}={value}".encode() for name, value in variables.items()}
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            arguments = (folder / "cmdline").read_bytes().split(b"\0")
            if Path(os.fsdecode(arguments[1] if len(arguments) > 1 else b"")).name != program:
                continue
            if argument is not None and os.fsencode(argument) not in arguments:
                continue
            if wanted <= set((folder / "environ").read_bytes().split(b"\0")):
                found.append(int(folder.name))
        except (FileNotFoundError, ProcessLookupError, PermissionError):  # it has ended, or is another user's
            continue
    return found


def wait_until(holds: Callable[[], bool], *, what: str, timeout_s: float, logs: Path | None = None) -> None:
    """Wait for something to become true.

    Raises:
        AssertionError: it has not after `timeout_s`; the message holds the logs in the folder.
    """
    end_s = time.monotonic() + timeout_s
    while not holds():
        if time.monotonic() > end_s:
            paths = [] if logs is None else sorted(logs.glob("*.out")) + sorted(logs.glob("*_attempts.json"))
            texts = "\n".join(f"--- {path.name}\n{path.read_text(errors='replace')[-5000:]}" for path in paths)
            raise AssertionError(f"not within {timeout_s:.0f} s: {what}\n{texts}")
        time.sleep(0.2)
