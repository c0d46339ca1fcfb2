"""Tests of whether one way of running a model is better than another on the same images."""

import numpy as np


def mcnemar(gained: int, lost: int) -> float:
    """McNemar's exact test, two-sided: the chance that fair coins divide so many images as unevenly."""
    from scipy.stats import binomtest

    return float(binomtest(gained, gained + lost).pvalue) if gained + lost else 1.0


def paired(differences_N: np.ndarray) -> tuple[float, float, float]:
    """Their mean, its standard error, and Student's two-sided p-value of the mean being 0."""
    from scipy.stats import t

    n, mean = len(differences_N), float(differences_N.mean())
    if n < 2:
        return mean, float("inf"), 1.0
    error = float(differences_N.std(ddof=1)) / n**0.5
    if error == 0:
        return mean, error, float(mean == 0)
    return mean, error, float(2 * t.sf(abs(mean) / error, n - 1))
