"""CSV files as tables of text; each mistake in one is a sentence with file, column and line."""

import re
import warnings
from pathlib import Path

import numpy as np
import pandas as pd

from dinov2.data.names import nearest
from dinov2.errors import DatasetError

_FIRST_LINE = 2  # after the header, counted from 1
_LINE_IN_MESSAGE = re.compile(r"line (\d+)")


class CsvTable:
    """A CSV file with a header, its cells as text without space around them; an empty cell is "".

    Args:
        path: of the file, UTF-8, comma between cells.

    Raises:
        DatasetError: it is missing, empty, not text, or a line has too many cells.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = str(path)
        frame = _read(self.path)
        filled = (frame != "").any(axis=1).to_numpy()  # blank lines are no rows
        self._lines = np.flatnonzero(filled) + _FIRST_LINE
        self._frame = frame[filled].reset_index(drop=True)
        if not len(self._frame):
            raise DatasetError(f"{self.path} has a header and no rows")

    def __len__(self) -> int:
        return len(self._frame)

    @property
    def names(self) -> list[str]:
        """Names of the columns."""
        return [str(name) for name in self._frame.columns]

    def find(self, *names: str) -> str | None:
        """Return the first of some names that is a column, in any case."""
        columns = {column.lower(): column for column in reversed(self.names)}
        return next((columns[name.lower()] for name in names if name.lower() in columns), None)

    def column(self, name: str, *, hint: str = "") -> pd.Series:
        """Return a column.

        Args:
            name: its exact name.
            hint: how to name another one, for the error.

        Raises:
            DatasetError: there is none; offers the nearest.
        """
        if name not in self._frame.columns:
            raise DatasetError(f"{self.path} has no column {name!r}{nearest(name, self.names)}{hint}")
        return self._frame[name].str.strip()

    def numbers(self, name: str) -> pd.Series:
        """Return a column as float64, NaN for empty cells.

        Raises:
            DatasetError: there is no such column, or a cell is no number.
        """
        texts = self.column(name)
        values = pd.to_numeric(texts, errors="coerce").astype(np.float64)
        wrong = np.flatnonzero(((texts != "") & ~np.isfinite(values)).to_numpy())
        if len(wrong):
            raise DatasetError(f"{self.where(wrong[0])}: {name} is {texts.iloc[wrong[0]]!r}; it must be a number")
        return values

    def where(self, row: int) -> str:
        """Name file and line of a row, counted from 0."""
        return f"{self.path}, line {self.line(row)}"

    def line(self, row: int) -> int:
        """Line of a row in the file, counted from 1; the rows, from 0."""
        return int(self._lines[row])


def _read(path: str) -> pd.DataFrame:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", pd.errors.ParserWarning)  # lines longer than the header
            frame = pd.read_csv(
                path, dtype=str, na_filter=False, index_col=False, skip_blank_lines=False, encoding="utf-8-sig"
            )
    except OSError as error:
        raise DatasetError(f"{path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise DatasetError(f"{path} is not UTF-8 text (byte {error.start}); save it as CSV in UTF-8") from error
    except pd.errors.EmptyDataError as error:
        raise DatasetError(f"{path} is empty; it needs a line with the names of its columns") from error
    except (pd.errors.ParserError, pd.errors.ParserWarning) as error:
        if "EOF inside string" in str(error):
            raise DatasetError(f"{path}: a quote is opened and not closed; close it") from error
        line = _LINE_IN_MESSAGE.search(str(error))
        where = f"{path}, line {line[1]}" if line else path
        raise DatasetError(f"{where}: more cells than the header has; put texts that hold a comma in quotes") from error
    return frame.fillna("")
