"""Writes a run's drafter as a directory that vLLM and SGLang load: ``python launch/export_drafter.py RUN OUT``."""

import argparse
from pathlib import Path

from drafter_trainer.checkpoint import DrafterError
from drafter_trainer.export import export_drafter
from rl.cli import user_errors
from rl.errors import UserError

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    with user_errors():
        try:
            print(export_drafter(args.run, args.out))
        except DrafterError as error:
            raise UserError(str(error)) from None
