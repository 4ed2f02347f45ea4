"""What was learned outlives a restart, and a broken file stops nothing."""

import json

from paceline.rollout.backends.adaptive.control_files import ControlFiles
from paceline.rollout.backends.adaptive.depth_control import DepthControl, StepShape

IDENTITY = {"model": "policy", "vllm": "0.32.0"}


def taught(say=lambda line: None):
    """A control that has seen three steps without drafts."""
    control = DepthControl("eagle3", [0, 2], say=say)
    for number in range(4):
        control.scheduled(number, StepShape(1, [0], 10), number * 0.01)
        control.finished(number, [1], number * 0.01 + 0.01, busy=True)
    assert control.schedule() == [(1, 1, 0)]
    return control


def test_a_restart_goes_on_with_what_was_learned(tmp_path):
    control, said = taught(), []
    ControlFiles(control, tmp_path / "new", None, IDENTITY).close()
    fresh = DepthControl("eagle3", [0, 2], say=said.append)
    ControlFiles(fresh, tmp_path / "new", None, IDENTITY).restore()
    assert fresh.schedule() == control.schedule() == [(1, 1, 0)]
    assert json.loads((tmp_path / "new" / "depths.json").read_text())["schedule"] == [[1, 1, 0]]
    assert len(said) == 1 and "restored" in said[0]


def test_what_was_learned_with_something_else_is_not_restored(tmp_path):
    ControlFiles(taught(), tmp_path, None, IDENTITY).close()
    path = tmp_path / "depths.json"
    for text in (path.read_text(), "{", "[]", "{}", json.dumps({"identity": {**IDENTITY, "vllm": "1"}})):
        path.write_text(text)
        said = []
        fresh = DepthControl("eagle3", [0, 2], say=said.append)
        ControlFiles(fresh, tmp_path, None, {**IDENTITY, "vllm": "1"}).restore()
        assert fresh.schedule() == []
        assert len(said) == 1 and "not restored" in said[0] and "\n" not in said[0]


def test_files_are_written_when_due(tmp_path):
    files = ControlFiles(taught(), tmp_path, tmp_path, IDENTITY)
    state, status = tmp_path / "depths.json", tmp_path / "status.json"
    files.update(0.0, busy=True)
    assert json.loads(status.read_text())["steps_by_depth"] == {"0": 4}
    assert not state.exists()
    status.unlink()
    files.update(0.5, busy=True)
    assert not status.exists()
    files.update(1.5, busy=True)
    assert status.exists()
    status.unlink()
    files.update(1.6, busy=False)  # it may be the last chance
    assert status.exists()
    files.update(11.0, busy=True)  # decode steps would wait for it
    assert not state.exists()
    files.update(12.0, busy=False)
    assert state.exists()
    state.unlink()
    files.update(313.0, busy=True)
    assert state.exists()


def test_a_directory_that_cannot_be_written_is_reported_once(tmp_path):
    said = []
    control = taught(said.append)
    (tmp_path / "file").write_text("")
    files = ControlFiles(control, tmp_path / "file", tmp_path / "file", IDENTITY)
    for now in range(100):
        files.update(float(now), busy=False)
    files.close()
    assert len(said) == 2 and all("not written" in line for line in said)
