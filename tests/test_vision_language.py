"""Questions about drawn scenes, answered by a tiny model: training, files and mistakes."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from conversation_files import record, records, write_llava
from lightning.pytorch import Trainer, seed_everything

from litflora import FLoRA, Frozen, Full, LoRA, VisionLanguageModule
from litflora.adapters import BitFit, save
from litflora.callbacks import AdapterFolder
from litflora.datamodules import LlavaDataModule, ShapesQuestionsDataModule
from litflora.language.language_models import tokenizer_of
from litflora.language.tiny import byte_tokenizer, tiny_language_model
from litflora.module import from_adapter

SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
NONE = {"tower": Frozen(), "connector": Frozen(), "language": Frozen()}


def module(**options):
    settings = {
        "weights": "embedded",
        "img_size": 32,
        "language_options": SMALL,
        "language_tuning": Full(),
        "max_new_tokens": 4,
    }
    return VisionLanguageModule("convnext_shapes", **{**settings, **options})


def questions(n=8, **options):
    sizes = {"train_samples": n, "val_samples": 6, "test_samples": 6}
    return ShapesQuestionsDataModule(**sizes, img_size=32, batch_size=4, **options)


def fit(made, folder, steps=3, **options):
    seed_everything(0, verbose=False)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = Trainer(
        accelerator="cpu",
        max_steps=steps,
        default_root_dir=folder,
        enable_checkpointing=False,
        **{**quiet, **options},
    )
    trainer.fit(made, questions())
    return trainer


@pytest.fixture(scope="module")
def language_folder(tmp_path_factory):
    """A language model as a user has one: saved by transformers, its tokenizer without <image>."""
    folder = tmp_path_factory.mktemp("language")
    torch.manual_seed(1)
    tiny_language_model(SMALL).save_pretrained(folder)
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = None
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def adapter(tmp_path_factory, language_folder):
    """Of a frozen language model with FLoRA in all parts, and the module that was trained."""
    folder = tmp_path_factory.mktemp("run")
    made = module(
        language_model=str(language_folder),
        language_options=None,
        tuning=FLoRA(rank=2),
        language_tuning=None,
        lr=1e-2,
    )
    fit(made, folder, callbacks=[AdapterFolder()])
    return folder / "adapter", made


@pytest.mark.parametrize(
    ("moved", "tunings"),
    [
        ("tower", {"tower": FLoRA(rank=2)}),
        ("tower", {"tower": Full()}),
        ("tower", {"tower": BitFit()}),
        ("connector", {"connector": Full()}),
        ("connector", {"connector": LoRA(rank=2)}),
        ("language_model", {"language": FLoRA(rank=2)}),
        ("language_model", {"language": Full()}),
    ],
)
def test_each_part_moves_when_its_tuning_says_so(moved, tunings, tmp_path, language_folder):
    named = {f"{part}_tuning": tuning for part, tuning in {**NONE, **tunings}.items()}
    made = module(language_model=str(language_folder), language_options=None, lr=1e-2, **named)
    made.configure_model()
    before = {name: p.clone() for name, p in made.net.named_parameters()}
    fit(made, tmp_path, limit_val_batches=0)
    changed = {n for n, p in made.net.named_parameters() if not torch.equal(p, before[n])}
    trained = {n for n, p in made.net.named_parameters() if p.requires_grad}
    assert changed
    assert changed <= trained
    assert {name.partition(".")[0] for name in changed} == {moved}


def test_each_part_has_its_own_learning_rate(tmp_path):
    made = module(tower_tuning=FLoRA(), tower_lr=1e-2, language_lr=3e-4, head_lr=2e-3)
    trainer = fit(made, tmp_path, steps=1, limit_val_batches=0)
    inside = {}
    names = {id(p): name for name, p in made.net.named_parameters()}
    for group in trainer.optimizers[0].param_groups:
        for parameter in group["params"]:
            part = names[id(parameter)].partition(".")[0]
            inside.setdefault(part, set()).add(group["initial_lr"])
    assert inside == {"tower": {1e-2}, "connector": {2e-3}, "language_model": {3e-4}}


def test_a_folder_loads_back_in_a_new_process(adapter, tmp_path):
    folder, made = adapter
    made.eval()
    data = questions()
    data.encoder = made.encoder
    data.setup("test")
    (batch,) = data.test_dataloader()
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
    arguments = [sys.executable, "-c", code, str(folder), str(tmp_path / "told.pt")]
    done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert done.stdout.strip().endswith("equal"), done.stderr


def test_the_folder_holds_nothing_of_the_base(adapter):
    from safetensors.torch import load_file

    folder, made = adapter
    kept = load_file(folder / "adapter_model.safetensors")
    assert all(".adapters." in key or key.startswith("connector.") for key in kept)
    assert {key.partition(".")[0] for key in kept} == {"tower", "connector", "language_model"}
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["metadata"]["model"]["init_args"]["language_model"] == made.language_model


def test_another_base_is_refused_by_both_names(adapter, tmp_path):
    folder, made = adapter
    torch.manual_seed(2)
    tiny_language_model(SMALL).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    other = from_adapter(folder, language_model=str(tmp_path))
    with pytest.raises(ValueError, match="made for another base") as error:
        other.configure_model()
    assert str(tmp_path) in str(error.value)
    assert made.language_model in str(error.value)


def test_an_adapter_of_a_tower_of_another_width(tmp_path):
    options = {"weights": None, "tower_tuning": LoRA(rank=2), "language_tuning": Full()}
    made = VisionLanguageModule("test_vit", img_size=32, language_options=SMALL, **options)
    made.configure_model()
    save(made.net, tmp_path / "adapter", metadata=made.metadata())
    other = from_adapter(tmp_path / "adapter", tower="test_vit3")
    with pytest.raises(ValueError, match="tower") as error:
        other.configure_model()
    assert "64" in str(error.value)
    assert "96" in str(error.value)


def test_metrics_of_a_test(adapter, tmp_path):
    _, made = adapter
    quiet = {"logger": False, "enable_progress_bar": False, "enable_checkpointing": False}
    (found,) = Trainer(accelerator="cpu", **quiet).test(made, questions(), verbose=False)
    names = ("loss", "exact", "vqa", "exact_closed", "exact_open")
    assert set(found) == {f"test/{name}" for name in names}


def resumable(folder, root, epochs, ckpt_path=None):
    """Trains on packed batches of like length, of images and of texts; saves a checkpoint."""
    options = {"batch_size": 3, "group_by_length": True, "pack": True}
    data = LlavaDataModule(str(root), "train.json", "train.json", **options)
    # Else a run that forgets the checkpoint would begin anew, and end as it should.
    seed_everything(0 if ckpt_path is None else 1, verbose=False)
    made = module(lr=1e-3, lr_scheduler=None)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        default_root_dir=folder,
        enable_checkpointing=False,
        limit_val_batches=0,
        **quiet,
    )
    trainer.fit(made, data, ckpt_path=ckpt_path, weights_only=True)
    trainer.save_checkpoint(folder / f"{epochs}.ckpt")
    return trainer.global_step, made


def test_a_run_goes_on_from_a_checkpoint_as_if_it_had_not_ended(tmp_path):
    texts = [record(f"text{n}", None) for n in range(6)]
    for number, text in enumerate(texts):
        text["conversations"][1]["value"] = f"Number {number}, " * (number + 1)
    write_llava(tmp_path, [*records()[:5], *texts])
    steps, whole = resumable(tmp_path, tmp_path, 2)
    half, first = resumable(tmp_path, tmp_path, 1)
    assert 2 * half == steps
    ended, again = resumable(tmp_path, tmp_path, 2, tmp_path / "1.ckpt")
    assert ended == steps
    parts = dict(again.named_parameters())
    assert parts.keys() == dict(whole.named_parameters()).keys()
    for name, one in whole.named_parameters():
        assert torch.equal(one, parts[name]), name
    # The second epoch has changed every part.
    moved = {n for n, p in first.named_parameters() if not torch.equal(p, parts[n])}
    assert {name.split(".")[1] for name in moved} == {"tower", "connector", "language_model"}


def test_what_is_too_long_ends_no_run(tmp_path):
    long = record("long", None)
    long["conversations"][0]["value"] = "so " * 500
    write_llava(tmp_path, [*records()[:4], long])
    data = LlavaDataModule(str(tmp_path), "train.json", "train.json", batch_size=5)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = Trainer(
        accelerator="cpu", max_epochs=1, num_sanity_val_steps=0, default_root_dir=tmp_path, **quiet
    )
    with pytest.warns(UserWarning, match="conversation long has") as told:
        trainer.fit(module(max_length=200), data)
    said = [str(each.message) for each in told if "conversation long has" in str(each.message)]
    assert sum("left out of training" in each for each in said) == 1
    assert sum("counts as unanswered" in each for each in said) == 1
    assert trainer.callback_metrics["val/exact"] == 0
    assert torch.isfinite(trainer.callback_metrics["val/loss"])


def test_a_language_model_without_an_image_token_gets_one(language_folder):
    made = module(language_model=str(language_folder), language_options=None)
    assert made.encoder.image_token == byte_tokenizer().convert_tokens_to_ids("<image>")
    assert tokenizer_of(str(language_folder)).chat_template is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"max_length": 5000},
            "max_length 5,000 is more than the 1,024 positions of language mode",
        ),
        ({"max_length": 0}, "max_length must be at least 1, not 0"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, not 0"),
        ({"tower_lr": -1.0}, "tower_lr must be 0 or more"),
        ({"layer": 7}, "layer 7 of a tower with 4: give -4 to 3"),
        ({"connector": "qformer"}, "connector 'qformer' is none of"),
        ({"connector": "pixel_shuffle"}, "pixel_shuffle needs maps of even sides, not 1 x 1"),
        ({"max_new_tokens": 5000}, "max_new_tokens 5,000 leaves nothing of the 1,024 positions"),
        ({"language_options": {"hiden_size": 3}}, "has no hiden_size: there is hidden_size"),
        ({"language_options": {"vocab_size": 3}}, "language_options has no vocab_size"),
        ({"language_options": {"hidden_size": 30}}, "hidden_size 30 cannot be shared out among 4"),
        ({"language_model": "/no/such/folder"}, "language model /no/such/folder"),
        ({"language_tuning": FLoRA()}, "language model tiny is random, and FLoRA"),
    ],
)
def test_mistakes_are_told_before_training(options, message):
    with pytest.raises(ValueError, match=message):
        module(**options).encoder  # noqa: B018  (the data ask for it first)


def test_tied_embeddings_keep_their_type(language_folder):
    made = module(
        language_model=str(language_folder),
        language_options=None,
        language_tuning=LoRA(),
        base_dtype="bfloat16",
    )
    made.configure_model()
    told = made.net.language_model
    assert told.lm_head.weight is told.get_input_embeddings().weight
    assert told.lm_head.weight.dtype == torch.float32
    assert told.model.layers[0].mlp.up_proj.weight.dtype == torch.bfloat16


def test_what_a_checkpoint_brings_for_chatting_changes_no_answer(language_folder, tmp_path):
    from transformers import GenerationConfig

    shutil.copytree(language_folder, tmp_path / "chatty")
    config = GenerationConfig(repetition_penalty=9.0, do_sample=True, eos_token_id=[2, 7])
    config.save_pretrained(tmp_path / "chatty")
    answers = []
    for folder in (language_folder, tmp_path / "chatty"):
        made = module(language_model=str(folder), language_options=None, language_tuning=Frozen())
        torch.manual_seed(0)
        made.configure_model()
        made.eval()
        data = questions()
        data.encoder = made.encoder
        data.setup("test")
        (batch,) = data.test_dataloader()
        answers.append(made.net(**made._generation(batch["prompt"])).tokens)
    assert torch.equal(*answers)
    assert made._generation(batch["prompt"])["eos_token_id"] == [2, 7]


def test_a_new_connector_has_a_rate_of_its_own(tmp_path):
    rates = {}
    for name, tuning in {"FLoRA": FLoRA(), "Full": Full(), "LoRA": LoRA()}.items():
        made = module(tower_tuning=tuning)
        trainer = fit(made, tmp_path, steps=1, limit_val_batches=0)
        own = set(map(id, made.net.connector.parameters()))
        rates[name] = {
            group["initial_lr"]
            for group in trainer.optimizers[0].param_groups
            if own & set(map(id, group["params"]))
        }
    assert rates == {name: {1e-3} for name in rates}


def test_a_folder_called_tiny_is_no_language_model(tmp_path, monkeypatch):
    (tmp_path / "tiny").mkdir()
    monkeypatch.chdir(tmp_path)
    assert module().description()["init_args"]["language_model"] == "tiny"
