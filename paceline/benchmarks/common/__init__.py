"""What several studies share: prompts, peers, runs of the main job, tables, plots and result files."""
