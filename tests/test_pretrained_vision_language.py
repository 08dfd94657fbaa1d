"""Checkpoints of transformers: loaded, tuned by parts, saved, merged back into their own layout."""

import json
import re
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from checkpoints import FIRST, KINDS, save_checkpoint
from conversation_files import write_llava
from llava_parameters import on_meta, table, trained
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from shell import litflora
from timm.models import group_parameters
from tiny import trainer
from torch import Tensor, nn
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
)

from litflora import PretrainedVisionLanguageModule, from_adapter
from litflora.adapters import FLoRA, Frozen, Full, LoRA, merge, save
from litflora.adapters.targets import is_inside
from litflora.callbacks import AdapterFolder
from litflora.datamodules import ShapesQuestionsDataModule
from litflora.datamodules.conversations import Conversation, Turn

Part = dict[str, list[str]]
PARTS: dict[str, Part] = {
    "llava": {
        "tower": ["model.model.vision_tower"],
        "connector": ["model.model.multi_modal_projector"],
        "language_model": ["model.model.language_model", "model.lm_head"],
    },
    "qwen2_vl": {
        "tower": ["model.model.visual.blocks", "model.model.visual.patch_embed"],
        "connector": ["model.model.visual.merger"],
        "language_model": ["model.model.language_model", "model.lm_head"],
    },
}
PARTS["internvl"] = PARTS["llava"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("checkpoints")
    return {kind: save_checkpoint(kind, root / kind) for kind in KINDS}


@pytest.mark.parametrize("base_dtype", ["bfloat16", "nf4"])
def test_a_base_held_in_less_is_never_whole_in_float32(
    folders: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    base_dtype: Literal["bfloat16", "nf4"],
) -> None:
    if base_dtype == "nf4":
        pytest.importorskip("bitsandbytes", reason="4-bit weights are packed by bitsandbytes")
    half = AutoModelForImageTextToText.from_pretrained(folders["llava"], dtype=torch.float16)
    half.save_pretrained(tmp_path)
    AutoProcessor.from_pretrained(folders["llava"]).save_pretrained(tmp_path)
    module = PretrainedVisionLanguageModule(str(tmp_path), base_dtype=base_dtype, max_length=300)
    hold, types = module._hold_base, set[torch.dtype]()

    def watched(net: nn.Module) -> None:
        types.update(p.dtype for p in net.parameters() if not p.requires_grad)
        hold(net)

    monkeypatch.setattr(module, "_hold_base", watched)
    torch.manual_seed(0)
    module.configure_model()
    assert types == {torch.float16}

    whole = PretrainedVisionLanguageModule(str(tmp_path), base_dtype=base_dtype, max_length=300)
    monkeypatch.setattr(type(whole), "_read_in", torch.float32)
    torch.manual_seed(0)
    whole.configure_model()
    for (name, own), other in zip(module.named_parameters(), whole.parameters(), strict=True):
        assert own.dtype == other.dtype, name
        assert torch.equal(own + 0, other + 0), name


def picture(seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (3, 50, 70), dtype=torch.uint8, generator=generator)


def conversation(seed: int = 0, name: str = "one") -> Conversation:
    turns = (Turn("user", "<image>\nWhat is it?"), Turn("assistant", "a cat"))
    return Conversation(name, turns, (picture(seed),))


def tuned(folder: Path, **options: Any) -> PretrainedVisionLanguageModule:
    torch.manual_seed(0)
    module = PretrainedVisionLanguageModule(str(folder), max_length=300, **options)
    module.configure_model()
    return module.eval()


def shaken(folder: Path, **options: Any) -> PretrainedVisionLanguageModule:
    """All that trains set to random numbers: deltas that are not zero."""
    module = tuned(folder, **options)
    for parameter in module.parameters():
        if parameter.requires_grad:
            parameter.data = 0.3 * torch.randn_like(parameter)
    return module


def of(module: Any, batch: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        return module(batch).logits


def plain_logits(folder: Path, batch: dict[str, Any], keys: Any) -> Tensor:
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(**{key: value for key, value in batch.items() if key in keys}).logits


def saved(module: PretrainedVisionLanguageModule, folder: Path) -> Path:
    return save(module.net, folder, metadata=module.metadata())


@pytest.mark.parametrize("kind", KINDS)
def test_logits_and_answers_are_those_of_transformers(folders: dict[str, Path], kind: str) -> None:
    module = tuned(folders[kind], max_new_tokens=8)
    asked = conversation().question()
    model = AutoModelForImageTextToText.from_pretrained(folders[kind]).eval()
    processor = AutoProcessor.from_pretrained(folders[kind])
    parts = [{"type": "image", "image": picture(0)}, {"type": "text", "text": "What is it?"}]
    theirs = processor.apply_chat_template(
        [{"role": "user", "content": parts}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    batch = module.encoder.predict_batch([asked])
    assert torch.equal(batch["input_ids"], theirs["input_ids"])
    with torch.no_grad():
        expected = model(**theirs).logits
        tokens = model.generate(**theirs, max_new_tokens=8, do_sample=False)
    assert (of(module, batch) - expected).abs().max() < 1e-5
    own = module.net.generate(**module.inputs(batch), max_new_tokens=8, do_sample=False)
    assert torch.equal(own, tokens[:, theirs["input_ids"].shape[1] :])
    other = module.encoder.predict_batch([conversation(1).question()])
    assert not torch.allclose(of(module, other), expected, atol=1e-3)  # images are looked at


@pytest.mark.parametrize("kind", KINDS)
def test_parts_are_found_and_only_blocks_are_adapted(folders: dict[str, Path], kind: str) -> None:
    module = tuned(folders[kind])
    assert module.net.parts() == PARTS[kind]
    trained = {name for name, p in module.net.named_parameters() if p.requires_grad}
    deltas = {name.partition(".adapters.")[0] for name in trained if ".adapters." in name}
    assert len([name for name in deltas if "language_model.layers" in name]) == 14
    assert all("layer" in name or ".blocks." in name for name in deltas)
    assert any("visual.blocks" in name or "vision_tower" in name for name in deltas)
    whole = {name for name in trained if ".adapters." not in name}
    connector = PARTS[kind]["connector"][0]
    inside = {n for n, _ in module.net.named_parameters() if n.startswith(f"{connector}.")}
    assert whole == inside


@pytest.mark.parametrize("kind", FIRST)
def test_parts_are_the_same_when_blocks_are_checkpointed(
    folders: dict[str, Path], kind: str
) -> None:
    module = tuned(folders[kind], activation_checkpointing="blocks")
    assert module.net.parts() == PARTS[kind]
    assert module.net.group_matcher() == tuned(folders[kind]).net.group_matcher()


@pytest.mark.parametrize("kind", KINDS)
def test_layers_follow_each_other_from_the_stem_to_the_output(
    folders: dict[str, Path], kind: str
) -> None:
    net = tuned(folders[kind]).net
    layers = group_parameters(net, net.group_matcher(coarse=False), reverse=True)
    found: dict[int, set[str]] = {}
    for name, layer in layers.items():
        found.setdefault(layer, set()).add(name)
    ours = PARTS[kind]
    stems = ("patch_embed", "embeddings", "pre_layrnorm")
    assert all(any(stem in name for stem in stems) for name in found[0])
    assert all("connector" in part_of(n, ours) or "norm" in n for n in found[3])
    assert {n.split(".")[-2] for n in found[4]} == {"embed_tokens"}
    numbers = [{n.split("layers.")[1][0] for n in found[layer]} for layer in (5, 6)]
    assert numbers == [{"0"}, {"1"}]
    ends = {n.split(".")[-2] for n in found[7]}
    assert ends == ({"norm"} if kind == "internvl" else {"norm", "lm_head"})  # which is tied there
    assert len(found) == 8
    assert all(part_of(n, ours) == "tower" for layer in range(3) for n in found[layer])


def part_of(name: str, parts: Part) -> str:
    return next(part for part, modules in parts.items() if is_inside(name, modules))


def test_stem_and_output_layer_are_adapted_where_they_are_named(folders: dict[str, Path]) -> None:
    module = tuned(
        folders["qwen2_vl"],
        tower_tuning=FLoRA(targets=["attn.qkv", "patch_embed.proj"]),
        language_tuning=LoRA(targets=["q_proj", "lm_head"], rank_pattern={"lm_head": 2}),
    )
    names = {n.partition(".adapters.")[0] for n, _ in module.net.named_parameters() if "adap" in n}
    ends = {".".join(name.split(".")[-2:]) for name in names}
    assert ends == {"attn.qkv", "patch_embed.proj", "self_attn.q_proj", "model.lm_head"}
    rank = module.net.model.lm_head.adapters["default"]["weight"].rank
    assert rank == 2
    with pytest.raises(ValueError, match="no_such"):
        tuned(folders["qwen2_vl"], language_tuning=LoRA(targets=["q_proj", "no_such"]))


def test_each_part_trains_exactly_when_its_tuning_says_so(folders: dict[str, Path]) -> None:
    for part in ("tower", "connector", "language"):
        tunings = {f"{p}_tuning": Frozen() for p in ("tower", "connector", "language")}
        module = tuned(folders["qwen2_vl"], **{**tunings, f"{part}_tuning": Full()})
        named = PARTS["qwen2_vl"]["language_model" if part == "language" else part]
        for name, parameter in module.net.named_parameters():
            inside = any(name.startswith(f"{module}.") for module in named)
            assert parameter.requires_grad == inside, name


@pytest.mark.parametrize("kind", FIRST)
def test_a_fit_leaves_one_folder_that_loads_back(
    folders: dict[str, Path], kind: str, tmp_path: Path
) -> None:
    module = PretrainedVisionLanguageModule(str(folders[kind]), max_length=300, max_new_tokens=4)
    data = ShapesQuestionsDataModule(
        train_samples=4, val_samples=2, batch_size=2, eval_batch_size=2
    )
    run = trainer(tmp_path, callbacks=[AdapterFolder()])
    run.fit(module, data)
    base = load_file(folders[kind] / "model.safetensors")
    frozen = module.net.model.model.language_model.embed_tokens.weight
    kept = [value for key, value in base.items() if key.endswith("embed_tokens.weight")]
    assert torch.equal(frozen.cpu(), kept[0])
    again = from_adapter(tmp_path / "adapter")
    again.configure_model()
    batch = data.encoder.eval_batch([conversation(), conversation(1)])
    assert torch.equal(of(again.eval(), batch), of(module.eval(), batch))
    assert not torch.equal(of(again, batch), of(tuned(folders[kind]), batch))
    shown = litflora("inspect", tmp_path / "adapter")
    assert shown.code == 0, shown.err
    assert "language_model.layers.1.mlp.down_proj" in shown.out


def test_commands_that_need_no_data_take_a_checkpoint(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LITFLORA_PATHS", str(tmp_path / "paths.json"))
    data = ("--data.root", write_llava(tmp_path), "--data.batch_size", 1)
    for command in ("inspect", "calibrate"):
        recipe = ("vision_language/llava_1_5", "--model.model", folders["llava"], *data)
        plain = ("--trainer.precision", "32-true", "--model.max_length", 300)
        done = litflora(command, *recipe, *plain)
        assert done.code == 0, done.err
        assert "down_proj" in done.out or "linear 64x" in done.out


def test_another_base_is_refused_by_both_names(folders: dict[str, Path], tmp_path: Path) -> None:
    adapter = saved(shaken(folders["llava"]), tmp_path / "adapter")
    for name in ("internvl", "changed"):
        base = folders.get(name) or save_checkpoint("llava", tmp_path / name)
        if name == "changed":
            state = load_file(base / "model.safetensors")
            key = next(iter(sorted(state)))
            save_file({**state, key: state[key] + 1}, base / "model.safetensors")
        module = from_adapter(adapter, weights=str(base))
        told = f"adapter's is {folders['llava']}, this one {base}"
        with pytest.raises(ValueError, match=re.escape(told)):
            module.configure_model()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "saving", [{}, pytest.param({"max_shard_size": "100KB"}, marks=pytest.mark.slow)]
)
def test_merge_writes_the_checkpoints_own_layout(
    kind: str, saving: dict[str, Any], tmp_path: Path
) -> None:
    base = save_checkpoint(kind, tmp_path / "base", **saving)
    module = shaken(base, language_tuning=LoRA(rank=4))
    adapter, out = saved(module, tmp_path / "adapter"), tmp_path / "merged"
    result = litflora("merge", adapter, "--out", out)
    assert result.code == 0, result.err
    assert "from_pretrained" in result.out
    check_layout(base, out)
    batch = module.encoder.train_batch([conversation(), conversation(1)])
    logits = plain_logits(out, batch, module.net.takes)
    assert (logits - of(module, batch)).abs().max() < 1e-5 * logits.abs().max()
    assert not torch.allclose(logits, plain_logits(base, batch, module.net.takes), atol=1e-2)


@pytest.mark.parametrize("kind", FIRST)
def test_what_was_trained_on_four_bits_is_merged_into_a_checkpoint(
    folders: dict[str, Path], kind: str, tmp_path: Path
) -> None:
    pytest.importorskip("bitsandbytes", reason="4-bit weights are packed by bitsandbytes")
    module = shaken(folders[kind], language_tuning=LoRA(rank=4), base_dtype="nf4")
    adapter, out = saved(module, tmp_path / "adapter"), tmp_path / "merged"
    result = litflora("merge", adapter, "--out", out)
    assert result.code == 0, result.err
    assert "were trained on in NF4 and are written so" in result.out
    check_layout(folders[kind], out)
    batch = module.encoder.train_batch([conversation(), conversation(1)])
    logits = plain_logits(out, batch, module.net.takes)
    assert (
        logits - of(module, batch)
    ).abs().max() < 1e-4 * logits.abs().max()  # side path against merged
    module = from_adapter(adapter, base_dtype=None)
    module.configure_model()
    assert not torch.allclose(logits, of(module.eval(), batch), atol=1e-2)


def check_layout(base: Path, out: Path) -> None:
    """The files of a merged checkpoint are those of its base, but for the values of weights."""
    files = sorted(path.name for path in base.iterdir())
    assert sorted(path.name for path in out.iterdir()) == files
    for name in files:
        ours, theirs = (folder / name for folder in (out, base))
        if ours.suffix != ".safetensors":
            assert ours.read_bytes() == theirs.read_bytes(), name
        else:
            assert header(ours) == header(theirs), name


def header(path: Path) -> Any:
    """Keys, types, shapes and places of the tensors in a file, and its metadata."""
    content = path.read_bytes()
    return json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])


def test_merge_keeps_old_names_and_types_and_leaves_other_weights_out(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    base = save_checkpoint("llava", tmp_path / "base", save_original_format=False)
    state = load_file(base / "model.safetensors")
    old = {
        "model.language_model.": "language_model.model.",
        "lm_head.": "language_model.lm_head.",
        "model.vision_tower.": "vision_tower.vision_model.",
        "model.multi_modal_projector.": "multi_modal_projector.",
    }
    renamed = {}
    for key, value in state.items():
        new, prefix = next((new, prefix) for prefix, new in old.items() if key.startswith(prefix))
        renamed[key.replace(prefix, new, 1)] = value.bfloat16()
    save_file(renamed, base / "model.safetensors", metadata={"format": "pt"})
    torch.save(renamed, base / "pytorch_model.bin")
    module = shaken(base)
    adapter, out = saved(module, tmp_path / "adapter"), tmp_path / "merged"
    module = from_adapter(adapter)
    module.configure_model()
    merge(module.net, unload=True)
    with pytest.warns(UserWarning, match=r"rounds: at most .* of a change"):
        module.write_merged(out)
    assert not (out / "pytorch_model.bin").exists()
    (base / "pytorch_model.bin").unlink()
    check_layout(base, out)
    batch = module.encoder.train_batch([conversation()])
    logits = plain_logits(out, batch, module.net.takes)
    assert (logits - of(module, batch)).abs().max() < 0.05 * logits.abs().max()


def test_merge_says_what_it_cannot_write(folders: dict[str, Path], tmp_path: Path) -> None:
    base = save_checkpoint("llava", tmp_path / "base")
    module = tuned(base)
    merge(module.net, unload=True)
    (base / "model.safetensors").rename(tmp_path / "elsewhere.safetensors")
    with pytest.raises(ValueError, match=r"has no model\.safetensors"):
        module.write_merged(tmp_path / "out")
    state = load_file(tmp_path / "elsewhere.safetensors")
    lost = state.popitem()[0]
    save_file(state, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"has {lost}"):
        module.write_merged(tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match=r"the weights of .* lack"):
        tuned(base)


def test_peft_loads_the_lora_of_the_language_model(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    peft = pytest.importorskip("peft")
    frozen = {"tower_tuning": Frozen(), "connector_tuning": Frozen()}
    module = shaken(folders["llava"], language_tuning=LoRA(rank=4, alpha=6.0), **frozen)
    save(module.net.model, tmp_path / "peft", format="peft")
    with safe_open(tmp_path / "peft" / "adapter_model.safetensors", "pt") as file:
        keys = list(file.keys())
    prefix = "base_model.model.model.language_model.layers."
    assert len(keys) == 28
    assert all(key.startswith(prefix) for key in keys)
    plain = AutoModelForImageTextToText.from_pretrained(folders["llava"])
    theirs = peft.PeftModel.from_pretrained(plain, tmp_path / "peft").eval()
    batch = module.encoder.train_batch([conversation()])
    with torch.no_grad():
        logits = theirs(**module.inputs(batch)).logits
    assert (logits - of(module, batch)).abs().max() < 1e-4


def test_gradients_reach_the_tower_under_a_frozen_language_model(
    folders: dict[str, Path],
) -> None:
    for checkpointing in ("none", "blocks"):
        options = {"language_tuning": Frozen(), "connector_tuning": Frozen()}
        module = shaken(folders["llava"], activation_checkpointing=checkpointing, **options)
        module.train()
        module(module.encoder.train_batch([conversation()])).loss.backward()
        grads = [p.grad for p in module.parameters() if p.requires_grad]
        assert grads
        assert all(bool(grad.abs().sum() > 0) for grad in grads), checkpointing


def test_what_gives_no_features_does_not_train(folders: dict[str, Path]) -> None:
    unread = "vision_tower.encoder.layers.1", "vision_tower.post_layernorm"  # llava takes layer -2
    for tuning in (FLoRA(), Full()):
        module = tuned(folders["llava"], tower_tuning=tuning).train()
        names = [name for name, p in module.named_parameters() if p.requires_grad]
        assert any("vision_tower.encoder.layers.0" in name for name in names)
        assert not any(each in name for name in names for each in unread)
        turns = (Turn("user", "Hi"), Turn("assistant", "yo"))
        for words in (conversation(), Conversation("no image", turns)):
            module.zero_grad()
            module(module.encoder.train_batch([words])).loss.backward()
            assert all(p.grad is not None for p in module.parameters() if p.requires_grad)


def test_llava_7b_on_the_meta_device() -> None:
    net = on_meta()
    assert net.parts() == PARTS["llava"]
    assert sum(p.numel() for p in net.parameters()) == 7_063_427_072
    linear = [n for n, m in net.named_modules() if isinstance(m, nn.Linear)]
    assert len(linear) == 32 * 7 + 24 * 6 + 2 + 1
    # Each of q, k, v, o is 4096 x 4096, gate and up 11008 x 4096, down 4096 x 11008.
    square, oblong = 4096 + 4096, 4096 + 11008
    tower, wide = 1024 + 1024, 1024 + 4096
    sides = {
        "language_model": 32 * (4 * square + 3 * oblong),
        "tower": 23 * (4 * tower + 2 * wide),  # the last block gives no features
    }
    cores = {"language_model": 32 * 7, "tower": 23 * 6}
    for tuning, core in ((LoRA(rank=128), 0), (FLoRA(rank=64), 64 * 64)):
        expected = {part: sides[part] * tuning.rank + cores[part] * core for part in sides}
        connector = 1024 * 4096 + 4096 * 4096 + 2 * 4096
        net = on_meta()
        assert trained(net, tuning) == {**expected, "connector": connector}
        assert all(p.is_meta for p in net.parameters())


def test_the_table_of_the_guide_is_what_the_benchmark_prints() -> None:
    guide = Path(__file__).resolve().parents[1] / "docs" / "vision_language.md"
    assert table() in guide.read_text()


@pytest.mark.parametrize("kind", KINDS)
def test_every_parameter_takes_part_in_a_step_without_images(
    folders: dict[str, Path], kind: str
) -> None:
    module = tuned(folders[kind])
    turns = (Turn("user", "How?"), Turn("assistant", "So."))
    batch = module.encoder.train_batch([Conversation("text", turns, ())])
    alone = module(batch).loss
    loss = module.train()(batch).loss
    loss.backward()
    assert torch.equal(loss, alone)
    for name, parameter in module.net.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
    for name in PARTS[kind]["connector"]:
        assert all(not p.grad.any() for p in module.net.get_submodule(name).parameters())
