"""The comparison of products counts what differs."""

import pytest
import torch

from paceline.benchmarks.decoding import products


@pytest.mark.parametrize(("noise", "expected"), [(0.0, 0), (0.25, 5)])
def test_rows_that_depend_on_their_number_are_counted(noise, expected):
    def product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return x @ weight.T + noise * (x.shape[1] > 1)

    inputs = {4: torch.randn(1, 5, 4, dtype=torch.float64).round(decimals=2)}
    weight = torch.eye(4, dtype=torch.float64)
    assert products._differing(product, [weight], [(4, 4)], inputs, 5) == expected
