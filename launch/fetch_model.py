"""Resolves a model id to a directory and prints it: ``python launch/fetch_model.py HuggingFaceTB/SmolLM2-135M-Instruct``."""

import argparse

from rl.cli import user_errors
from rl.policies import SMOLLM2, fetch_policy

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", default=SMOLLM2, help="directory, hub id or tiny-llama")
    with user_errors():
        print(fetch_policy(parser.parse_args().model))
