"""Where processes meet: what is said when the place cannot be opened or reached, or when somebody does not come."""

import socket

import pytest

from dinov2.distributed.launch_environment import LaunchEnvironment, read_launch_environment, read_timeouts
from dinov2.distributed.rendezvous import meet, ranks_in_words
from dinov2.errors import ConfigError, TrainingError


@pytest.fixture
def taken():
    """A port of this machine that is in use, though nobody answers there."""
    with socket.create_server(("", 0)) as listener:
        yield listener.getsockname()[1]


def free_port():
    with socket.create_server(("", 0)) as probe:
        return probe.getsockname()[1]


def sentence(*, rank, port, timeout_s=0.05, **others):
    launch = LaunchEnvironment(rank=rank, world_size=4, address="127.0.0.1", port=port, **others)
    with pytest.raises(TrainingError) as error:
        meet(launch, timeout_s=timeout_s)
    return str(error.value)


def test_a_port_that_is_in_use_is_named(taken):
    assert sentence(rank=0, port=taken) == (
        f"port {taken} of this machine cannot be opened for the other ranks (Address already in use); "
        f"set MASTER_PORT to another one"
    )


@pytest.mark.parametrize(("is_met_by_launcher", "who"), [(False, "rank 0"), (True, "torchrun")])
def test_a_place_where_nobody_is_is_named(is_met_by_launcher, who):
    port = free_port()
    assert sentence(rank=1, port=port, is_met_by_launcher=is_met_by_launcher) == (
        f"nobody answers at 127.0.0.1:{port} after 0.05 s (Connection refused): {who} has not started or has ended "
        f"there, or a firewall is in between; look at its log, or give a slow start more time with "
        f"DINOV2_RENDEZVOUS_TIMEOUT_S"
    )


def test_those_who_do_not_come_are_named():
    port = free_port()
    assert sentence(rank=0, port=port) == (
        f"ranks 1-3 of 4 did not come to 127.0.0.1:{port} within 0.05 s (the others are on {socket.gethostname()}); "
        f"look at their logs, or give a slow start more time with DINOV2_RENDEZVOUS_TIMEOUT_S"
    )


@pytest.mark.parametrize(
    ("ranks", "words"), [([3], "rank 3"), ([1, 2], "ranks 1-2"), ([0, 4, 5, 6, 9], "ranks 0, 4-6, 9")]
)
def test_ranks_in_words(ranks, words):
    assert ranks_in_words(ranks) == words


def test_time_outs_come_from_the_environment():
    found = read_timeouts({"DINOV2_LOST_RANK_TIMEOUT_S": "7.5"})
    assert (found.rendezvous_s, found.lost_rank_s, found.collective_s) == (300, 7.5, 1800)


@pytest.mark.parametrize("value", ["0", "-3", "soon", "inf", "nan", ""])
def test_a_time_out_that_is_none_gives_one_sentence(value):
    with pytest.raises(ConfigError) as error:
        read_timeouts({"DINOV2_RENDEZVOUS_TIMEOUT_S": value})
    assert str(error.value) == f"DINOV2_RENDEZVOUS_TIMEOUT_S={value}: must be a number of seconds above 0"


@pytest.mark.parametrize(
    ("variables", "has_its_own"),
    [({}, False), ({"SLURM_GPUS_PER_TASK": "1"}, True), ({"SLURM_GPUS_ON_NODE": "4"}, True)]
    + [({"SLURM_GPUS_ON_NODE": "2"}, False)],
)
def test_slurm_tells_whether_each_task_sees_a_gpu_of_its_own(variables, has_its_own):
    step = {"SLURM_PROCID": "1", "SLURM_LOCALID": "1", "SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_TASKS_PER_NODE": "4"}
    assert read_launch_environment(step | variables).one_gpu_per_process == has_its_own
