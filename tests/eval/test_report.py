"""Scores laid out for the screen and the results file, part by part."""

import numpy as np
import pytest
from support.eval_predictions import random_predictions

from dinov2.eval.report import compare_parts, format_comparison, format_scores, parts_of, results_of, score_part

IN_GROUPS = {"groups": np.repeat(np.arange(20), 3), "rows": "profiles"}


@pytest.mark.parametrize("name", ["leave_one_group_out_column_plate", "leave_one_group_out_column_group"])
def test_a_name_with_group_in_it_is_not_taken_for_scores_of_groups(name):
    own, reference = (
        parts_of(None, {name: random_predictions(60, 3, seed=seed, **IN_GROUPS)}, None) for seed in (0, 0)
    )
    assert [(part.prefix, part.is_of_groups) for part in own] == [(f"{name}_", False), (f"{name}_group_", True)]
    parts = [score_part(part, num_resamples=100) for part in own]
    assert list(results_of(parts, num_resamples=100)["per_class"]) == [f"{name}_"]
    lines = format_scores(parts, num_resamples=100).splitlines()
    assert lines[0] == "val: 60 profiles in 20 groups; intervals: 100 resamples of groups"
    assert [line.split()[0] for line in lines[1:]] == [f"{name}_top1_pct", f"{name}_group_top1_pct"]
    compared = compare_parts(own, reference, num_resamples=100)
    assert format_comparison(compared, parts=parts, reference="W0").splitlines()[0] == "compared to W0 on 60 profiles"
