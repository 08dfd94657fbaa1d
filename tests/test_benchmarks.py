"""The benchmarks run, and their GPU branch asks CUDA for what it should."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from litflora.adapters.maps import LinearMap

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture
def step(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.delitem(sys.modules, "step", raising=False)
    import step

    return step


def test_a_table_and_a_picture(step, tmp_path, monkeypatch, capsys):
    small = ["--batch", "2", "--size", "32", "--repetitions", "1", "--device", "cpu"]
    variants = ["full", "floor", "PEFT LoRA, linear", "article's two operations, all"]
    ours = ["FLoRA auto, all", "LoRA auto, linear, dropout"]
    words = ["step.py", "--model", "vit_small_patch16_224", *small, "--out", str(tmp_path)]
    monkeypatch.setattr("sys.argv", [*words, "--variants", *variants, *ours])
    step.main()
    table = capsys.readouterr().out
    assert all(f"| {name} |" in table for name in [*variants, *ours])
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"vit_small_patch16_224_cpu.md", "vit_small_patch16_224_cpu.png"}


def test_the_check_sees_a_wrong_gradient(step, monkeypatch):
    right = LinearMap.narrow_grad
    monkeypatch.setattr(LinearMap, "narrow_grad", lambda *args: 1.001 * right(*args))
    with pytest.raises(AssertionError):
        step.check("vit_small_patch16_224", step.VARIANTS["LoRA auto, linear"])


def test_on_a_gpu_the_stream_is_timed_and_its_memory_read(step, monkeypatch):
    """CUDA's clock and memory are stood in for: what counts is the order they are asked in."""
    asked = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            asked.append("record")

        def elapsed_time(self, other):
            asked.append("read")
            return 250.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: asked.append("wait"))
    stepper = SimpleNamespace(step=lambda: asked.append("step"))
    assert step.seconds(stepper, "cuda") == 0.25
    assert asked == ["record", "step", "record", "wait", "read"]

    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: asked.append("reset"))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 100)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 350)
    assert step.Stepper.peak(stepper) == 250
    assert asked[-2:] == ["reset", "step"]
