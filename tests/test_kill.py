"""A run that was killed, in the middle of a save too, ends as one that was not."""

import kill
import pytest
import torch
from shell import litflora


@pytest.fixture(autouse=True)
def one_thread():
    """As the processes that are killed have it: sums depend on it."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


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


@pytest.mark.slow
def test_sigterm_to_the_first_of_two_processes(tmp_path):
    """Lightning's own handler would wait for the second within the signal."""
    run, log = tmp_path / kill.RUN, tmp_path / "said.txt"
    process = kill.start(kill.arguments(tmp_path, devices=2), log)
    kill.wait_for(process, lambda: (run / "checkpoints" / "last.ckpt").is_file())
    process.terminate()
    assert process.wait(timeout=120) == 143, log.read_text()
    assert f"litflora fit --resume {run}" in log.read_text()
    kill.finish(kill.start(["fit", "--resume", str(run)], log), log)
    assert kill.is_finished(run)
