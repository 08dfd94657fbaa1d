"""A vision-language model in two processes, beside one."""

from pathlib import Path

import pytest
import torch
import worlds
from safetensors.torch import load_file

from litflora.language.tiny import byte_tokenizer, tiny_language_model

from .vision_language import METHODS, NF4, STRATEGIES, fits

SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}


@pytest.fixture(scope="module")
def language(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vision_language")
    torch.manual_seed(0)
    tiny_language_model(SMALL).save_pretrained(folder / "language")
    byte_tokenizer().save_pretrained(folder / "language")
    return folder / "language"


@pytest.fixture(scope="module")
def found(language):
    folder = language.parent
    one = fits(language, folder / "one", ("single",))
    return folder, one, worlds.run(fits, language, folder)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_two_processes_train_as_one(found, method, strategy):
    _, one, two = found
    single, *_ = one[method, "single"]
    for rank in two:
        left, *_ = rank[method, strategy]
        assert left.losses == pytest.approx(single.losses, rel=1e-5)
        assert left.moved == left.trained == single.trained
        assert all(torch.equal(left.start[name], single.start[name]) for name in single.start)
        assert all(torch.equal(left.end[n], two[0][method, strategy][0].end[n]) for n in left.end)


def test_two_processes_train_on_four_bits_as_one(language, tmp_path):
    pytest.importorskip("bitsandbytes", reason="4-bit weights are packed by bitsandbytes")
    one = fits(language, tmp_path / "one", ("single",), NF4)
    two = worlds.run(fits, language, tmp_path, ("ddp",), NF4)
    single, *_ = one["NF4", "single"]
    for rank in two:
        left, *_ = rank["NF4", "ddp"]
        assert left.losses == pytest.approx(single.losses, rel=1e-5)
        assert left.moved == left.trained == single.trained


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_evaluation_counts_each_question_once(found, method, strategy):
    _, one, two = found
    _, metrics, answers = one[method, "single"]
    for rank in two:
        _, own, _ = rank[method, strategy]
        assert own["val/exact"] == metrics["val/exact"]
        assert own["val/loss"] == pytest.approx(metrics["val/loss"], rel=1e-4)
    told = [rank[method, strategy][2] for rank in two]
    assert sorted(map(len, told)) == [3, 4]
    assert {**told[0], **told[1]}.keys() == answers.keys()
    same = sum({**told[0], **told[1]}[key] == answers[key] for key in answers)
    assert same >= len(answers) - 1  # of weights that differ in the last bit


@pytest.mark.parametrize("method", METHODS)
def test_adapters_of_all_strategies_are_alike(found, method):
    folder, _, _ = found
    files = {
        "single": folder / "one" / method / "single",
        **{strategy: folder / method / strategy for strategy in STRATEGIES},
    }
    kept = {name: load_file(_file(path)) for name, path in files.items()}
    for name in STRATEGIES:
        assert kept[name].keys() == kept["single"].keys()
        for key, value in kept["single"].items():
            torch.testing.assert_close(kept[name][key], value, rtol=1e-4, atol=1e-5)


def _file(folder: Path) -> Path:
    return folder / "adapter" / "adapter_model.safetensors"
