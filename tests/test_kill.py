"""A run that was killed, in the middle of a save too, ends as one that was not."""

import kill
import pytest
import torch
from shell import litflora

torch.set_num_threads(1)  # as the processes that are killed have it: sums depend on it


def test_killed_twice_and_resumed(tmp_path):
    """Both times while it writes a checkpoint, the second time in the resumed run."""
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
    assert litflora(*kill.arguments(tmp_path / "whole")).code == 0
    run, log = tmp_path / "killed" / kill.RUN, tmp_path / "said.txt"
    first = kill.start(kill.arguments(tmp_path / "killed"), log)
    assert kill.kill_while_saving(first, run, 3).startswith("killed")
    resume = ["fit", "--resume", str(run)]
    assert kill.kill_while_saving(kill.start(resume, log), run, 2).startswith("killed")
    assert not kill.is_finished(run)
    assert litflora(*resume).code == 0
    assert kill.outcome(run) == kill.outcome(tmp_path / "whole" / kill.RUN)


@pytest.mark.slow
@pytest.mark.parametrize("devices", [1, 2])
def test_killed_at_twenty_moments(devices):
    assert kill.main(["--devices", str(devices)]) == 0
