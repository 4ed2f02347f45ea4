"""p-values of the losslessness tests over 1000 seeds are uniform: neither a small bias nor an insensitive
test would be.

On demand: ``pytest -m slow tests/rollout/verify/test_uniformity.py`` writes
``benchmarks/results/p_values.png`` anew.
"""

import matplotlib
import numpy as np
import pytest
from scipy import stats

from tests.rollout.verify.verifier_cases import FITTING, Process, p_value, run
from tests.support import ROOT

matplotlib.use("Agg")
SEEDS = 1000


@pytest.mark.slow
def test_p_values_are_uniform():
    process = Process()
    joint = process.joint()
    values: dict[tuple[str, str | None], list[float]] = {}
    for seed in range(SEEDS):
        for tree, verifier in FITTING:
            counts, _ = run(process, tree, verifier, 2000, seed=seed + 10)
            values.setdefault((tree, verifier), []).append(p_value(counts, joint))
    plot({f"{tree}, {verifier or 'deterministic'}": ps for (tree, verifier), ps in values.items()})
    distances = {case: stats.kstest(ps, "uniform").pvalue for case, ps in values.items()}
    assert min(distances.values()) > 1e-3 / len(distances), distances


def plot(values: dict[str, list[float]]) -> None:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(3, 5, figsize=(13, 6), dpi=90, sharey=True)
    for ax in axes.flat:
        ax.axis("off")
    for ax, (name, ps) in zip(axes.flat, values.items(), strict=False):
        ax.axis("on")
        ax.hist(ps, bins=np.linspace(0, 1, 21), color="#4878d0")
        ax.axhline(len(ps) / 20, color="grey", lw=0.8)
        ax.set_title(f"{name}\nKS p = {stats.kstest(ps, 'uniform').pvalue:.2f}", fontsize=8)
    figure.tight_layout()
    figure.savefig(ROOT / "benchmarks" / "results" / "p_values.png")
    plt.close(figure)
