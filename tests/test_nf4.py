"""A language model in 4 bits: exact on what they stand for, and files that know the base."""

import copy
import json
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from shell import litflora
from test_vision_language import SMALL, fit, module, questions
from torch import nn

from litflora import FLoRA, Full, LoRA, from_adapter
from litflora.adapters import (
    AdapterError,
    DoRA,
    LoftQ,
    LoHa,
    LoKr,
    MoRA,
    Parts,
    inject,
    load,
    merge,
    save,
)
from litflora.adapters.paths import choose
from litflora.callbacks import AdapterFolder
from litflora.language.tiny import byte_tokenizer, tiny_language_model
from litflora.nf4 import BLOCK, NF4Weight, dequantize, quantize
from litflora.strategies import FSDP2

pytest.importorskip("bitsandbytes", reason="4-bit weights are packed by bitsandbytes")

# The 16 values of the data type, of the article's appendix E.
VALUES = torch.tensor(
    [
        [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453],
        [-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0],
        [0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224],
        [0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0],
    ]
).flatten()


def nearest(weight):
    """The article's rule, written out: each block over its largest, to the nearest value."""
    blocks = weight.float().reshape(-1, BLOCK)
    scales = blocks.abs().amax(1, keepdim=True)
    found = (blocks / scales)[..., None].sub(VALUES).abs().argmin(-1)
    return (VALUES[found] * scales).view_as(weight)


def layers():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 48), nn.GELU(), nn.Linear(48, 64, bias=False))
    return net.requires_grad_(False)


def test_values_are_those_of_the_article():
    net = layers()
    weight = net[0].weight.clone()
    quantize(net)
    held = net[0].weight
    assert isinstance(held, NF4Weight)
    assert (held.shape, held.dtype, held.device) == (weight.shape, weight.dtype, weight.device)
    assert held.packed.numel() == weight.numel() // 2
    expected = nearest(weight)
    torch.testing.assert_close(held.values(torch.float32), expected, rtol=1e-6, atol=1e-7)
    assert held.lost == pytest.approx(float((expected - weight).norm() / weight.norm()), rel=1e-4)
    assert 0.05 < held.lost < 0.15
    lost = dequantize(net)
    assert type(net[0].weight) is nn.Parameter
    assert torch.equal(net[0].weight, held.values(torch.float32))
    assert lost == {"0.weight": held.lost, "2.weight": pytest.approx(0.09, abs=0.03)}


@pytest.mark.parametrize(
    "tuning",
    [
        LoRA(rank=4),
        FLoRA(rank=4),
        LoRA(rank=4, dropout=0.3),
        DoRA(rank=4),
        MoRA(rank=4),
        LoHa(rank=4),
        LoKr(rank=4),
        None,
    ],
)
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_value_and_gradients_are_those_of_the_dequantised_weight(tuning, precision):
    """The engine's claim: a layer computes W + dW, for W what the bits stand for."""
    net = layers()
    if tuning is not None:
        inject(net, tuning)
        with torch.no_grad():
            for parameter in net.parameters():
                if parameter.requires_grad:
                    parameter.normal_(0, 0.2)
    quantize(net)
    plain = copy.deepcopy(net)
    assert isinstance(plain[0].weight, NF4Weight)
    dequantize(plain)
    if tuning is not None and tuning.dropout == 0:
        dense = [each.weight + each.adapters["default"]["weight"].dense() for each in plain[::2]]
    else:
        dense = None
    x = torch.randn(3, 5, 64)
    found = []
    for each in (net, plain):
        each.train()
        torch.manual_seed(1)
        inputs = x.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
            y = each(inputs)
        y.float().square().sum().backward()
        grads = [p.grad for p in each.parameters() if p.requires_grad]
        found.append([y, inputs.grad, *grads])
    close = {"rtol": 1e-4, "atol": 1e-4} if precision == "float32" else {"rtol": 0.1, "atol": 0.1}
    assert all(grad is not None and grad.abs().sum() > 0 for grad in found[0][1:])
    for got, expected in zip(*found, strict=True):
        scale = expected.detach().abs().max()
        torch.testing.assert_close(got / scale, expected / scale, **close)
    if dense is not None and precision == "float32":
        by_hand = F.linear(F.gelu(F.linear(x, dense[0], net[0].bias)), dense[1])
        torch.testing.assert_close(found[0][0], by_hand, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("tuning", [LoRA(rank=4), DoRA(rank=4), None])
def test_backward_keeps_no_dequantised_weight(tuning):
    net = layers()
    if tuning is not None:
        inject(net, tuning)
    quantize(net)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        net(torch.randn(2, 64, requires_grad=True))
    shapes = [net[0].weight.shape, net[2].weight.shape]
    weights = [t for t in kept if t.shape in shapes or t.shape[::-1] in shapes]
    assert all(isinstance(t, NF4Weight) for t in weights)
    assert len({t.packed.data_ptr() for t in weights}) == 2


def test_moves_and_casts_keep_four_bits():
    net = layers()
    quantize(net)
    values = net[0].weight.values(torch.float32)
    net.to("cpu")
    assert isinstance(net[0].weight, NF4Weight)
    again = copy.deepcopy(net)[0].weight
    assert torch.equal(again.values(torch.float32), values)
    assert again.original_fingerprint == net[0].weight.original_fingerprint
    assert net.to("meta")[0].weight.packed.is_meta
    half = again.to(torch.bfloat16)
    assert isinstance(half, NF4Weight)
    assert torch.equal(half + 0, values.bfloat16())
    quantize(double := layers())
    assert double.double()[0].weight.dtype == torch.float64
    x = torch.randn(2, 64, dtype=torch.float64)
    expected = F.linear(x, values.double(), double[0].bias)
    torch.testing.assert_close(double[0](x), expected)


@pytest.mark.parametrize("training", [True, False])
def test_deltas_act_beside_the_four_bits(training):
    net = layers()
    inject(net, LoRA(rank=4))
    quantize(net)
    layer = net.train(training)[0]
    choice = layer.choice(layer.known_sum(), torch.randn(999, 64), grad=training)
    assert choose(choice) == "side"


def test_a_weight_in_four_bits_is_not_written_to_or_merged_into():
    net = layers()
    inject(net, LoRA(rank=2))
    quantize(net)
    before = net[0].weight.packed.clone()
    with pytest.raises(RuntimeError, match="frozen, and cannot be written to"):
        net[0].weight.zero_()
    with pytest.raises(AdapterError, match=r"0\.weight is quantised: litflora\.nf4\.dequantize"):
        merge(net)
    assert torch.equal(net[0].weight.packed, before)


def test_an_adapter_knows_the_base_before_quantisation(tmp_path):
    net = layers()
    inject(net, LoRA(rank=2, targets="0"))
    save(net, tmp_path / "plain")
    quantize(net)
    save(net, tmp_path / "nf4")
    digests = [
        json.loads((tmp_path / n / "adapter_config.json").read_text())["base"]
        for n in ("plain", "nf4")
    ]
    assert digests[0] == digests[1]
    load(layers(), tmp_path / "nf4")
    quantize(held := layers())
    load(held, tmp_path / "nf4")
    other = layers()
    with torch.no_grad():
        other[0].weight.mul_(-1)
    quantize(other)
    with pytest.raises(AdapterError, match=r"values of 0\.weight differ"):
        load(other, tmp_path / "nf4")


# LoftQ --------------------------------------------------------------------------------------------


def begun(**options):
    """Layers as they were; in 4 bits with deltas that make up for it; and those deltas."""
    net = layers()
    inject(net, LoftQ(rank=8, targets=["0", "2"], **options))
    quantize(net)
    found = [net[i].adapters["default"]["weight"] for i in (0, 2)]
    return layers(), net, found


@pytest.mark.parametrize("alpha", [8.0, 20.0])
def test_loftq_begins_with_what_the_bits_take(alpha):
    low_rank = pytest.importorskip("peft.utils.loftq_utils")._low_rank_decomposition
    plain, net, deltas = begun(alpha=alpha)
    for layer, original, delta in zip(net[::2], plain[::2], deltas, strict=True):
        quantised = layer.weight.values(torch.float32)
        lost = original.weight - quantised
        theirs = low_rank(lost, 8)  # PEFT's numbers, of which it forgets the scale
        torch.testing.assert_close(delta.dense(), theirs["L"] @ theirs["R"], rtol=0, atol=1e-6)
        left = (original.weight - quantised - delta.dense()).norm()
        assert left < 0.8 * lost.norm()
        assert torch.allclose(
            delta.lora_B.T @ delta.lora_B, delta.lora_A @ delta.lora_A.T, atol=1e-6
        )
    x = torch.randn(9, 64)
    quantize(bits := layers())
    assert (net(x) - plain(x)).norm() < 0.8 * (bits(x) - plain(x)).norm()


def test_loftq_of_parts_makes_up_for_their_own_rows():
    _, _, (whole, _) = begun()
    net = layers()
    inject(net, LoftQ(rank=8, targets="0", parts={"0": Parts([16, 32], [1])}))
    original = net[0].weight.clone()
    quantize(net)
    dense = net[0].adapters["default"]["weight"].dense()
    lost = original - net[0].weight.values(torch.float32)
    assert (dense[:16] == 0).all()
    assert 0 < (lost - dense)[16:].norm() < 0.8 * lost[16:].norm()
    assert not torch.equal(dense[16:], whole.dense()[16:])


def test_loftq_is_loaded_as_it_was_trained(tmp_path):
    _, net, deltas = begun()
    with torch.no_grad():
        deltas[0].lora_B.normal_(0, 0.1)
    save(net, tmp_path)
    x = torch.randn(3, 64)
    load(early := layers(), tmp_path)
    quantize(early)
    quantize(late := layers())
    load(late, tmp_path)
    for each in (early, late):
        assert torch.equal(each(x), net(x))
    told = json.loads((tmp_path / "adapter_config.json").read_text())
    assert told["method"] == ["LoftQ"]
    dequantize(early)
    merge(early)
    torch.testing.assert_close(early(x), net(x))


def test_loftq_comes_before_the_bits():
    quantize(net := layers())
    with pytest.raises(AdapterError, match=r"0\.weight is quantised already, and LoftQ begins"):
        inject(net, LoftQ(rank=2, targets="0"))
    with pytest.raises(AdapterError, match=r"0\.weight is no linear layer's weight"):
        inject(nn.Sequential(nn.Conv2d(3, 4, 1)), LoftQ(rank=2, targets="0"))
    with pytest.raises(AdapterError, match="LoftQ divides by the scale: alpha must not be 0"):
        LoftQ(alpha=0)


# The whole of it ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def language_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("language")
    torch.manual_seed(1)
    tiny_language_model(SMALL).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def held(language_folder, **options):
    told = {"language_model": str(language_folder), "language_options": None, "lr": 1e-2}
    tunings = {"tuning": FLoRA(rank=2), "language_tuning": None}
    return module(**{**told, **tunings, "base_dtype": "nf4", **options})


@pytest.fixture(scope="module")
def run(tmp_path_factory, language_folder):
    folder = tmp_path_factory.mktemp("run")
    made = held(language_folder)
    trainer = fit(made, folder, callbacks=[AdapterFolder()])
    trainer.save_checkpoint(folder / "last.ckpt")
    return folder, made


@pytest.fixture(scope="module")
def batch(run):
    data = questions()
    data.encoder = run[1].encoder
    data.setup("test")
    (batch,) = data.test_dataloader()
    return batch


def test_linear_layers_of_the_language_model_alone_are_quantised(run):
    _, made = run
    four = {n for n, p in made.net.named_parameters() if isinstance(p, NF4Weight)}
    linear = {n for n, m in made.net.language_model.named_modules() if isinstance(m, nn.Linear)}
    assert four == {f"language_model.{n}.weight" for n in linear - {"lm_head"}}
    assert four


def test_files_hold_nothing_of_the_base(run):
    folder, _ = run
    kept = load_file(folder / "adapter" / "adapter_model.safetensors")
    state = torch.load(folder / "last.ckpt", weights_only=True)["state_dict"]
    for keys in (kept, {key.removeprefix("net.") for key in state}):
        assert keys
        assert all(".adapters." in key or key.startswith("connector.") for key in keys)


@pytest.mark.slow
def test_a_folder_answers_the_same_in_a_new_process(run, batch, tmp_path):
    folder, made = run
    made.eval()
    told = made(batch).logits.detach(), made.answer(batch["prompt"])
    torch.save((batch, told), tmp_path / "told.pt")
    code = (
        "import sys, torch; from litflora import from_adapter\n"
        "torch.set_num_threads(1)\n"  # as here: more of them add up in another order
        "batch, (logits, answers) = torch.load(sys.argv[2], weights_only=False)\n"
        "made = from_adapter(sys.argv[1]); made.configure_model(); made.eval()\n"
        "assert torch.equal(made(batch).logits, logits)\n"
        "assert made.answer(batch['prompt']) == answers\n"
        "print('equal')"
    )
    arguments = [sys.executable, "-c", code, str(folder / "adapter"), str(tmp_path / "told.pt")]
    done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert done.stdout.strip().endswith("equal"), done.stderr
    float32 = from_adapter(folder / "adapter", base_dtype=None)
    float32.configure_model()
    assert not torch.allclose(float32.eval()(batch).logits, told[0], atol=1e-4)


def test_a_merge_writes_plain_weights_and_says_what_was_lost(run, batch, tmp_path):
    folder, made = run
    out = tmp_path / "merged"
    done = litflora("merge", folder / "adapter", "--out", out)
    assert done.code == 0, done.err
    assert "14 weights were trained on in NF4" in done.out
    assert "at most (language_model." in done.out
    again = module(weights=str(out), language_model="tiny", language_options=None)
    again.configure_model()
    torch.testing.assert_close(again.eval()(batch).logits, made.eval()(batch).logits)


def test_checkpointed_activations_change_no_gradient(batch, language_folder):
    found = []
    for how in ("none", "blocks"):
        torch.manual_seed(0)
        made = held(language_folder, activation_checkpointing=how)
        made.configure_model()
        made.train()(batch).loss.backward()
        found.append([p.grad for p in made.parameters() if p.requires_grad])
    assert sum(grad.abs().sum() > 0 for grad in found[0]) > 20
    assert all(map(torch.equal, *found))


def test_a_checkpoint_is_read_into_four_bits(run, language_folder, batch):
    folder, made = run
    again = held(language_folder)
    again.configure_model()
    before = again.eval()(batch).logits
    again.load_state_dict(torch.load(folder / "last.ckpt", weights_only=True)["state_dict"])
    assert torch.equal(again(batch).logits, made.eval()(batch).logits)
    assert not torch.equal(again(batch).logits, before)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"language_tuning": Full()}, "the language model has none: tune it by LoRA or FLoRA"),
        ({"tuning": LoftQ(rank=2)}, r"tower\..* is not held in them: set base_dtype to nf4"),
        ({"weights": None}, "needs a base that can be read again: give weights"),
    ],
)
def test_what_cannot_be_held_is_refused(options, told, language_folder):
    with pytest.raises(ValueError, match=told):
        held(language_folder, **options).configure_model()


def test_loftq_is_trained_saved_and_read_again(language_folder, batch, tmp_path):
    made = held(language_folder, language_tuning=LoftQ(rank=2))
    fit(made, tmp_path, callbacks=[AdapterFolder()])
    again = from_adapter(tmp_path / "adapter")
    again.configure_model()
    assert torch.equal(again.eval()(batch).logits, made.eval()(batch).logits)
    with pytest.raises(AdapterError, match="is not held in them: set base_dtype to nf4"):
        from_adapter(tmp_path / "adapter", base_dtype=None).configure_model()


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"strategy": FSDP2()}, "cannot be sharded: set trainer.strategy to ddp"),
    ],
)
def test_what_it_cannot_run_with_is_refused(options, told, language_folder, tmp_path):
    with pytest.raises(ValueError, match=told):
        fit(held(language_folder), tmp_path, **options)


def test_without_bitsandbytes_the_line_to_type_is_told(language_folder, monkeypatch):
    monkeypatch.setattr("litflora.nf4.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install 'litflora\[nf4\]'"):
        held(language_folder)
