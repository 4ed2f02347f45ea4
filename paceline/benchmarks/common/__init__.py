"""Parts that benchmarks share: policy and prompts, peers, training runs, tables, plots and result files."""
