"""Protocols: how images become profiles, which profiles may be compared, and what is to be predicted.

Written as `NAME:key=value:key=value`; the name gives the values of the keys that are left out:

    nsc                                  not the same compound: a treatment's mechanism of action (MOA) is that of the
                                         most similar treatment with another compound
    nscb                                 nor the same batch
    leave-one-group-out:column=plate     each image by all images of other plates; or slides, patients, parts
    free                                 nothing is excluded but the image itself

    label=moa                            column that is predicted; target: the labels of the dataset
    aggregate=mean@plate/well,median@treatment
                                         images are averaged to profiles, step by step; none: each image is one
    exclude=compound,batch               profiles with an equal value in one of these columns are not compared
    column=plate                         the same for one column
    controls=compound=DMSO               column and value of images that are never classified nor compared
    many=same | split                    profiles with several values in an excluded column, as a treatment that was
                                         repeated in many batches; see `Protocol`
    unanswerable=drop | count            labels that can never be right; see `Protocol`
    classifier=knn | logistic            k=1, temperature=0.07; c=1

Source: Ljosa et al. 2013, doi:10.1177/1087057113503553 (profiles, NSC); Ando et al. 2017, doi:10.1101/161422, and
Caicedo et al. 2018, doi:10.1109/CVPR.2018.00970 (NSCB).
"""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

from dinov2.data.names import nearest
from dinov2.errors import ConfigError
from dinov2.eval.columns import TARGET

STATISTICS = ("mean", "median")
_EXAMPLE = "write it as leave-one-group-out:column=plate"


@dataclass(frozen=True)
class Level:
    """Members with equal values in some columns become one profile."""

    columns: tuple[str, ...]
    statistic: str  # one of STATISTICS, of each feature

    def __str__(self) -> str:
        return f"{self.statistic}@{'/'.join(self.columns)}"


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """What is compared with what.

    Two rules stand for what the papers leave to their code:

    `many`: a profile of several batches (in BBBC021 taxol at 0.3 uM, which is on all plates). same: two profiles are of
    the same batch if they have the same set of batches, as in the code of Caicedo et al.; taxol may so be compared with
    every batch, its own wells of that batch included. split: each batch of a treatment has a profile of its own, and a
    treatment counts with the share of its profiles that are right; no well of the same batch is ever compared.

    `unanswerable`: a label none of whose profiles may be compared with another of that label can never be right. drop:
    its profiles are left out, both as questions and as neighbours, as in the papers, where NSCB leaves out the MOAs
    that occur in one batch only (BBBC021: Cholesterol-lowering and Kinase inhibitors; 92 treatments of 103 remain).
    count: they stay, and count as wrong. A single profile without a comparable one of its label, where others of that
    label have one, stays and counts as wrong under both.
    """

    name: str
    label: str = TARGET
    aggregate: tuple[Level, ...] = ()
    exclude: tuple[str, ...] = ()
    controls: tuple[str, str] | None = None  # column, value in any case
    many: str = "same"
    unanswerable: str = "drop"
    classifier: str = "knn"
    k: int = 1  # neighbours that vote
    temperature: float = 0.07  # of the votes, > 0, no unit
    c: float = 1.0  # of logistic regression: inverse strength of its L2 penalty

    def __post_init__(self) -> None:
        def require(holds: bool, setting: str, rule: str) -> None:
            if not holds:
                raise ConfigError(f"--protocol {self.name}: {setting} must be {rule}")

        require(self.many in ("same", "split"), f"many={self.many}", "same or split")
        require(self.unanswerable in ("drop", "count"), f"unanswerable={self.unanswerable}", "drop or count")
        require(self.classifier in ("knn", "logistic"), f"classifier={self.classifier}", "knn or logistic")
        require(self.k >= 1, f"k={self.k}", "at least 1")
        require(self.temperature > 0, f"temperature={self.temperature:g}", "above 0")
        require(self.c > 0, f"c={self.c:g}", "above 0")
        if self.classifier == "logistic" and not self.exclude:
            raise ConfigError(
                f"--protocol {self.name}: classifier=logistic needs exclude=COLUMN, whose groups are left out in turn"
            )

    def columns(self) -> dict[str, str]:
        """Return the columns of the metadata that this needs, each with the key that names it."""
        found = {} if self.label == TARGET else {self.label: f"label={self.label}"}
        for level in self.aggregate:
            found |= {column: f"aggregate={level}" for column in level.columns}
        found |= {column: f"exclude={column}" for column in self.exclude}
        return found if self.controls is None else found | {self.controls[0]: f"controls={'='.join(self.controls)}"}

    def __str__(self) -> str:
        controls = "none" if self.controls is None else "=".join(self.controls)
        how = f"k={self.k}:temperature={self.temperature:g}" if self.classifier == "knn" else f"c={self.c:g}"
        return (
            f"{self.name}:label={self.label}:aggregate={','.join(map(str, self.aggregate)) or 'none'}:"
            f"exclude={','.join(self.exclude) or 'none'}:controls={controls}:many={self.many}:"
            f"unanswerable={self.unanswerable}:classifier={self.classifier}:{how}"
        )


WELLS = Level(("plate", "well"), "mean")
PLATES = Level(("plate", "treatment"), "mean")
TREATMENTS = Level(("treatment",), "median")
NSC = Protocol(
    name="nsc",
    label="moa",
    aggregate=(WELLS, TREATMENTS),
    exclude=("compound",),
    controls=("compound", "DMSO"),
)
NSCB = replace(NSC, name="nscb", exclude=("compound", "batch"))
NAMED = {
    protocol.name: protocol
    for protocol in (NSC, NSCB, Protocol(name="leave-one-group-out", exclude=("group",)), Protocol(name="free"))
}


def parse_protocol(text: str) -> Protocol:
    """Read a protocol as it stands on the command line.

    Raises:
        ConfigError: the name, a key or a value is wrong.
    """
    name, *settings = text.split(":")
    if name not in NAMED:
        raise ConfigError(f"--protocol {text}: unknown name {name!r}{nearest(name, list(NAMED))}; {_EXAMPLE}")
    keys = [field.name for field in fields(Protocol) if field.name != "name"] + ["column"]
    given: dict[str, Any] = {}
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals or not value:
            raise ConfigError(f"--protocol {text}: {setting!r} is not key=value; {_EXAMPLE}")
        if key not in keys:
            raise ConfigError(f"--protocol {text}: no key {key!r}{nearest(key, keys)}")
        target = "exclude" if key == "column" else key
        if target in given:
            raise ConfigError(f"--protocol {text} gives {target} twice")
        given[target] = _READERS[target](value, f"--protocol {text}: {key}={value}") if target in _READERS else value
    return replace(NAMED[name], **given)


def _levels(value: str, where: str) -> tuple[Level, ...]:
    """Read `mean@plate/well,median@treatment`."""
    levels = []
    for part in _names(value, where):
        statistic, _, columns = part.partition("@")
        if statistic not in STATISTICS or not all(columns.split("/")):
            raise ConfigError(f"{where}: {part!r} must be like mean@plate/well, with {' or '.join(STATISTICS)}")
        levels.append(Level(tuple(columns.split("/")), statistic))
    return tuple(levels)


def _names(value: str, where: str) -> tuple[str, ...]:
    """Read a list of names with commas between them; `none` is empty."""
    names = tuple(name.strip() for name in value.split(","))
    if not all(names):
        raise ConfigError(f"{where}: a name is empty; put one comma between two names")
    return () if names == ("none",) else names


def _controls(value: str, where: str) -> tuple[str, str] | None:
    """Read `compound=DMSO`."""
    if value == "none":
        return None
    column, equals, wanted = value.partition("=")
    if not column or not equals or not wanted:
        raise ConfigError(f"{where} must be COLUMN=VALUE, e.g. controls=compound=DMSO, or none")
    return column, wanted


def _number(kind: type, rule: str) -> Callable[[str, str], Any]:
    def read(value: str, where: str) -> Any:
        try:
            return kind(value)
        except ValueError as error:
            raise ConfigError(f"{where} must be {rule}") from error

    return read


_READERS: dict[str, Callable[[str, str], Any]] = {
    "aggregate": _levels,
    "exclude": _names,
    "controls": _controls,
    "k": _number(int, "a whole number"),
    "temperature": _number(float, "a number"),
    "c": _number(float, "a number"),
}
