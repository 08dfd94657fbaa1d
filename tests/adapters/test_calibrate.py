"""Paths that were timed on this machine: what is timed, what is written, what "auto" follows."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from litflora.adapters import (
    AdapterError,
    FLoRA,
    LoRA,
    activate,
    calibrate,
    inject,
    merge,
    summary,
)
from litflora.adapters.measured import (
    check_writable,
    device_name,
    forget,
    paths_file,
    processor,
    write_timed,
)
from litflora.adapters.paths import choose

from .cases import Holder, assert_close, assert_gradients_close, factors, randomize, with_deltas

CPU = torch.device("cpu")
ROWS = 600


@pytest.fixture(autouse=True)
def paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("LITFLORA_PATHS", str(tmp_path / "cache" / "paths.json"))
    forget()
    yield paths_file()
    forget()


def built(tuning: FLoRA | LoRA, layer: nn.Module | None = None) -> tuple[Holder, Holder]:
    torch.manual_seed(0)
    base = Holder(nn.Linear(64, 48) if layer is None else layer)
    model = deepcopy(base)
    tuning.targets = "layer"
    inject(model, tuning), randomize(model)
    return model, base


def key(model: Holder, rank: int = 4, dtype: torch.dtype = torch.float32) -> str:
    shape = "x".join(map(str, model.layer.weight.shape))
    return f"linear {shape} rank {rank} {str(dtype).removeprefix('torch.')}"


def path_of(model: nn.Module, rows: int = ROWS) -> str:
    (row,) = summary(model, torch.randn(rows, 64)).rows
    return row.path


@pytest.mark.parametrize("path", ["side", "merged"])
def test_auto_takes_the_path_that_was_timed_and_stays_exact(path: str) -> None:
    model, base = built(FLoRA(rank=4))
    assert path_of(model) == "rebuilt"
    write_timed(CPU, {key(model): {ROWS: path}})
    assert path_of(model) == path
    model, base = model.double(), base.double()
    write_timed(CPU, {key(model, dtype=torch.float64): {ROWS: path}})
    x = torch.randn(ROWS, 64, dtype=torch.float64, requires_grad=True)
    y, expected = model(x), with_deltas(base, model, x)
    assert_close(y, expected, 1e-12)
    assert_gradients_close(y, expected, [x, *factors(model)])


def test_only_about_as_many_rows_count() -> None:
    model, _ = built(FLoRA(rank=4))
    write_timed(CPU, {key(model): {ROWS: "side", 100 * ROWS: "merged"}})
    assert [path_of(model, n) for n in (ROWS // 2, 2 * ROWS)] == ["side", "side"]
    assert [path_of(model, n) for n in (ROWS // 3, 3 * ROWS)] == ["rebuilt", "rebuilt"]
    assert path_of(model, 90 * ROWS) == "merged"


def test_another_weight_rank_type_or_device_is_not_this_one() -> None:
    model, _ = built(FLoRA(rank=4))
    other, _ = built(FLoRA(rank=4), nn.Linear(64, 47))
    timed = {ROWS: "side"}
    write_timed(
        CPU, dict.fromkeys((key(model, 5), key(model, 4, torch.bfloat16), key(other)), timed)
    )
    write_timed(torch.device("meta"), {key(model): timed})
    assert path_of(model) == "rebuilt"


def test_what_was_asked_for_or_exactness_needs_goes_before_what_was_timed() -> None:
    asked, _ = built(FLoRA(rank=4, path="side"))
    dropped, _ = built(FLoRA(rank=4, dropout=0.1))
    half, _ = built(FLoRA(rank=4), nn.Linear(64, 48).bfloat16())
    for model in (asked, dropped, half):
        timed = {ROWS: "merged"}
        write_timed(CPU, {key(model, dtype=d): timed for d in (torch.float32, torch.bfloat16)})
    assert [path_of(model) for model in (asked, dropped)] == ["side", "side"]
    (row,) = summary(half, torch.randn(ROWS, 64).bfloat16()).rows
    assert row.path == "side"


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        '{"x": 3}',
        '{"x": {"y": {"many": "side"}}}',
        '{"x": {"y": {"9": "fast"}}}',
        '{"x": {"y": {"9": ["side"]}}}',
        '{"x": {"y": {"0": "side"}}}',
        '{"x": {"y": {"%s": "side"}}}' % ("9" * 400),
        "[" * 100_000,
    ],
    ids=range(9),
)
def test_a_damaged_file_is_said_and_passed_over(paths: Path, text: str) -> None:
    model, _ = built(FLoRA(rank=4))
    paths.parent.mkdir()
    paths.write_text(text)
    forget()
    with pytest.warns(
        UserWarning, match=r"paths.json is not used \(.* `litflora calibrate` writes it"
    ):
        assert path_of(model) == "rebuilt"
    with pytest.warns(UserWarning, match="is not used"):
        write_timed(CPU, {key(model): {ROWS: "side"}})
    assert path_of(model) == "side"
    assert (paths.parent / "paths.json.damaged").read_text() == text  # nothing is thrown away


def test_calibrate_writes_the_fastest_path_of_every_kind_of_layer(
    paths: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seconds = {"side": 2.0, "rebuilt": 2.0, "merged": 1.0}
    monkeypatch.setattr(
        "litflora.adapters.calibration._seconds", lambda probe: seconds[probe.leaves[0].path]
    )
    net = nn.Sequential(nn.Linear(8, 64), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
    net.append(nn.Conv1d(1, 4, 3)).insert(4, nn.Unflatten(1, (1, 64)))
    inject(net, LoRA(rank=4, targets="all"))
    write_timed(CPU, {"linear 1x1 rank 1 float32": {5: "side"}})
    before = deepcopy(net.state_dict())
    timings = calibrate(net, torch.randn(ROWS, 8))
    assert [(t.key, t.rows, t.layers) for t in timings] == [
        ("linear 64x8 rank 4 float32", ROWS, ["0"]),
        ("linear 64x64 rank 4 float32", ROWS, ["1", "3"]),
        ("conv 4x1x3 rank 3 float32", ROWS * 64, ["5"]),
    ]
    written = json.loads(paths.read_text())[f"{device_name(CPU)}, torch {torch.__version__}"]
    assert written.pop("linear 1x1 rank 1 float32") == {"5": "side"}
    assert written == {t.key: {str(t.rows): "merged"} for t in timings}
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert all(p.grad is None for p in net.parameters())
    report = summary(net, torch.randn(ROWS, 8))
    assert {row.path for row in report.rows} == {"merged"}


def test_a_path_must_be_faster_in_most_turns_than_the_rules(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    turns = {"rebuilt": [1.0, 1.2], "merged": [9.0]}
    counts = dict.fromkeys(("side", "rebuilt", "merged"), 0)

    def seconds(probe: Any) -> float:
        path = probe.leaves[0].path
        counts[path] += 1
        return turns[path][counts[path] % len(turns[path])]

    monkeypatch.setattr("litflora.adapters.calibration._seconds", seconds)
    model, _ = built(FLoRA(rank=4))
    x = torch.randn(ROWS, 64)
    turns["side"] = [0.8, 1.1]  # the faster median, within the noise
    timings = calibrate(model, x)
    assert [t.path for t in timings] == ["rebuilt"]
    assert "is the machine idle" not in str(timings)
    turns["side"] = [0.8, 0.9]
    timings = calibrate(model, x)
    assert [t.path for t in timings] == ["side"]
    assert re.search(r"1[0-9]{3}\.0 ms by the rule, [89]00\.0 ms here", str(timings))
    turns["side"] = [0.4, 0.9]
    assert "! some turns took" in str(calibrate(model, x))


def test_every_path_that_a_layer_has_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[str] = []

    def counted(choice: Any) -> str:
        taken.append(choose(choice))
        return taken[-1]

    monkeypatch.setattr("litflora.adapters.layers.choose", counted)
    for layer, paths in ((nn.Conv2d(16, 16, 5, groups=16), 2), (nn.Conv2d(16, 16, 5), 3)):
        model, _ = built(FLoRA(rank=4), layer)
        taken.clear()
        (timing,) = calibrate(model.train(), torch.randn(2, 16, 20, 20))
        assert set(taken[1:]) == set(timing.seconds)
        assert len(timing.seconds) == paths
        assert all(seconds > 0 for seconds in timing.seconds.values())
        assert model.layer.adapters["default"]["weight"].path == "auto"


def test_nothing_to_choose_is_said() -> None:
    model, _ = built(FLoRA(rank=4, dropout=0.1))
    with pytest.raises(AdapterError, match="nothing to time"):
        calibrate(model, torch.randn(ROWS, 64))


def test_a_file_that_cannot_be_written_is_said_before_anything_is_timed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "note").write_text("a file")
    model, _ = built(FLoRA(rank=4))
    for bad in (tmp_path, tmp_path / "note" / "paths.json"):
        monkeypatch.setenv("LITFLORA_PATHS", str(bad))
        with pytest.raises(AdapterError, match=r"cannot be written .* let LITFLORA_PATHS name"):
            calibrate(model, torch.randn(ROWS, 64))
    monkeypatch.setenv("LITFLORA_PATHS", str(tmp_path / "new" / "deep" / "paths.json"))
    check_writable()


def test_a_compiled_layer_follows_it_in_one_graph() -> None:
    model, base = built(FLoRA(rank=4))
    write_timed(CPU, {key(model): {ROWS: "merged"}})
    assert path_of(model) == "merged"
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    x = torch.randn(ROWS, 64)
    assert_close(compiled(x), with_deltas(base, model, x), 1e-5)
    compiled(x).sum().backward()
    assert counter.frame_count == 1


def test_the_name_of_the_processor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    info = tmp_path / "cpuinfo"
    info.write_text("processor\t: 0\nmodel\t\t: 17\nmodel name\t: A Fast One\ncache\t: 1\n")
    assert processor(info) == "A Fast One"
    monkeypatch.setattr("platform.processor", lambda: "arm")
    assert processor(tmp_path / "none") == "arm"


def test_a_folder_that_cannot_be_found_or_entered_stops_no_forward(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, _ = built(FLoRA(rank=4))
    monkeypatch.setenv("LITFLORA_PATHS", "x" * 5000)
    forget()
    with pytest.warns(UserWarning, match="is not used"):
        model(torch.randn(ROWS, 64))
    monkeypatch.delenv("LITFLORA_PATHS")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    forget()
    with pytest.warns(UserWarning, match="timed paths is not used .no home"):
        model(torch.randn(ROWS, 64))
    with pytest.raises(AdapterError, match="no home"):
        check_writable()


def test_what_cannot_be_timed_is_left_out() -> None:
    net = nn.ModuleList([nn.Linear(64, 64), nn.Linear(64, 32), nn.Linear(64, 16)])
    inject(net, LoRA(rank=2, targets="all"))
    for parameter in net[1].parameters():
        parameter.requires_grad_(False)

    class Model(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            """The second layer is not trained; the third is given nothing."""
            return self.net[0](input=x).sum() + self.net[1](x).sum() + self.net[2](x[:0]).sum()

    model = Model()
    model.net = net
    for context in (torch.no_grad(), torch.enable_grad()):
        with context:
            assert [t.layers for t in calibrate(model, torch.randn(ROWS, 64))] == [["net.0"]]
    merge(net)
    with pytest.raises(AdapterError, match="nothing to time"):
        calibrate(model, torch.randn(ROWS, 64))


def test_the_model_is_left_as_it_was() -> None:
    net = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Dropout(0.5), nn.Linear(16, 4))
    inject(net, LoRA(rank=2, targets="linear"), train=["1"])
    before = deepcopy(net.state_dict())
    torch.manual_seed(3)
    drawn = torch.rand(())
    torch.manual_seed(3)
    first, second = calibrate(net.train(), torch.randn(32, 8, generator=torch.Generator()))
    assert torch.equal(torch.rand(()), drawn)
    assert (first.layers, second.layers) == (["0"], ["3"])
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert all(p.grad is None for p in net.parameters())


def test_a_first_layer_is_timed_without_a_gradient_of_its_input(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    wanted = {}

    def seconds(probe: Any) -> float:
        wanted[probe.timing.layers[0]] = probe.x.requires_grad
        return 1.0

    monkeypatch.setattr("litflora.adapters.calibration._seconds", seconds)
    net = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 4))
    inject(net, LoRA(rank=2, targets="linear"))
    calibrate(net, torch.randn(ROWS, 8))
    assert wanted == {"0": False, "1": True}


def test_convolutions_of_another_stride_or_direction_are_timed_apart() -> None:
    net = nn.Sequential(
        nn.Conv2d(8, 8, 2, stride=2), nn.Conv2d(8, 8, 2), nn.ConvTranspose2d(8, 8, 2)
    )
    inject(net, LoRA(rank=2, targets="all"))
    keys = [t.key for t in calibrate(net, torch.randn(2, 8, 16, 16))]
    assert keys == [
        "conv 8x8x2x2 stride 2x2 rank 2 float32",
        "conv 8x8x2x2 rank 2 float32",
        "conv 8x8x2x2 transposed rank 2 float32",
    ]


def test_under_autocast_summary_shows_what_is_computed() -> None:
    model, _ = built(FLoRA(rank=4))
    write_timed(CPU, {key(model, dtype=torch.bfloat16): {ROWS: "merged"}})
    assert path_of(model) == "rebuilt"
    with torch.autocast("cpu", torch.bfloat16):
        report = summary(model, torch.randn(ROWS, 64))
    assert [row.path for row in report.rows] == ["merged"]
    assert "1 paths as `litflora calibrate` timed them" in str(report)
    assert "litflora calibrate" not in str(summary(model, torch.randn(ROWS, 64)))


def test_a_cold_table_does_not_keep_a_layer_from_compiling() -> None:
    model, base = built(FLoRA(rank=4))
    calibrate(model, torch.randn(ROWS, 64))
    forget()
    torch._dynamo.reset()
    x = torch.randn(ROWS, 64)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert_close(compiled(x), with_deltas(base, model, x), 1e-5)


def test_a_layer_under_autocast_follows_what_was_timed_for_its_type(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, _ = built(FLoRA(rank=4))
    write_timed(CPU, {key(model, dtype=torch.bfloat16): {ROWS: "merged"}})
    taken: list[str] = []

    def counted(choice: Any) -> str:
        taken.append(choose(choice))
        return taken[-1]

    monkeypatch.setattr("litflora.adapters.layers.choose", counted)
    for enabled in (True, False):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            model(torch.randn(ROWS, 64))
    assert taken == ["merged", "rebuilt"]


def test_an_adapter_that_weighs_nothing_is_no_obstacle() -> None:
    model, _ = built(LoRA(rank=2))
    inject(model, LoRA(rank=3, targets="layer"), name="second")
    activate(model, {"default": 1.0, "second": 0.0})
    (timing,) = calibrate(model, torch.randn(ROWS, 64))
    assert timing.key == key(model, 2)
