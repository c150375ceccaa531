"""Reading the launcher's variables and choosing the device."""

import pytest
import torch

from dinov2 import distributed
from dinov2.distributed.launch_environment import (
    expand_slurm_counts,
    first_slurm_host,
    read_job_id,
    read_launch_environment,
)
from dinov2.errors import ConfigError

TORCHRUN = {
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "4",
    "MASTER_ADDR": "node1",
    "MASTER_PORT": "29500",
}
SLURM = {
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_STEP_NUM_TASKS": "6",
    "SLURM_STEP_TASKS_PER_NODE": "4,2",
    "SLURM_STEP_NODELIST": "gpu[03-04]",
    "SLURM_JOB_ID": "123456",
    "SLURM_NTASKS": "6",
}


@pytest.fixture
def environment_of(monkeypatch):
    """Replace all launcher variables by the given ones."""

    def replace(variables):
        for name in (*TORCHRUN, *SLURM):
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    yield replace
    distributed.shutdown()


def test_without_a_launcher_there_is_one_process(environment_of):
    environment_of({})
    environment = distributed.init("cpu")
    assert (environment.rank, environment.world_size, environment.local_rank, environment.local_world_size) == (
        0,
        1,
        0,
        1,
    )
    assert environment.device == torch.device("cpu")
    assert not torch.distributed.is_initialized()
    assert distributed.init("cpu") is environment


def test_torchrun_variables_win_over_slurm_ones():
    found = read_launch_environment(SLURM | TORCHRUN)
    assert (found.rank, found.world_size, found.local_rank, found.local_world_size) == (5, 8, 1, 4)
    assert (found.address, found.port, found.is_met_by_launcher) == ("node1", 29500, False)
    assert read_launch_environment(TORCHRUN | {"TORCHELASTIC_USE_AGENT_STORE": "True"}).is_met_by_launcher


def test_the_number_of_processes_is_known_before_they_meet(environment_of):
    environment_of(TORCHRUN)
    assert distributed.launched_world_size() == 8
    assert distributed.get_world_size() == 1


def test_a_slurm_step_needs_no_torchrun():
    found = read_launch_environment(SLURM)
    assert (found.rank, found.world_size, found.local_rank, found.local_world_size) == (5, 6, 1, 2)
    assert (found.address, found.port, found.is_met_by_launcher) == ("gpu03", 23456, False)


def test_a_batch_script_is_one_process():
    batch = {name: value for name, value in SLURM.items() if "STEP" not in name} | {"SLURM_PROCID": "0"}
    assert read_launch_environment(batch).world_size == 1


@pytest.mark.parametrize(
    ("node_list", "first"),
    [("a1", "a1"), ("a1,b2", "a1"), ("gpu[03-05,9],cpu1", "gpu03"), ("r[1-2]n[07,9]", "r1n07"), ("x[2,4]-ib", "x2-ib")],
)
def test_first_host_of_a_slurm_node_list(node_list, first):
    assert first_slurm_host(node_list) == first


def test_slurm_counts_expand():
    assert expand_slurm_counts("4(x2),1") == [4, 4, 1]


@pytest.mark.parametrize(
    ("variables", "sentence"),
    [
        (
            {"RANK": "0"},
            "RANK=0 is set but WORLD_SIZE, LOCAL_RANK not; start the program with torchrun or unset RANK",
        ),
        (
            {"WORLD_SIZE": "1"},
            "WORLD_SIZE=1 is set but RANK, LOCAL_RANK not; start the program with torchrun or unset WORLD_SIZE",
        ),
        (
            {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"},
            "RANK=0 is set but MASTER_ADDR, MASTER_PORT not; start the program with torchrun or unset RANK",
        ),
        (TORCHRUN | {"RANK": "8"}, "rank 8 is outside 0..7; start the program with torchrun"),
        (TORCHRUN | {"LOCAL_RANK": "4"}, "local rank 4 is outside 0..3; start the program with torchrun"),
        (TORCHRUN | {"RANK": "one"}, "RANK=one is not a whole number; start the program with torchrun"),
    ],
)
def test_wrong_variables_give_one_sentence(environment_of, variables, sentence):
    environment_of(variables)
    with pytest.raises(ConfigError) as error:
        distributed.init("cpu")
    assert str(error.value) == sentence


@pytest.mark.parametrize(
    ("device", "num_gpus", "variables", "sentence"),
    [
        ("tpu", 0, {}, "compute_precision.device=tpu: must be auto, cpu, cuda or cuda:N"),
        ("cpu:1", 0, {}, "compute_precision.device=cpu:1: must be auto, cpu, cuda or cuda:N"),
        ("cuda", 0, {}, "compute_precision.device=cuda but PyTorch finds no GPU here; use cpu or auto"),
        ("cuda:2", 2, {}, "compute_precision.device=cuda:2 but there are 2 GPUs; use cuda:0 to cuda:1"),
        ("cuda:0", 2, TORCHRUN, "compute_precision.device=cuda:0 names one GPU but 8 processes run; use cuda"),
        (
            "auto",
            1,
            TORCHRUN,
            "4 processes run on this node but it has 1 GPUs; start at most 1 or set compute_precision.device=cpu",
        ),
    ],
)
def test_wrong_device_gives_one_sentence(environment_of, monkeypatch, device, num_gpus, variables, sentence):
    environment_of(variables)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: num_gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: num_gpus)
    with pytest.raises(ConfigError) as error:
        distributed.init(device)
    assert str(error.value) == sentence


@pytest.mark.parametrize(
    ("variables", "number"),
    [
        ({}, None),
        ({"SLURM_JOB_ID": "12"}, "12"),
        ({"SLURM_JOB_ID": "15", "SLURM_ARRAY_JOB_ID": "12", "SLURM_ARRAY_TASK_ID": "3"}, "12_3"),
        ({"SLURM_JOB_ID": "12", "SUBMITIT_LOCAL_JOB_ID": "4711"}, "4711"),
    ],
)
def test_the_number_of_the_job_is_that_of_the_launcher(variables, number):
    assert read_job_id(variables) == number
