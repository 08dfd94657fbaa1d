"""What a rank holds and sends: the formulas are what two processes count."""

import os
import socket

import pytest
import scaling
import torch
from collectives import RANKS, Payloads, measure, received
from models import Vision
from sharding import GLOO, Sizes, held, payloads, sent
from torch import nn

TINY = Vision(batch=2, size=160, name="test_vit")


@pytest.fixture(scope="module")
def measured():
    """Two processes, for all tests."""
    return measure(TINY, scaling.COUNTED)


def test_what_is_held_and_handed_over_is_that_of_the_formulas(measured):
    assert len(measured) == 8
    for (tuning, strategy), (sizes, counted) in measured.items():
        formulas = {**held(sizes, strategy, RANKS), **payloads(sizes, strategy)}
        assert formulas == {k: v for k, v in counted.items() if k != "wire"}, (tuning, strategy)


def test_the_kernel_counts_a_little_more_than_the_formulas(measured):
    """Headers and barriers: 15 kB, of a network whose adapters are no larger, are not all."""
    for (tuning, strategy), (sizes, counted) in measured.items():
        formula = sent(payloads(sizes, strategy), RANKS, GLOO)
        assert formula < counted["wire"] < 1.04 * formula, (tuning, strategy)


def test_adapters_send_little_of_a_base_that_all_ranks_have(measured):
    """And under FSDP2 more than half of what full tuning sends in a ring."""
    for tuning in ("LoRA", "FLoRA"):
        small, whole = (measured[t, "DDP"].counted["wire"] for t in (tuning, "full"))
        assert small < 0.3 * whole
        shares = [sent(payloads(measured[t, "FSDP2"].sizes, "FSDP2"), 2) for t in (tuning, "full")]
        assert shares[0] > 0.5 * shares[1]


def test_a_base_in_bf16_is_half_as_much_to_hold_and_to_gather(measured):
    """But for norms and embeddings, which stay as they are; and trained weights, too."""
    for strategy, kind in (("DDP", "weights"), ("FSDP2", "weights"), ("FSDP2", "all-gather")):
        whole, half = (measured[t, strategy] for t in ("FLoRA", "FLoRA, bf16 base"))
        saved = whole.counted[kind] - half.counted[kind]
        assert 0.4 * whole.counted[kind] < saved < 0.5 * whole.counted[kind]
        assert half.counted["gradients"] == whole.counted["gradients"]


def test_formulas_of_a_network_whose_sizes_are_known():
    """Blocks of 3 x 2 and root of 1 x 2: the rows of neither are even."""
    net = nn.Module()
    net.blocks = nn.ModuleList(nn.Linear(2, 3, bias=False) for _ in range(2))
    net.head = nn.Linear(2, 1, bias=False)
    net.blocks.requires_grad_(False)
    net.group_matcher = lambda coarse: {"blocks": r"^blocks\.(\d+)"}
    assert Sizes.of(net) == Sizes(frozen=2 * 24, trained=8, root=8)
    sizes = Sizes.of(net, 2)
    assert sizes == Sizes(frozen=2 * 32, trained=16, root=16)
    assert held(sizes, "FSDP2", 2) == {"weights": 40, "gradients": 8, "optimizer": 16}
    gathered = {"all-gather": 2 * 80 - 16, "reduce-scatter": 16}
    assert payloads(sizes, "FSDP2") == gathered
    assert sent(gathered, 4) == 3 / 4 * (144 + 16)
    assert sent({"all-reduce": 8}, 4) == 3 / 4 * 2 * 8


@pytest.mark.parametrize("name", ["convnext_tiny", "vit_small_patch16_224"])
def test_blocks_are_most_of_a_network(name):
    with torch.device("meta"):
        net = scaling.KNOWN[name].build()
    assert 0 < Sizes.of(net).root < 0.15 * Sizes.of(net).trained


def test_a_collective_that_is_not_known_is_not_passed_over():
    class Op:
        namespace, _opname = "c10d", "alltoall_"

    with pytest.raises(KeyError, match="alltoall_"):
        Payloads().__torch_dispatch__(Op, ())


def test_sockets_are_counted():
    with socket.create_server(("127.0.0.1", 0)) as server:
        ends = socket.create_connection(server.getsockname()), server.accept()[0]
        before, files = received(), len(os.listdir("/proc/self/fd"))
        ends[0].sendall(bytes(1000))
        ends[1].recv(1000, socket.MSG_WAITALL)
        assert received() - before == 1000
        assert len(os.listdir("/proc/self/fd")) == files
        for end in ends:
            end.close()


def test_the_tables(monkeypatch):
    monkeypatch.setattr(scaling, "PAPER", {"ViT-S": scaling.PAPER["ViT-S"]})
    rows = [line.split(" | ") for line in scaling.paper().splitlines() if "ViT-S" in line]
    assert [row[1] for row in rows] == ["full", "LoRA", "FLoRA"]
    assert rows[0][2:6] == ["0.00", "86.8", "347", "86.8"]  # 21.7 M in float32
    assert scaling.megabytes(1.2345e7) == "12.3"
    assert scaling.megabytes(1.2345e9) == "1,234"
