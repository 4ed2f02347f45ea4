"""Trains a policy: ``torchrun --nproc_per_node 2 launch/train.py configs/quickstart.yaml [key=value …]``.

``--resume RUN`` goes on from the last whole checkpoint of a run, with the recipe that the run keeps.
"""

from paceline.rl.process.parent_death import end_with_launcher

if __name__ == "__main__":
    end_with_launcher()  # before anything that takes long
    # here: scoring processes import this file anew, and need none of it
    from paceline.rl.process.console import announce

    announce("loading torch and transformers")
    from paceline.rl.run import main

    main(__doc__)
