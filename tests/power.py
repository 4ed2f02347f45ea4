"""Sizes of statistical tests, from what they must see."""

from scipy import stats


def samples_for(effect: float, cells: int, alpha: float, power: float = 0.999) -> int:
    """How many samples a chi-square test needs to reject, with probability ``power``, a law that deviates.

    Args:
        effect: Σ (wrong − right)² / right over the cells (Cohen's w²): times the number of samples it is the
            test's noncentrality.
        cells: Number of cells.
        alpha: p-value below which the test rejects.
        power: Probability of rejecting.
    """
    limit = stats.chi2.isf(alpha, cells - 1)
    few, enough = 1, 10_000_000
    while enough - few > 1:
        middle = (few + enough) // 2
        if stats.ncx2.sf(limit, cells - 1, middle * effect) >= power:
            enough = middle
        else:
            few = middle
    return enough
