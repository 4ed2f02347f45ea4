"""Reward functions that do something wrong, or something odd, and what has to come of it.

Each is a module whose ``reward`` is called with the completions ``one`` and ``three``. Nothing that it does
may end the run, keep it waiting beyond the limits, or cost other completions their scores.
"""

from __future__ import annotations

from dataclasses import dataclass
from textwrap import dedent, indent

COMPLETIONS = ("one", "three")
LENGTHS = (3.0, 5.0)
FAILS = (None, None)


@dataclass(frozen=True)
class BadReward:
    """A reward function and its outcome.

    Attributes:
        name: Of the module.
        source: Of the module, which defines ``reward``.
        expected: The score of each completion, None where there is none; None in its place where the reward
            is refused before it is called.
        says: A part of the line that the user reads; empty where there is nothing to be said.
        slow: Whether it is ended by the time limit.
    """

    name: str
    source: str
    expected: tuple[float | None, ...] | None
    says: str = ""
    slow: bool = False


def _body(
    name: str, body: str, expected: tuple[float | None, ...], says: str = "", slow: bool = False
) -> BadReward:
    """A reward function with this body."""
    imports = "import asyncio, ctypes, os, signal, socket, sys, threading, time\n\n\n"
    function = "def reward(prompts, completions, **columns):\n"
    return BadReward(
        name, imports + function + indent(dedent(body).strip(), "    ") + "\n", expected, says, slow
    )


_LENGTHS = "return [float(len(text)) for text in completions]"

CASES: list[BadReward] = [
    # what ends the function
    _body("raises", "raise ValueError('no such unit')", FAILS, "ValueError: no such unit"),
    _body("raises_lines", "raise ValueError('first\\nsecond\\n')", FAILS, "first second"),
    _body("raises_no_exception", "class Odd(BaseException): pass\nraise Odd('odd')", FAILS, "Odd: odd"),
    _body(
        "raises_what_cannot_be_said",
        "class Odd(Exception):\n    def __str__(self): return 1\nraise Odd",
        FAILS,
        "Odd: its message cannot be read",
    ),
    _body("interrupts", "raise KeyboardInterrupt", FAILS, "KeyboardInterrupt"),
    _body("exits", "sys.exit(0)", FAILS, "SystemExit"),
    _body("recurses", "return reward(prompts, completions)", FAILS, "RecursionError"),
    # what ends the process
    _body("exits_the_process", "os._exit(0)", FAILS, "ended with status 0"),
    _body(
        "kills_itself",
        "os.kill(os.getpid(), signal.SIGKILL)\ntime.sleep(5)",
        FAILS,
        "ended by signal SIGKILL",
    ),
    _body("crashes", "ctypes.string_at(0)", FAILS, "ended by signal SIGSEGV"),
    _body("closes_every_file", f"os.closerange(3, 1024)\n{_LENGTHS}", FAILS, "scorer's process"),
    # what takes too long or too much
    _body("hangs", "time.sleep(600)", FAILS, "took longer", slow=True),
    _body("spins", "while True: pass", FAILS, "took longer", slow=True),
    _body(
        "hangs_and_ignores_signals",
        "for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP): signal.signal(number, "
        "signal.SIG_IGN)\ntime.sleep(600)",
        FAILS,
        "took longer",
        slow=True,
    ),
    _body("returns_without_end", "while True: yield 1.0", FAILS, "returned more rewards for 2 completions"),
    _body("eats_memory", "return [len(bytearray(1 << 40))] * 2", FAILS, "MemoryError"),
    # what it does beside
    _body("forks_and_comes_back", f"os.fork()\n{_LENGTHS}", LENGTHS),
    _body("forks_and_hangs", f"if not os.fork(): time.sleep(600)\n{_LENGTHS}", LENGTHS),
    _body("leaves_threads", f"threading.Thread(target=time.sleep, args=(600,)).start()\n{_LENGTHS}", LENGTHS),
    _body("prints_megabytes", f"for _ in range(4096): print('x' * 1024)\n{_LENGTHS}", LENGTHS),
    _body("closes_stdout", f"sys.stdout.close()\nos.close(1)\n{_LENGTHS}", LENGTHS),
    _body("reads_stdin", f"sys.stdin.read()\n{_LENGTHS}", LENGTHS),
    _body("changes_the_folder", f"os.chdir('/')\n{_LENGTHS}", LENGTHS),
    _body("installs_handlers", f"signal.signal(signal.SIGTERM, lambda *_: None)\n{_LENGTHS}", LENGTHS),
    _body("leaves_an_alarm", f"signal.setitimer(signal.ITIMER_REAL, 0.05)\n{_LENGTHS}", LENGTHS),
    _body("empties_its_arguments", "prompts.clear()\ncompletions.clear()\nreturn [3, 5]", LENGTHS),
    _body("writes_a_file", "open('written', 'w')\nreturn [1, 1]", FAILS, "task.sandbox=off"),
    _body("opens_a_connection", "socket.create_connection(('127.0.0.1', 9))", FAILS, "task.sandbox=off"),
    _body("kills_the_trainer", "os.kill(os.getppid(), signal.SIGKILL)", FAILS, "PermissionError"),
    # what it returns
    _body("returns_none", "return None", FAILS, "returned None"),
    _body("returns_a_number", "return 1.0", FAILS, "return a list of numbers"),
    _body("returns_text", "return '12'", FAILS, "return a list of numbers"),
    _body("returns_a_mapping", "return {0: 1.0, 1: 0.0}", FAILS, "return a list of numbers"),
    _body("returns_too_few", "return [1.0]", FAILS, "returned 1 rewards for 2 completions"),
    _body("returns_too_many", "return [1.0] * 3", FAILS, "returned more rewards"),
    _body("returns_nan", "return [float('nan'), 5]", (None, 5.0), "nan, which is not a finite number"),
    _body("returns_infinity", "return [3, float('-inf')]", (3.0, None), "-inf, which is not a finite number"),
    _body("returns_too_large", "return [1e39, 10 ** 400]", FAILS, "not a finite number"),
    _body("returns_numbers_as_text", "return ['3', 5]", (None, 5.0), "'3', which is not a finite number"),
    _body("returns_lists", "return [[3.0], 5]", (None, 5.0), "not a finite number"),
    _body("returns_complex", "return [3j, 5]", (None, 5.0), "not a finite number"),
    _body("returns_none_for_one", "return [None, 5]", (None, 5.0), "every reward function returned None"),
    _body("returns_booleans", "return [True, False]", (1.0, 0.0)),
    _body("returns_an_array", "import numpy\nreturn numpy.array([3, 5])", LENGTHS),
    _body("returns_numpy_scalars", "import numpy\nreturn [numpy.float32(3), numpy.int64(5)]", LENGTHS),
    _body("yields", "for text in completions: yield len(text)", LENGTHS),
    # what it is
    BadReward("is_async", "async def reward(completions, **columns):\n    return [3, 5]\n", LENGTHS),
    BadReward(
        "is_async_and_raises",
        "async def reward(**columns):\n    raise ValueError('late')\n",
        FAILS,
        "ValueError: late",
    ),
    BadReward(
        "is_a_class",
        "class reward:\n    def __call__(self, completions, **columns):\n        return [3, 5]\n",
        LENGTHS,
    ),
    BadReward(
        "names_no_columns",
        "def reward(completions):\n    return [len(text) for text in completions]\n",
        LENGTHS,
    ),
    BadReward(
        "wants_what_is_not_there", "def reward(completions, judge):\n    return [1, 1]\n", FAILS, "judge"
    ),
    BadReward("is_no_function", "reward = 1.0\n", None, "cannot be called"),
    BadReward("is_not_there", "def rewards(**columns):\n    return [3, 5]\n", None, "write module:function"),
    BadReward("cannot_be_imported", "import no_such_module\n", None, "No module named"),
    BadReward("is_not_python", "def reward(:\n", None, "SyntaxError"),
    BadReward("exits_at_import", "import sys\nsys.exit(0)\n", None, "SystemExit"),
    BadReward("exits_the_process_at_import", "import os\nos._exit(0)\n", None, "ended with status 0"),
]
