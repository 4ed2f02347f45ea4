"""One rank of ``paceline train``: ``python -m rl.commands.rank``, with the arguments of launch/train.py."""

if __name__ == "__main__":
    from rl.train_command import main  # here: scoring processes import this file anew, and need none of it

    main(None)
