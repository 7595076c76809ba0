"""Means with their uncertainty."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Estimate(NamedTuple):
    """A mean over independent items and its standard error."""

    mean: float
    standard_error: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Estimate":
        """Raises ValueError for no values; the standard error of a single value is unknown (nan)."""
        if not len(values):
            raise ValueError("no values to estimate a mean from")
        error = np.std(values, ddof=1) / np.sqrt(len(values)) if len(values) > 1 else np.nan
        return cls(float(np.mean(values)), float(error))

    def __str__(self) -> str:
        return f"{self.mean:.2f} ± {self.standard_error:.2f}"
