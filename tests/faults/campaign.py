"""The whole fault campaign: requests, servers, broken files, kills and bad rewards, with one table of what
came of them.

``make faults`` (``python -m tests.faults.campaign``) takes about half an hour on two cores, writes
``benchmarks/results/faults.json`` as the parts end, and the table of ``docs/faults.md``. Names after the
command run those parts alone.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "faults.json"
PAGE = ROOT / "docs" / "faults.md"
BEGIN, END = "<!-- counts: written by make faults -->", "<!-- end of counts -->"
SEED = 19


def requests() -> dict[str, Any]:
    """5,000 requests in random calls on one engine; raises at the first wrong answer."""
    from tests.faults.requests import run

    return run(5000, SEED)


def servers() -> dict[str, Any]:
    """Random stories of an engine's server; raises at the first future that does not end as it should."""
    return _tests("tests/rl/integrations/test_server_faults.py", "-m", "slow or not slow")


def files() -> dict[str, Any]:
    """200 broken files of a finished run, each before it goes on."""
    from tests.faults.broken_files import run

    found = run(
        200, SEED, lambda broken: print(broken.outcome, broken.how, broken.file, sep="  ", flush=True)
    )
    assert not found["silent"] and not found["traceback"], found
    return found


def kills() -> dict[str, Any]:
    """40 kills of launchers, agents, ranks and scorers of a run on two ranks."""
    from tests.faults.kills import run

    found = run(40, SEED, lambda kill: print(kill.victim, kill.signal, kill.wrong, sep="  ", flush=True))
    assert not found["lost"] and not found["left behind"] and not found["hung"], found
    return found


def rewards() -> dict[str, Any]:
    """Every kind of bad reward."""
    from tests.faults.bad_rewards import CASES

    return {"kinds": len(CASES), **_tests("tests/faults/test_bad_rewards.py", "-m", "ci or not ci")}


PARTS: dict[str, Callable[[], dict[str, Any]]] = {
    "requests": requests, "servers": servers, "files": files, "kills": kills, "rewards": rewards,
}  # fmt: skip


def table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """The counts as a table in Markdown, a row for each part."""
    rows = ["| part | came to | wrong | seconds |", "|---|---|---|---|"]
    for name, part in results.items():
        counts = "; ".join(f"{what} {number:,}" for what, number in part["counts"].items())
        rows.append(f"| {name} | {counts} | {part['wrong'] or 'nothing'} | {part['seconds']:.0f} |")
    return "\n".join(rows)


def write(results: Mapping[str, Mapping[str, Any]]) -> None:
    """Keeps the results, and puts the table into the page."""
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    before, _, rest = PAGE.read_text().partition(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}\n\n{table(results)}\n\n{END}{rest.partition(END)[2]}")


def main(names: list[str]) -> int:
    """Runs the parts. Returns how many of them found something wrong."""
    unknown = [name for name in names if name not in PARTS]
    if unknown:
        print(f"{unknown[0]} is no part of the campaign; there are: {', '.join(PARTS)}", file=sys.stderr)
        return 2
    results = json.loads(RESULTS.read_text()) if RESULTS.is_file() and names else {}
    with tempfile.TemporaryDirectory() as cache:
        os.environ.setdefault("PACELINE_CACHE", cache)
        os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny models: threads would only wait for each other
        for name in names or list(PARTS):
            print(f"faults: {name}", flush=True)
            begin, wrong = time.monotonic(), ""
            try:
                counts = PARTS[name]()
            except Exception as error:
                counts, wrong = {}, f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            results[name] = {"counts": counts, "wrong": wrong, "seconds": time.monotonic() - begin}
            write({part: results[part] for part in PARTS if part in results})
    print(table(results))
    return sum(bool(part["wrong"]) for part in results.values())


def _tests(*arguments: str) -> dict[str, Any]:
    """Runs tests in a process of their own and counts them."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1800, check=False)
    passed = re.search(r"(\d+) passed", done.stdout)
    if done.returncode or passed is None:
        raise AssertionError(done.stdout[-1500:])
    return {"tests passed": int(passed.group(1))}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
