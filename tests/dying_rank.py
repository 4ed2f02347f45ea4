"""``launch/train.py`` whose rank 1 dies in the second step, at the beginning of the phase that the first
argument names.

With ``HANG=1`` it does not die, it sleeps.
"""

import os
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))


def main() -> None:
    from paceline.rl import run, trainer
    from paceline.rl.monitoring.timeline import Clock

    wanted, met = sys.argv.pop(1), 0
    phase, save = Clock.phase, trainer.save_checkpoint

    def dies(name: str) -> None:
        nonlocal met
        met += name == wanted
        if met == 2 and os.environ["RANK"] == ("0" if wanted == "save" else "1"):
            if "HANG" in os.environ:
                signal.signal(signal.SIGTERM, signal.SIG_DFL)  # or the launcher waits half a minute for it
                time.sleep(1000)
            os._exit(9)

    def dying_phase(self, name):
        dies(name)
        return phase(self, name)

    def dying_save(*arguments, **options):
        dies("save")
        save(*arguments, **options)

    Clock.phase, trainer.save_checkpoint = dying_phase, dying_save
    run.main(None)


if __name__ == "__main__":
    main()
