"""The benchmarks run, their checks see what is wrong, and CUDA is asked for what it should be."""

import re
import sys
from dataclasses import replace
from functools import partial

import inference
import lisa
import llava
import llava_step
import memory
import models
import optimizer
import pytest
import shapes
import step
import timing
import torch
import training
from torch import nn

from litflora.adapters import merge
from litflora.adapters.cache import WeightCache
from litflora.adapters.maps import LinearMap
from litflora.adapters.measured import processor

VISION, LLAMA = "vit_small_patch16_224", "llama_7b_stack"


class Shallow(models.Vision):
    """Two blocks of a ViT."""

    def build(self):
        net = super().build()
        net.blocks = net.blocks[:2]
        return net


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    """Models of the same kinds, but small."""
    for known in models.MODELS.values():
        monkeypatch.setitem(known, VISION, Shallow(2, 32, "vit_tiny_patch16_224"))
        monkeypatch.setitem(known, LLAMA, known[LLAMA].small())


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
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "a GPU")
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


def test_a_model_without_convolutions_has_the_variants_that_adapt_none(run, capsys):
    text = run("--model", LLAMA)
    left_out = ("dense", ", all")
    wanted = [name for name in step.VARIANTS if not name.endswith(left_out)]
    assert first_cells(text) == ["variant", *wanted]
    assert "bf16 weights, bf16 autocast" in text
    with pytest.raises(SystemExit):
        run("--model", LLAMA, "--variants", "FLoRA auto, all")
    assert "adapts convolutions" in capsys.readouterr().err


@pytest.mark.parametrize("name", [VISION, LLAMA])
def test_the_check_sees_a_wrong_gradient(run, monkeypatch, name):
    right = LinearMap.narrow_grad
    monkeypatch.setattr(LinearMap, "narrow_grad", lambda *args: 1.001 * right(*args))
    with pytest.raises(AssertionError, match="lora_A"):
        run("--model", name, "--variants", "LoRA auto, linear")


@pytest.mark.parametrize("name", [VISION, LLAMA])
def test_the_floor_alone_reaches_the_input(name):
    steppers = training.build(models.MODELS["cpu"][name], ["floor", "probe"], "cpu")
    for stepper in steppers.values():
        stepper.loss().backward()
    assert steppers["floor"].x.grad.abs().sum() > 0
    assert steppers["probe"].x.grad is None
    assert steppers["floor"].saved() > steppers["probe"].saved()


def test_the_stack_has_the_shape_of_llama_7b():
    """A layer of the real model has 202,383,360 parameters; a token sees none that follow."""
    with torch.device("meta"):
        net = models.Llama(batch=1, size=8, layers=2).build()
    layers = list(net.stack.layers.parameters())
    assert sum(p.numel() for p in layers) == 2 * 202_383_360
    assert {p.dtype for p in layers} == {torch.bfloat16}

    small = models.MODELS["cpu"][LLAMA]
    net, x = small.build(), small.example()
    before, after = (net.stack(inputs_embeds=each).last_hidden_state for each in (x, x[:, :-1]))
    torch.testing.assert_close(before[:, :-1], after)


# Inference ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [VISION, LLAMA])
def test_inference_unmerged_and_merged(run, tmp_path, name):
    text = run("--model", name, "--inference")
    adapters = ("FLoRA", "LoRA", "PEFT LoRA")
    both = [f"{adapter}, {state}" for adapter in adapters for state in ("unmerged", "merged")]
    assert first_cells(text) == ["inference", "base", *both]
    assert re.search(r"^\| base \| [\d.]+ \| 1\.00 \|$", text, re.MULTILINE)
    assert [path.name for path in tmp_path.iterdir()] == [f"{name}_inference_cpu.md"]


@pytest.mark.parametrize("name", inference.CONTESTANTS)
def test_what_is_timed_is_merged_or_not_and_does_not_train(name):
    model = models.MODELS["cpu"][VISION]
    base, x, autocast = model.build().eval(), model.example(), model.autocast("cpu")
    nets = inference.adapted(name, base, x, autocast, 1e-4)
    for key, net in nets.items():
        sets = [getattr(layer, "adapters", layer) for layer in net.modules()]  # PEFT's is the layer
        states = {bool(each.merged) for each in sets if hasattr(each, "merged")}
        assert states == {key == f"{name}, merged"}
        assert not net.training
        assert not inference.infer(net, x, autocast).requires_grad


def test_adapters_below_a_layer_scale_act():
    """Next to adapters that change next to nothing, the rounding of a side path is an error."""
    model = models.Vision(1, 32, "convnext_tiny")
    base = model.build().eval()
    inference.adapted("PEFT LoRA", base, model.example(), model.autocast("cpu"), 1e-4)


def wrongly(net):
    merge(net)
    with torch.no_grad():
        next(p for name, p in net.named_parameters() if "qkv.weight" in name).mul_(1.05)


@pytest.mark.parametrize("fault", ["merged", "unmerged", "zero", "sums"])
def test_the_check_sees_wrong_outputs(run, monkeypatch, fault):
    right = inference.CONTESTANTS["FLoRA"]
    if fault == "merged":
        monkeypatch.setitem(inference.CONTESTANTS, "FLoRA", replace(right, merge=wrongly))
    elif fault == "unmerged":
        monkeypatch.setattr(WeightCache, "get", lambda self, param, weight, *_: weight)
    elif fault == "zero":
        monkeypatch.setattr(inference, "fill", lambda *_: None)
    else:
        monkeypatch.setitem(inference.CONTESTANTS, "FLoRA", replace(right, sums=lambda net: {}))
    with pytest.raises(AssertionError, match="what the adapters change"):
        run("--model", VISION, "--inference")


# The device ---------------------------------------------------------------------------------------


def test_turns_go_up_and_down_the_list_after_one_for_warmth():
    order = []
    runs = {name: partial(order.append, name) for name in "abc"}
    timing.alternate(runs, "cpu", 2)
    assert "".join(order) == "abc" + "abc" + "cba"


def test_on_a_gpu_the_stream_is_timed(cuda):
    assert timing.seconds(lambda: cuda.append("step"), "cuda") == 0.25
    assert cuda == ["record", "step", "record", "wait", "read"]


@pytest.mark.parametrize("name", [VISION, LLAMA])
def test_on_a_gpu_the_table_has_the_peak_memory(run, cuda, name):
    text = run(
        "--model", name, "--variants", "PEFT LoRA, linear", "LoRA auto, linear", device="cuda"
    )
    assert "bf16 autocast, a GPU, medians of 1" in text
    assert "| peak MiB | / PEFT |" in text
    assert re.search(r"^\| LoRA auto, linear \|.* 250 \|.*\| 3\.0 \| 1\.00 \|$", text, re.MULTILINE)
    assert cuda == 2 * ["record", "record", "wait", "read"] + 2 * ["reset"]


@pytest.mark.parametrize("name", [VISION, LLAMA])
def test_on_a_gpu_inference_is_timed_by_the_stream(run, cuda, name):
    text = run("--model", name, "--inference", device="cuda")
    assert text.count("| 250.0 | 1.00 |") == 7
    assert cuda == 7 * ["record", "record", "wait", "read"]


def test_single_layers_are_those_of_a_cpu(run, monkeypatch, tmp_path):
    shape = shapes.Shape("a small one", shapes.linear(8, 16), (4, 8))
    monkeypatch.setattr(shapes, "SHAPES", [shape])
    text = run("--layers", device="cuda")
    assert first_cells(text) == ["layer", "a small one"]
    assert f"float32, {processor()} with" in text
    assert [path.name for path in tmp_path.iterdir()] == ["layers_cpu.md"]


def test_every_kind_of_optimizer_step_is_timed(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["optimizer.py", "--model", VISION, "--repetitions", "1"])
    optimizer.main()
    heads, _, *rows = re.findall(r"^\|.*\|$", capsys.readouterr().out, re.MULTILINE)
    assert heads == "| tuning | tensors | loop, ms | foreach, ms | fused, ms |"
    assert [row.split(" | ")[0] for row in rows] == [f"| {name}" for name in optimizer.TUNINGS]
    assert all(float(cell) > 0 for row in rows for cell in row.strip("| ").split(" | ")[2:])


def test_what_precision_and_checkpointing_save():
    model = models.Vision(2, 64, "test_convnext")
    costs = memory.measure(model, "cpu", repetitions=1)
    text = memory.as_table(costs)
    assert len(text.splitlines()) == 2 + len(memory.PRECISIONS) * len(memory.CHECKPOINTING)
    for precision in memory.PRECISIONS:
        saved = [costs[precision, how].saved for how in ("none", "every-2", "blocks")]
        assert saved == sorted(saved, reverse=True)
        assert saved[0] > 2 * saved[-1]
    weights = {precision: costs[precision, "none"].weights for precision in memory.PRECISIONS}
    assert weights["32-true"] == weights["bf16-mixed"] == 2 * weights["bf16-true"]
    assert weights["bf16-true"] < weights["bf16-mixed, bf16 base"] < 0.65 * weights["32-true"]


def test_what_lisa_saves(monkeypatch, tmp_path, capsys):
    words = ["--models", "test_vit", "--batch", "2", "--size", "64", "--device", "cpu"]
    monkeypatch.setattr(
        sys, "argv", ["lisa.py", *words, "--repetitions", "1", "--out", str(tmp_path)]
    )
    lisa.main()
    text = capsys.readouterr().out
    assert text.endswith((tmp_path / "test_vit_cpu.md").read_text())
    cells = [
        row.strip("| ").split(" | ") for row in re.findall(r"^\|.*\|$", text, re.MULTILINE)[2:]
    ]
    assert [row[0] for row in cells][:3] == ["full", "LoRA, rank 16", "LISA, 2, uniform"]
    full, uniform = ([float(cell) for cell in row[1:5]] for row in (cells[0], cells[2]))
    assert all(few < many for few, many in zip(uniform, full, strict=True))
    assert uniform[0] == pytest.approx(2 * uniform[1], rel=0.1)  # AdamW's two moments


# LLaVA --------------------------------------------------------------------------------------------


def test_a_step_of_llava_is_measured_for_every_contestant(monkeypatch, tmp_path, capsys):
    words = ["--small", "--batch", "1", "--tokens", "24", "--repetitions", "1", "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", ["llava_step.py", *words, "--out", str(tmp_path)])
    llava_step.main()
    text = capsys.readouterr().out
    names = [f"{name}, {base}" for base in ("bf16", "NF4") for name in llava_step.CONTESTANTS]
    assert first_cells(text) == ["tuning", *names]
    assert text.endswith((tmp_path / "llava_small_cpu.md").read_text())


def test_seven_billion_want_a_gpu(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["llava_step.py", "--device", "cpu"])
    with pytest.raises(SystemExit):
        llava_step.main()
    assert "--small" in capsys.readouterr().err


@pytest.mark.parametrize("nf4", [False, True])
def test_contestants_of_llava_begin_as_the_same_model(nf4):
    """The loss of all is that of the base, held in the same type: none adapts what others leave."""
    config = llava.small_llava()
    inputs = llava_step.batch(config, 1, 24, "cpu")
    losses, adapted = [], []
    for tune in llava_step.CONTESTANTS.values():
        net = llava_step.build(config, partial(tune, nf4=nf4), "cpu")
        with torch.autocast("cpu", torch.bfloat16):
            loss = net(**inputs).loss
        loss.backward()
        trained = [p for p in net.parameters() if p.requires_grad]
        assert all(p.dtype == torch.float32 and p.grad is not None for p in trained)
        losses.append(loss.item())
        names = "\n".join(name for name, p in net.named_parameters() if p.requires_grad)
        adapted.append(set(re.findall(r"language_model\.layers\.(\S+?_proj)", names)))
    assert losses == pytest.approx([losses[0]] * len(losses), rel=1e-3)
    assert adapted == 3 * [adapted[0]]
    assert len(adapted[0]) == 2 * 7
