"""Protocols as they are written on the command line."""

import pytest

from dinov2.errors import ConfigError
from dinov2.eval.protocol_forms import NSC, NSCB, Level, parse_protocol


def test_names_stand_for_protocols_and_keys_change_them():
    assert parse_protocol("nsc") == NSC and parse_protocol("nscb") == NSCB
    assert NSCB.exclude == ("compound", "batch") and NSC.exclude == ("compound",)
    text = "nscb:label=target:aggregate=mean@plate/well:exclude=none:controls=drug=water:k=5:many=split"
    found = parse_protocol(text)
    assert (found.label, found.exclude, found.controls, found.k) == ("target", (), ("drug", "water"), 5)
    assert found.aggregate == (Level(("plate", "well"), "mean"),) and found.many == "split"
    left_out = parse_protocol("leave-one-group-out:column=patient:classifier=logistic:c=0.1")
    assert (left_out.exclude, left_out.c, left_out.label) == (("patient",), 0.1, "target")


def test_a_protocol_written_out_reads_as_itself():
    for text in ("nsc", "nscb:many=split:k=3", "leave-one-group-out:column=plate:classifier=logistic:c=0.5", "free"):
        protocol = parse_protocol(text)
        again = str(protocol)
        assert parse_protocol(again) == protocol and "exclude=" in again


def test_columns_that_are_needed_are_told_with_their_keys():
    assert NSCB.columns() == {
        "moa": "label=moa",
        "plate": "aggregate=mean@plate/well",
        "well": "aggregate=mean@plate/well",
        "treatment": "aggregate=median@treatment",
        "compound": "controls=compound=DMSO",
        "batch": "exclude=batch",
    }


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (
            "ncs",
            "--protocol ncs: unknown name 'ncs'; did you mean nsc? known are nsc, nscb, leave-one-group-out, free; "
            "write it as leave-one-group-out:column=plate",
        ),
        ("nsc:k", "--protocol nsc:k: 'k' is not key=value; write it as leave-one-group-out:column=plate"),
        ("nsc:k=", "--protocol nsc:k=: 'k=' is not key=value; write it as leave-one-group-out:column=plate"),
        (
            "nsc:labels=moa",
            "--protocol nsc:labels=moa: no key 'labels'; did you mean label? known are label, aggregate, exclude, "
            "controls, many, unanswerable, classifier, k, temperature, c, column",
        ),
        ("nsc:column=a:exclude=b", "--protocol nsc:column=a:exclude=b gives exclude twice"),
        ("nsc:k=x", "--protocol nsc:k=x: k=x must be a whole number"),
        ("nsc:k=0", "--protocol nsc: k=0 must be at least 1"),
        ("nsc:temperature=0", "--protocol nsc: temperature=0 must be above 0"),
        ("nsc:many=all", "--protocol nsc: many=all must be same or split"),
        (
            "nsc:aggregate=well",
            "--protocol nsc:aggregate=well: aggregate=well: 'well' must be like mean@plate/well, with mean or median",
        ),
        (
            "nsc:exclude=a,,b",
            "--protocol nsc:exclude=a,,b: exclude=a,,b: a name is empty; put one comma between two names",
        ),
        (
            "nsc:controls=DMSO",
            "--protocol nsc:controls=DMSO: controls=DMSO must be COLUMN=VALUE, e.g. controls=compound=DMSO, or none",
        ),
        (
            "free:classifier=logistic",
            "--protocol free: classifier=logistic needs exclude=COLUMN, whose groups are left out in turn",
        ),
    ],
)
def test_wrong_protocols_are_one_sentence(text, sentence):
    with pytest.raises(ConfigError) as error:
        parse_protocol(text)
    assert str(error.value) == sentence
