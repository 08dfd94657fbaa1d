"""The benchmarks run, their checks see what is wrong, and CUDA is asked for what it should be."""

import re
from functools import partial

import models
import pytest
import report
import shapes
import step
import timing
import torch
import training
from torch import nn

from litflora.adapters.maps import LinearMap

VISION = "vit_small_patch16_224"


class Shallow(models.Vision):
    """Two blocks of a ViT."""

    def build(self):
        net = super().build()
        net.blocks = net.blocks[:2]
        return net


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    """Models of the same kinds, but small."""
    monkeypatch.setitem(models.MODELS, VISION, Shallow(2, 32, "vit_tiny_patch16_224"))


@pytest.fixture
def run(monkeypatch, tmp_path, capsys):
    """Runs the command; returns what it prints."""

    def go(*words, device="cpu"):
        common = ["--repetitions", "1", "--device", device, "--out", str(tmp_path)]
        monkeypatch.setattr("sys.argv", ["step.py", *words, *common])
        step.main()
        return capsys.readouterr().out

    return go


@pytest.fixture
def cuda(monkeypatch):
    """Stands in for a GPU on a machine that may have none; returns what it is asked, in order."""
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
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: asked.append("reset"))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 2**20)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 4 * 2**20)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    for owner in (nn.Module, torch.Tensor):
        monkeypatch.setattr(owner, "to", staying(owner.to))
    autocast = models.Model.autocast
    monkeypatch.setattr(models.Model, "autocast", lambda self, device: autocast(self, "cpu"))
    return asked


def staying(to):
    return lambda self, *args, **kwargs: self if args == ("cuda",) else to(self, *args, **kwargs)


def first_cells(text):
    return re.findall(r"^\| ([^|]+) \|", text, re.MULTILINE)


# Training steps -----------------------------------------------------------------------------------


def test_a_table_and_a_picture(run, tmp_path):
    variants = ["full", "floor", "PEFT LoRA, linear", "article's two operations, all"]
    variants += ["LyCORIS LoCon-Tucker, all", "FLoRA auto, all", "LoRA auto, linear, dropout"]
    text = run("--model", VISION, "--batch", "3", "--size", "48", "--variants", *variants)
    assert f"{VISION}, 48 pixels, batch 3, rank 8, float32" in text
    assert first_cells(text) == ["variant", *variants]
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {f"{VISION}_cpu.md", f"{VISION}_cpu.png"}
    assert text.endswith((tmp_path / f"{VISION}_cpu.md").read_text())


@pytest.mark.parametrize("name", [VISION])
def test_the_check_sees_a_wrong_gradient(run, monkeypatch, name):
    right = LinearMap.narrow_grad
    monkeypatch.setattr(LinearMap, "narrow_grad", lambda *args: 1.001 * right(*args))
    with pytest.raises(AssertionError, match="lora_A"):
        run("--model", name, "--variants", "LoRA auto, linear")


@pytest.mark.parametrize("name", [VISION])
def test_the_floor_alone_reaches_the_input(name):
    steppers = training.build(models.MODELS[name], ["floor", "probe"], "cpu")
    for stepper in steppers.values():
        stepper.loss().backward()
    assert steppers["floor"].x.grad.abs().sum() > 0
    assert steppers["probe"].x.grad is None
    assert steppers["floor"].saved() > steppers["probe"].saved()


# The device ---------------------------------------------------------------------------------------


def test_turns_go_up_and_down_the_list_after_one_for_warmth():
    order = []
    runs = {name: partial(order.append, name) for name in "abc"}
    timing.alternate(runs, "cpu", 2)
    assert "".join(order) == "abc" + "abc" + "cba"


def test_on_a_gpu_the_stream_is_timed(cuda):
    assert timing.seconds(lambda: cuda.append("step"), "cuda") == 0.25
    assert cuda == ["record", "step", "record", "wait", "read"]


@pytest.mark.parametrize("name", [VISION])
def test_on_a_gpu_the_table_has_the_peak_memory(run, cuda, name):
    text = run(
        "--model", name, "--variants", "PEFT LoRA, linear", "LoRA auto, linear", device="cuda"
    )
    assert "bf16 autocast, a GPU, medians of 1" in text
    assert "| peak MiB | / PEFT |" in text
    assert re.search(r"^\| LoRA auto, linear \|.* 250 \|.*\| 3\.0 \| 1\.00 \|$", text, re.MULTILINE)
    assert cuda == 2 * ["record", "record", "wait", "read"] + 2 * ["reset"]


def test_single_layers_are_those_of_a_cpu(run, monkeypatch, tmp_path):
    shape = shapes.Shape("a small one", shapes.linear(8, 16), (4, 8))
    monkeypatch.setattr(shapes, "SHAPES", [shape])
    text = run("--layers", device="cuda")
    assert first_cells(text) == ["layer", "a small one"]
    assert f"float32, {report.processor()} with" in text
    assert [path.name for path in tmp_path.iterdir()] == ["layers_cpu.md"]


def test_the_name_of_the_processor(tmp_path, monkeypatch):
    info = tmp_path / "cpuinfo"
    info.write_text("processor\t: 0\nmodel\t\t: 17\nmodel name\t: A Fast One\ncache\t: 1\n")
    assert report.processor(info) == "A Fast One"
    monkeypatch.setattr("platform.processor", lambda: "arm")
    assert report.processor(tmp_path / "none") == "arm"
