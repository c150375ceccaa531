"""What loading weights does, or did: tensors by fate, in numbers and by name."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

_NAMES_SHOWN = 6


@dataclass(frozen=True, kw_only=True)
class LoadReport:
    """What a plan does, or loading did: tensor names by fate, and the numbers of values in them."""

    path: str
    naming: str  # whose names the file uses, e.g. "timm DINOv2"
    found_under: str | None  # key of the file that held the network; None: the file is the network
    loaded: tuple[str, ...]  # official names, all that got values from the file
    converted: tuple[str, ...]  # of those, the ones that were renamed, joined, split or reshaped
    resized: Mapping[str, str]  # of those, the ones fitted to another size: "37x37 -> 16x16 patches"
    missing: tuple[str, ...]  # in the model, not in the file: left at their initial value
    heads: tuple[str, ...]  # projection heads of the file, which training can start from
    unused: tuple[str, ...]  # in the file, part of neither backbone nor heads
    num_parameters: Mapping[str, int]  # values by fate: loaded, converted, resized, missing, heads, unused

    def __str__(self) -> str:
        """Give counts, and names of what matters, in one line."""
        key = "" if self.found_under is None else f" key={self.found_under}"
        resized = [f"{name}: {text}" for name, text in self.resized.items()]
        fates = [
            f"loaded={len(self.loaded)}{self._details('loaded')}",
            f"converted={len(self.converted)}{self._details('converted')}",
            f"resized={len(resized)}{self._details('resized', resized)}",
            f"left_at_initial_values={len(self.missing)}{self._details('missing', self.missing)}",
            f"heads={len(self.heads)}{self._details('heads', self.heads)}",
            f"unused={len(self.unused)}{self._details('unused', self.unused)}",
        ]
        return f"weights={self.path} names={self.naming}{key} {' '.join(fates)}"

    def _details(self, fate: str, names: Sequence[str] = ()) -> str:
        count = self.num_parameters[fate]
        return f" ({format_count(count)} values{': ' if names else ''}{list_names(names)})" if count else ""


def list_names(names: Sequence[str]) -> str:
    """Join names with commas; of many, the first six and how many more there are."""
    more = f", {len(names) - _NAMES_SHOWN} more" if len(names) > _NAMES_SHOWN else ""
    return f"{', '.join(names[:_NAMES_SHOWN])}{more}"


def format_count(number: int) -> str:
    """Write a number of values for people: `22.06 M`; small numbers as they are."""
    return f"{number / 1e6:.2f} M" if number >= 10_000 else str(number)
