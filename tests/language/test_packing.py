"""Packed rows: the loss and the gradients are those of the conversations one by one."""

from collections.abc import Callable
from functools import partial

import pytest
import timm
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from litflora import VisionLanguageModule
from litflora.adapters import Full
from litflora.datamodules.conversations import ASSISTANT, USER, Conversation, Turn
from litflora.language.composed import VisionLanguageNet
from litflora.language.connectors import Connector
from litflora.language.encoding import Encoder
from litflora.language.output import token_loss
from litflora.language.packing import places, rows_of
from litflora.language.tiny import byte_tokenizer, tiny_language_model

SIDE = 32


def conversations() -> list[Conversation]:
    """Of several lengths: with an image, with two, with none, and with more than one answer."""
    images = torch.randint(0, 255, (4, 3, SIDE, SIDE), dtype=torch.uint8).unbind()
    said = [
        (("<image>\nWhat is it?", "A cat."), images[:1]),
        (("Say no more.", "No."), ()),
        (("<image> or <image>?", "The first of the two.", "Why?", "It is larger."), images[1:3]),
        (("<image>", "A dog that sleeps under a chair."), images[3:]),
        (("Hm?", "Yes."), ()),
    ]
    return [
        Conversation(
            str(number),
            tuple(Turn((USER, ASSISTANT)[i % 2], text) for i, text in enumerate(texts)),
            tuple(shown),
        )
        for number, (texts, shown) in enumerate(said)
    ]


def llama(attention: str = "sdpa") -> nn.Module:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    return tiny_language_model({**sizes, "attn_implementation": attention})


def gpt2() -> nn.Module:
    """Its positions are absolute, where those of a Llama are relative."""
    tokens = len(byte_tokenizer())
    ends = {"bos_token_id": 1, "eos_token_id": 2}
    return GPT2LMHeadModel(GPT2Config(vocab_size=tokens, n_embd=32, n_layer=2, n_head=2, **ends))


def network(language_model: Callable[[], nn.Module] = llama) -> VisionLanguageNet:
    torch.manual_seed(0)
    tower = timm.create_model("test_vit", num_classes=0, img_size=SIDE)
    told = language_model()
    connector = Connector("linear", tower.feature_info[-1]["num_chs"], 32)
    token = byte_tokenizer().convert_tokens_to_ids("<image>")
    return VisionLanguageNet(tower, connector, told, token).double().eval()


def encoder(max_length: int = 80) -> Encoder:
    return Encoder(byte_tokenizer(), 4, max_length, (SIDE, SIDE))


def taken(batch):
    return {**batch, "images": batch["images"].double() / 255}


def gradients(net, loss):
    net.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("language_model", [llama, gpt2])
def test_loss_and_gradients_are_those_of_the_samples_one_by_one(language_model) -> None:
    net, given = network(language_model), conversations()
    batch = encoder().packed_batch(given)
    rows, length = batch["input_ids"].shape
    assert rows < len(given)
    assert batch["attention_mask"].shape == (rows, 1, length, length)
    packed = net(**taken(batch)).loss
    together = gradients(net, packed)

    alone, count = 0, 0
    for each in given:
        single = taken(encoder().train_batch([each]))
        labels = single.pop("labels")
        alone = alone + token_loss(net(**single).logits, labels, reduction="none").sum()
        count += int((labels[:, 1:] != -100).sum())
    assert int((batch["labels"] != -100).sum()) == count
    torch.testing.assert_close(packed, alone / count, rtol=1e-12, atol=0)
    apart = gradients(net, alone / count)
    assert together.keys() == apart.keys()
    assert any(name.startswith("tower.") for name in apart)
    for name, expected in apart.items():
        torch.testing.assert_close(together[name], expected, rtol=1e-9, atol=1e-12)


def test_without_mask_and_positions_samples_change_each_other() -> None:
    net, batch = network(), taken(encoder().packed_batch(conversations()))
    right = net(**batch).loss
    del batch["attention_mask"], batch["position_ids"]
    assert (net(**batch).loss - right).abs() > 1e-6


def test_a_module_gives_its_network_all_of_a_packed_batch() -> None:
    own = VisionLanguageModule(
        "test_vit", weights=None, img_size=SIDE, language_tuning=Full(), tuning=Full()
    )
    own.configure_model()
    batch = own.encoder.packed_batch(conversations())
    taken_by_net = own.inputs(batch)
    assert set(taken_by_net) == set(batch) - {"labels"}
    for key in ("attention_mask", "position_ids"):
        assert taken_by_net[key] is batch[key]


def test_positions_and_mask_of_two_rows() -> None:
    positions, mask = places([[2, 3], [4]])
    assert positions.tolist() == [[0, 1, 0, 1, 2], [0, 1, 2, 3, 0]]
    assert mask.shape == (2, 1, 5, 5)
    assert mask[0, 0].int().tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [0, 0, 1, 0, 0],
        [0, 0, 1, 1, 0],
        [0, 0, 1, 1, 1],
    ]
    assert mask[1, 0, 4].tolist() == [False, False, False, False, True]


def test_rows_hold_every_sample_once_and_no_more_than_they_may() -> None:
    lengths = [5, 9, 3, 10, 1, 1, 4, 7]
    rows = rows_of(lengths, 10)
    assert sorted(index for row in rows for index in row) == list(range(8))
    assert all(sum(lengths[index] for index in row) <= 10 for row in rows)
    assert rows == [[3], [1, 4], [7, 2], [0, 6, 5]]


def test_the_first_token_of_a_sample_is_no_label_of_the_one_before() -> None:
    """Not even where a template lets the assistant begin."""
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    told = [Conversation(text, (Turn(USER, ""), Turn(ASSISTANT, text))) for text in ("abc", "de")]
    batch = Encoder(tokenizer, 4, 10, (SIDE, SIDE)).packed_batch(told)
    learnt = [tokenizer.decode([t]) if t >= 0 else "-" for t in batch["labels"][0].tolist()]
    assert "".join(learnt) == "-bc</s>-e</s>"


def test_attention_that_would_add_the_mask_to_scores_is_refused() -> None:
    net = network(partial(llama, "eager"))
    with pytest.raises(ValueError, match="attention 'sdpa', and LlamaForCausalLM has 'eager'"):
        net(**taken(encoder().packed_batch(conversations())))
