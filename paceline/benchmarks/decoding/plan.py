"""Plans the memory that CUDA graphs of two model shapes would take, naive and bucketed; needs no GPU."""

from __future__ import annotations

import argparse

from paceline.benchmarks.decoding.model_shapes import BATCHES, SHAPES, STRATEGIES
from paceline.rollout.graphs.graph_plan import MOST_ROWS, ModelShape, naive_bytes, plan_graphs, plan_keys


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds no options: the shapes, strategies and batch sizes are fixed."""


def run(args: argparse.Namespace) -> None:
    """Prints the number of graphs and the planned memory of each shape."""
    for shape in SHAPES:
        count, bucketed, naive = planned(shape)
        print(
            f"{shape}: {count} graphs, {bucketed / 1e6:.0f} MB bucketed, {naive / 1e6:.0f} MB naive: "
            f"{bucketed / naive:.2f}"
        )


def planned(shape: str, span: int = 2048) -> tuple[int, int, int]:
    """Plans the graphs of a shape for TLT's strategies and batch sizes; nothing is captured.

    Args:
        shape: Name of the shape in `SHAPES`.
        span: Number of keys that a graph attends to.

    Returns:
        The number of bucketed graphs, their bytes, and the bytes of naive graphs.
    """
    sizes = SHAPES[shape]
    model = ModelShape(
        layers=sizes["num_hidden_layers"],
        hidden=sizes["hidden_size"],
        intermediate=sizes["intermediate_size"],
        heads=sizes["num_attention_heads"],
        kv_heads=sizes["num_key_value_heads"],
        head_dim=sizes["head_dim"],
        vocab=sizes["vocab_size"],
    )
    plan = plan_graphs(model, plan_keys("target", BATCHES, (1, *STRATEGIES), (span,), MOST_ROWS))
    return len(plan.keys), plan.total_bytes, naive_bytes(model, STRATEGIES, BATCHES, span)
