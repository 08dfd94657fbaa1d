"""What a person sees of a vision-language model: gallery, answers, chat, and what merge writes."""

import builtins
import json
import shutil
from dataclasses import replace

import pytest
import torch
from PIL import Image
from shell import SMALL, files_below, litflora, litflora_process

from litflora import VisionLanguageModule, from_adapter
from litflora.callbacks.adapter_folder import _message
from litflora.datamodules import ShapesQuestionsDataModule
from litflora.datamodules.conversations import ASSISTANT, IMAGE, USER, Conversation, Turn
from litflora.datamodules.vision_language import read_image

RECIPE = "vision_language/shapes"
SIZES = "{hidden_size: 64, intermediate_size: 128, num_hidden_layers: 2}"
FEW = ("--data.train_samples", 320, "--data.val_samples", 8, "--data.test_samples", 5)
# A rate that is high enough for the language model to say something.
QUICK = ("--data.batch_size", 8, "--model.language_lr", 1e-2, "--model.head_lr", 1e-2)
QUESTION = "What is the largest shape?"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A run with its adapter, its base merged, and an image; no test changes them."""
    folder = tmp_path_factory.mktemp("made")
    sizes = ("--model.language_options", SIZES, "--model.max_new_tokens", 6)
    runs = ("--trainer.default_root_dir", folder)
    told = litflora("fit", "--config", RECIPE, *FEW, *QUICK, *sizes, *SMALL, *runs)
    assert told.code == 0, told.err
    (folder / RECIPE / "version_0").rename(folder / "run")
    Image.effect_noise((90, 60), 80).save(folder / "image.png")
    merged = litflora("merge", folder / "run" / "adapter", "--out", folder / "merged")
    assert merged.code == 0, merged.err
    (folder / "merge.txt").write_text(merged.out)
    (folder / "fit.txt").write_text(told.out)
    return folder


@pytest.fixture(scope="module")
def module(made):
    loaded = from_adapter(made / "run" / "adapter")
    loaded.configure_model()
    return loaded.eval()


def asked(made, *said):
    """A conversation about the image, which the user begins."""
    roles = (USER, ASSISTANT) * len(said)
    texts = (f"{IMAGE}\n{said[0]}", *said[1:])
    turns = tuple(Turn(role, text) for role, text in zip(roles, texts, strict=False))
    return Conversation("a", turns, (read_image(made / "image.png"),))


def test_a_fit_draws_its_answers_and_says_what_to_do_with_the_adapter(made):
    assert files_below(made / "run" / "gallery") == {"epoch_000.png", "epoch_001.png"}
    first, last = (Image.open(made / "run" / "gallery" / f"epoch_00{n}.png") for n in (0, 1))
    assert first.size == last.size
    assert first.tobytes() != last.tobytes()  # it has learnt to say something
    said = (made / "fit.txt").read_text()
    adapter = made / RECIPE / "version_0" / "adapter"
    assert f"chat     litflora chat {adapter} IMAGE\n" in said
    assert f"merge    litflora merge {adapter} --out merged\n" in said


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_answers_are_written_in_the_order_of_the_data(processes, made, module, tmp_path):
    options = ("--trainer.default_root_dir", tmp_path, "--data.eval_batch_size", 2)
    if processes > 1:
        options += ("--config", "trainer/ddp_cpu")
    command = litflora if processes == 1 else litflora_process
    told = command("predict", "--adapter", made / "run" / "adapter", *options, *SMALL[:-2])
    assert told.code == 0, told.err
    (path,) = tmp_path.rglob("answers.jsonl")
    assert f"5 answers are in {path}" in told.out
    assert not [name for name in files_below(path.parent) if name.startswith(".")]
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    data = ShapesQuestionsDataModule(test_samples=5)
    questions = list(data.split("predict"))
    assert [line["id"] for line in lines] == [f"test/{n:05}" for n in range(5)]
    assert [line["answer"] for line in lines] == [module.reply(each) for each in questions]
    assert any(line["answer"] for line in lines)
    assert [f"{IMAGE}\n{line['question']}" for line in lines] == [
        q.turns[0].text for q in questions
    ]
    assert {line["image"] for line in lines} == {None}  # drawn, and of no file


def test_an_answer_names_the_files_of_its_images(made, module):
    from litflora.callbacks import AnswerWriter
    from litflora.datamodules.vision_language import Conversations

    path = made / "image.png"
    turn = (Turn(USER, IMAGE * 2 + "\nWhat?"),)
    several = [
        Conversation("two", turn, (path, path)),
        Conversation("one", (Turn(USER, f"Is {IMAGE} red?"),), (path,)),
        Conversation("none", (Turn(USER, "Why?"),)),
    ]
    read = list(Conversations(several, ["two", "one", "none"]))
    writer = AnswerWriter()
    batch = module.encoder.predict_batch(read)
    writer.on_predict_batch_end(None, module, module.predict_step(batch, 0), batch, 0)
    assert [row["image"] for row in writer.rows] == [[str(path)] * 2, str(path), None]
    assert [row["question"] for row in writer.rows] == ["What?", "Is red?", "Why?"]


def test_chat_answers_one_question(made, module):
    told = litflora("chat", made / "run" / "adapter", made / "image.png", "--question", QUESTION)
    assert told.code == 0, told.err
    answer = module.reply(asked(made, QUESTION))
    assert answer
    assert told.out == answer + "\n"


@pytest.mark.parametrize("count", [0, 2])
def test_chat_is_about_as_many_images_as_are_given(made, module, count):
    images = [made / "image.png"] * count
    told = litflora("chat", made / "run" / "adapter", *images, "--question", QUESTION)
    assert told.code == 0, told.err
    turn = Turn(USER, f"{IMAGE}\n" * count + QUESTION)
    answer = module.reply(Conversation("it", (turn,), tuple(images)))
    assert told.out == answer + "\n"


def test_a_reply_reads_images_and_checks_the_conversation(made, module):
    whole = asked(made, QUESTION)
    expected = module.reply(whole)
    for image in (made / "image.png", str(made / "image.png")):
        assert module.reply(replace(whole, images=(image,))) == expected
    with pytest.raises(ValueError, match="1 <image> in its text, and 0 image"):
        module.reply(replace(whole, images=()))
    with pytest.raises(ValueError, match="no user turn"):
        module.reply(replace(whole, turns=()))


@pytest.mark.parametrize("end", ["", EOFError])
def test_chat_keeps_the_conversation(end, made, module, monkeypatch):
    seen, reply = [], VisionLanguageModule.reply
    lines = iter([QUESTION, " Is it red? ", end, "never asked"])

    def typed(prompt):
        assert prompt == ""  # nobody sees it
        line = next(lines)
        if line is EOFError:
            raise EOFError
        return line

    def watched(self, conversation):
        seen.append(conversation)
        return reply(self, conversation)

    monkeypatch.setattr(builtins, "input", typed)
    monkeypatch.setattr(VisionLanguageModule, "reply", watched)
    told = litflora("chat", made / "run" / "adapter", made / "image.png")
    assert told.code == 0, told.err
    first = module.reply(asked(made, QUESTION))
    whole = asked(made, QUESTION, first, "Is it red?")
    assert seen[1].turns == whole.turns
    assert told.out == f"{first}\n{module.reply(whole)}\n"


def test_the_parts_that_are_tuned_are_told(made):
    told = (made / "fit.txt").read_text()
    assert "tuning   tower FLoRA, language_model Full: " in told


def mistake(*args):
    told = litflora(*args)
    assert told.code == 2, told.out
    lines = told.err.splitlines()
    assert lines[0].startswith("error: ")
    assert len(lines) <= 2
    return told.err


def test_mistakes_in_chat(made, tmp_path):
    adapter, image = made / "run" / "adapter", made / "image.png"
    assert "there is no image" in mistake("chat", adapter, tmp_path / "none.png")
    (tmp_path / "text.png").write_text("no image")
    assert "cannot read" in mistake("chat", adapter, tmp_path / "text.png")
    assert "is not an adapter folder" in mistake("chat", tmp_path, image)
    assert "--question is empty" in mistake("chat", adapter, image, "--question", " ")
    marked = mistake("chat", adapter, image, "--question", "what <image> is")
    assert "a question cannot hold <image>: images are named after the adapter" in marked
    long = mistake("chat", adapter, image, "--question", "why " * 1000)
    assert "tokens: more than max_length 1,024: shorten it" in long
    other = shutil.copytree(adapter, tmp_path / "other")
    config = json.loads((other / "adapter_config.json").read_text())
    config["metadata"]["task"] = "classification"
    (other / "adapter_config.json").write_text(json.dumps(config))
    assert "it was trained for classification, and chat needs vision" in mistake(
        "chat", other, image
    )


def logits(net, module, conversation):
    batch = module.encoder.predict_batch([conversation])
    with torch.no_grad():
        return net.eval()(**module.inputs(batch)).logits


def test_what_merge_writes_is_the_same_network(made, module):
    names = {"connector.safetensors", "language_model", "tower.safetensors"}
    assert {path.name for path in (made / "merged").iterdir()} == names
    *_, imported, made_by = (made / "merge.txt").read_text().splitlines()
    space = {}
    exec(imported.strip(), space)
    net = eval(made_by.strip(), space)
    assert not [key for key in net.state_dict() if ".adapters." in key]
    conversation = asked(made, QUESTION)
    wanted = logits(module.net, module, conversation)
    torch.testing.assert_close(logits(net, module, conversation), wanted, rtol=1e-4, atol=1e-4)


def test_a_merged_folder_is_a_base(made, module, tmp_path):
    """Of a fit whose frozen parts are then no longer random; its adapter finds them again."""
    base = ("--model.weights", made / "merged", "--model.language_tuning", "LoRA")
    runs = ("--trainer.default_root_dir", tmp_path, "--trainer.limit_train_batches", 2)
    small = ("--model.max_new_tokens", 6, *runs, *SMALL)
    told = litflora("fit", "--config", RECIPE, *FEW, *QUICK, *base, *small)
    assert told.code == 0, told.err
    adapter = tmp_path / RECIPE / "version_0" / "adapter"
    assert (adapter / "adapter_model.safetensors").stat().st_size < 400_000
    again = litflora("chat", adapter, made / "image.png", "--question", QUESTION)
    assert again.code == 0, again.err
    loaded = from_adapter(adapter)
    loaded.configure_model()
    assert any(".adapters." in key for key in loaded.net.language_model.state_dict())
    assert again.out == loaded.eval().reply(asked(made, QUESTION)) + "\n"


def test_a_folder_that_is_no_merged_one(made, tmp_path):
    shutil.copytree(made / "merged", tmp_path / "half")
    (tmp_path / "half" / "connector.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="lacks connector"):
        VisionLanguageModule("convnext_shapes", weights=str(tmp_path / "half"), layer=-2)
    with pytest.raises(FileNotFoundError, match="gone are neither a folder"):
        VisionLanguageModule("convnext_shapes", weights=str(tmp_path / "gone"), layer=-2)
    options = {"weights": str(made / "merged"), "layer": -2, "connector": "linear"}
    with pytest.raises(ValueError, match="is of another one: give tower"):
        VisionLanguageModule("convnext_shapes", **options).configure_model()


def test_merge_replaces_no_folder(made):
    told = mistake("merge", made / "run" / "adapter", "--out", made / "merged", "--force")
    assert "is no file name: give one that is free" in told


def test_inspect_shows_adapter_and_recipe(made):
    told = litflora("inspect", made / "run" / "adapter")
    assert told.code == 0, told.err
    assert "tower.stages.2.blocks.0.mlp.fc1.weight" in told.out
    assert "for one batch of 8 images of 64 x 64 pixels" in told.out
    base = ("--model.weights", made / "merged", "--model.language_tuning", "LoRA")
    told = litflora("inspect", RECIPE, *base, "--data.batch_size", 2)
    assert told.code == 0, told.err
    assert "language_model.model.layers.1.self_attn.q_proj.weight" in told.out
    assert "was not called" not in told.out


def test_calibrate_times_all_parts(made, tmp_path, monkeypatch):
    monkeypatch.setenv("LITFLORA_PATHS", str(tmp_path / "paths.json"))
    base = ("--model.weights", made / "merged", "--model.language_tuning", "FLoRA")
    told = litflora("calibrate", RECIPE, *base, "--data.batch_size", 1, *SMALL[-4:-2])
    assert told.code == 0, told.err
    assert "linear 128x64" in told.out  # of the language model alone
    assert (tmp_path / "paths.json").is_file()


def test_training_conversations_are_drawn(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    told = litflora("inspect", "data", RECIPE, *FEW, "--samples", 2)
    assert told.code == 0, told.err
    assert "320 train conversations, 8 val questions" in told.out
    assert Image.open("samples.png").size > (1000, 500)


def test_without_transformers(monkeypatch):
    monkeypatch.setattr("litflora.answers.find_spec", lambda name: None)
    assert "pip install 'litflora[vlm]'" in mistake("inspect", RECIPE)


def test_a_folder_of_images_needs_a_question(made):
    arguments = {"predict_root": None, "question": None}
    told = _message(made / "merged", "last", ("a", None, None), {"init_args": arguments}, {})
    assert told.endswith(" --data.init_args.predict_root FOLDER --data.init_args.question TEXT")
