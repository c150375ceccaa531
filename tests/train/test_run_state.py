"""The state of a run on disk: what other programs read, and what a new start learns from earlier failures."""

import json
from dataclasses import replace

import pytest
from support.training import TINY_RUN, train

from dinov2.configs import load_config
from dinov2.errors import GuardRailError, StoppedEarly, TrainingError
from dinov2.train.run_state import KILLED, STATE_NAME, RunState, failures_at_the_same_step, read_run_state


@pytest.fixture
def cfg(tmp_path):
    return load_config(None, [*TINY_RUN, f"train.output_dir={tmp_path}"])


def fail(cfg, *, began_at=0, done=(), error="no more images", **options):
    """One attempt that ends with an error, after some iterations."""
    with pytest.raises(RuntimeError, match=error), RunState(cfg, **options) as state:
        state.begin(began_at, 100)
        for step in done:
            state.note(step)
        raise RuntimeError(error)


def kill(cfg, tmp_path, *, began_at=0, done=()):
    """One attempt that leaves its file as a kill -9 does."""
    with RunState(cfg) as state:
        state.begin(began_at, 100)
        for step in done:
            state.note(step)
        text = (tmp_path / STATE_NAME).read_text()
    (tmp_path / STATE_NAME).write_text(text)


def refusal(cfg, **options):
    with pytest.raises(TrainingError) as error, RunState(cfg, **options):
        pass
    return str(error.value)


def test_a_run_that_reaches_its_last_step_is_finished(tmp_path, cfg):
    assert read_run_state(tmp_path) is None
    with RunState(cfg) as state:
        state.begin(0, 3)
        found = read_run_state(tmp_path)
        assert (found.state, found.iteration, found.total_steps, found.attempts) == ("running", None, 3, 1)
        for step in range(3):
            state.note(step)
    found = read_run_state(tmp_path)
    assert (found.state, found.iteration, found.began_at, found.failures) == ("finished", 2, 0, ())


def test_a_run_that_ends_before_is_stopped_and_the_next_start_is_its_second_attempt(tmp_path, cfg):
    for begin, state_after in ((0, "stopped"), (2, "finished")):
        with RunState(cfg) as state:
            state.begin(begin, 4)
            for step in range(begin, begin + 2):
                state.note(step)
        assert read_run_state(tmp_path).state == state_after
    assert read_run_state(tmp_path).attempts == 2


def test_ctrl_c_is_a_stop(tmp_path, cfg):
    with pytest.raises(KeyboardInterrupt), RunState(cfg):
        raise KeyboardInterrupt
    assert read_run_state(tmp_path).state == "stopped"


def test_a_failure_says_where_and_why(tmp_path, cfg):
    fail(cfg, done=range(7), error="first line\n  and second")
    found = read_run_state(tmp_path)
    assert (found.state, found.iteration) == ("failed", 6)
    (failure,) = found.failures
    assert (failure.iteration, failure.began_at) == (7, 0)
    assert failure.reason == "RuntimeError: first line and second"


def test_the_first_reason_counts(tmp_path, cfg):
    with pytest.raises(RuntimeError), RunState(cfg) as state:
        state.begin(0, 100)
        state.fail("rank 1 has ended without a word")
        raise RuntimeError("Connection closed by peer")
    (failure,) = read_run_state(tmp_path).failures
    assert failure.reason == "rank 1 has ended without a word"


def test_a_state_that_says_running_is_a_failure_for_the_next_start(tmp_path, cfg):
    kill(cfg, tmp_path, done=[0])
    with RunState(cfg):
        (failure,) = read_run_state(tmp_path).failures
        assert (failure.iteration, failure.began_at, failure.reason) == (0, 0, KILLED)  # the last write was at step 0


def test_three_failures_at_the_same_iteration_refuse_the_next_start(tmp_path, cfg):
    fail(cfg, done=range(7))
    fail(cfg, began_at=4, done=range(4, 7))
    fail(cfg, began_at=4, done=range(4, 7))
    times = [failure.time for failure in read_run_state(tmp_path).failures]
    at = ", ".join(f"iteration 7 ({time})" for time in times)
    assert refusal(cfg) == (
        f"train.output_dir={tmp_path}: the last 3 starts failed at the same step and another one would too: {at}: "
        f"RuntimeError: no more images. The logs are in {tmp_path / 'logs'}; remove the cause and start with --retry, "
        f"or change a setting"
    )
    assert refusal(cfg) == refusal(cfg)  # a refused start is no further failure
    assert read_run_state(tmp_path).attempts == 3


def test_three_kills_without_a_new_checkpoint_refuse_the_next_start(tmp_path, cfg):
    for _ in range(3):
        kill(cfg, tmp_path, began_at=4)
    assert KILLED in refusal(cfg)
    assert read_run_state(tmp_path).state == "failed"


def test_retrying_changing_a_setting_and_starting_anew_are_not_refused(tmp_path, cfg):
    for _ in range(3):
        fail(cfg)
    assert refusal(cfg)
    other = replace(cfg, train=replace(cfg.train, seed=77))
    fail(other)
    assert len(failures_at_the_same_step(read_run_state(tmp_path).failures)) == 1
    for options in ({"retry": True}, {"anew": True}):
        for _ in range(3):
            fail(other, **options)
        assert len(read_run_state(tmp_path).failures) == 1


def test_a_start_that_would_overwrite_changes_nothing_before_it_begins(tmp_path, cfg):
    fail(cfg, done=range(7))
    before = (tmp_path / STATE_NAME).read_text()
    for error in (TrainingError("no weights"), StoppedEarly("SIGTERM")):
        with pytest.raises(type(error)), RunState(cfg, anew=True):
            raise error
        assert (tmp_path / STATE_NAME).read_text() == before
    with RunState(cfg, anew=True) as state:
        state.begin(0, 3)
        found = read_run_state(tmp_path)
        assert (found.state, found.iteration, found.attempts, found.failures) == ("running", None, 1, ())


def test_a_stop_before_the_first_step_is_no_failure(tmp_path, cfg):
    for _ in range(4):
        with pytest.raises(StoppedEarly), RunState(cfg) as state:
            state.begin(0, 100)
            raise StoppedEarly("SIGTERM")
        found = read_run_state(tmp_path)
        assert (found.state, found.failures) == ("stopped", ())


def test_a_failure_that_would_come_again_is_final(tmp_path, cfg):
    for is_final in (False, False, True):
        fail(cfg)
        assert read_run_state(tmp_path).is_final is is_final
    with pytest.raises(GuardRailError), RunState(cfg, retry=True) as state:
        assert not read_run_state(tmp_path).is_final
        state.begin(0, 100)
        raise GuardRailError("iteration 3: features collapse")
    assert read_run_state(tmp_path).is_final
    with RunState(cfg):
        assert not read_run_state(tmp_path).is_final  # it may be started by hand


def test_starting_anew_is_the_same_setting_as_going_on(tmp_path, cfg):
    fail(replace(cfg, train=replace(cfg.train, resume=False)))
    fail(cfg)
    assert len({failure.settings for failure in read_run_state(tmp_path).failures}) == 1


def test_failures_that_are_not_in_a_row_or_go_on_are_not_refused(tmp_path, cfg):
    for began_at in (0, 10, 20, 30, 40):
        fail(cfg, began_at=began_at, done=range(began_at, began_at + 12))
    assert len(failures_at_the_same_step(read_run_state(tmp_path).failures)) == 1
    fail(cfg, began_at=40)
    with RunState(cfg) as state:
        state.begin(40, 100)
    assert read_run_state(tmp_path).failures == ()


def test_failures_before_training_never_refuse(tmp_path, cfg):
    for _ in range(5):
        with pytest.raises(TrainingError), RunState(cfg):
            raise TrainingError("there are too few images")
    found = read_run_state(tmp_path)
    assert found.state == "failed"
    assert {(f.iteration, f.reason) for f in found.failures} == {(None, "there are too few images")}


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"state": "running"}', '{"failures": 3}'])
def test_a_damaged_file_is_none(tmp_path, text):
    (tmp_path / STATE_NAME).write_text(text)
    assert read_run_state(tmp_path) is None


def test_fields_of_a_later_version_are_left_out(tmp_path, cfg):
    with RunState(cfg) as state:
        state.begin(0, 1)
    path = tmp_path / STATE_NAME
    path.write_text(json.dumps(json.loads(path.read_text()) | {"colour": "red"}))
    assert read_run_state(tmp_path).state == "stopped"


def test_the_training_program_keeps_it(tmp_path):
    assert train(tmp_path, "train.max_steps=2") == 0
    found = read_run_state(tmp_path)
    assert (found.state, found.iteration, found.total_steps, found.attempts) == ("finished", 1, 2, 1)
