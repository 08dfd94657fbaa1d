import os
import sys
import tempfile
from pathlib import Path

import pytest

# Workers that have more threads than cores wait for each other's; and with one, sums are added up
# in one order here and in the processes that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# No test follows what somebody has calibrated on this machine.
os.environ["LITFLORA_PATHS"] = str(Path(tempfile.gettempdir(), f"litflora-none-{os.getpid()}.json"))

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def no_process_group_is_left():
    """A Trainer of several processes leaves its group, also that of one process here."""
    yield
    torch = sys.modules.get("torch")
    if torch is not None and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data and weights, which is no part of the repository."""
    folder = Path(os.environ.get("LITFLORA_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no real data in {folder}: set LITFLORA_DATA to its folder")
    return folder
