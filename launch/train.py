"""Trains a policy: ``torchrun --nproc_per_node 2 launch/train.py configs/quickstart.yaml [key=value …]``.

``--resume RUN`` continues a run from its last intact checkpoint, with the recipe that the run has stored.
"""

from paceline.rl.process.parent_death import end_with_launcher

if __name__ == "__main__":
    end_with_launcher()  # first, because everything below is slow
    # imported here because scoring processes import this file again and need none of this
    from paceline.rl.process.console import announce

    announce("loading torch and transformers")
    from paceline.rl.run import main

    main(__doc__)
