"""Vision-language models in two processes, beside one."""

from pathlib import Path

import pytest
import torch
import worlds
from checkpoints import save_checkpoint
from safetensors.torch import load_file

from litflora.language.tiny import byte_tokenizer, tiny_language_model

from .vision_language import CASES, CHECKPOINTS, METHODS, STRATEGIES, fits

SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}


QUICK = ("FLoRA", "llava")
SLOW = tuple(case for case in CASES if case not in QUICK)
MARKED = [*QUICK, *(pytest.param(case, marks=pytest.mark.slow) for case in SLOW)]


@pytest.fixture(scope="module")
def language(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vision_language")
    torch.manual_seed(0)
    tiny_language_model(SMALL).save_pretrained(folder / "language")
    byte_tokenizer().save_pretrained(folder / "language")
    return folder / "language"


@pytest.fixture(scope="module")
def found(language):
    """What one process and two leave of a case; the slow ones are started when one is asked for."""
    folder, kept = language.parent, {}

    def of(case):
        group = QUICK if case in QUICK else SLOW
        if group not in kept:
            bases = {name: language for name in group if name in METHODS}
            for kind in set(group) & set(CHECKPOINTS):
                bases[kind] = save_checkpoint(kind, folder / f"{kind}_base")
            one = fits(bases, folder / "one", ("single",))
            kept[group] = folder, one, worlds.run(fits, bases, folder)
        return kept[group]

    return of


@pytest.mark.parametrize("case", MARKED)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_two_processes_train_as_one(found, case, strategy):
    _, one, two = found(case)
    single, *_ = one[case, "single"]
    for rank in two:
        left, *_ = rank[case, strategy]
        assert left.start.keys() == single.start.keys()
        assert all(torch.equal(left.start[name], single.start[name]) for name in single.start)
        assert left.losses == pytest.approx(single.losses, rel=1e-5)
        assert left.moved == left.trained == single.trained
        assert all(torch.equal(left.end[n], two[0][case, strategy][0].end[n]) for n in left.end)


@pytest.mark.slow
def test_two_processes_train_on_four_bits_as_one(language, tmp_path):
    pytest.importorskip("bitsandbytes", reason="4-bit weights are packed by bitsandbytes")
    base = {"NF4": language}
    one = fits(base, tmp_path / "one", ("single",))
    two = worlds.run(fits, base, tmp_path, ("ddp",))
    single, *_ = one["NF4", "single"]
    for rank in two:
        left, *_ = rank["NF4", "ddp"]
        assert left.losses == pytest.approx(single.losses, rel=1e-5)
        assert left.moved == left.trained == single.trained


@pytest.mark.parametrize("case", MARKED)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_process_has_no_images_in_a_step_in_which_the_other_has(found, case, strategy):
    _, _, two = found(case)
    seen, other = (rank[case, strategy][3] for rank in two)
    assert seen != other


@pytest.mark.parametrize("case", MARKED)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_evaluation_counts_each_question_once(found, case, strategy):
    _, one, two = found(case)
    _, metrics, answers, _ = one[case, "single"]
    for rank in two:
        _, own, _, _ = rank[case, strategy]
        assert own["val/exact"] == metrics["val/exact"]
        assert own["val/loss"] == pytest.approx(metrics["val/loss"], rel=1e-4)
    told = [rank[case, strategy][2] for rank in two]
    assert sorted(map(len, told)) == [3, 4]
    assert {**told[0], **told[1]}.keys() == answers.keys()
    same = sum({**told[0], **told[1]}[key] == answers[key] for key in answers)
    assert same >= len(answers) - 1  # of weights that differ in the last bit


@pytest.mark.parametrize("case", MARKED)
def test_adapters_of_all_strategies_are_alike(found, case):
    folder, _, _ = found(case)
    files = {
        "single": folder / "one" / case / "single",
        **{strategy: folder / case / strategy for strategy in STRATEGIES},
    }
    kept = {name: load_file(_file(path)) for name, path in files.items()}
    for name in STRATEGIES:
        assert kept[name].keys() == kept["single"].keys()
        for key, value in kept["single"].items():
            torch.testing.assert_close(kept[name][key], value, rtol=1e-4, atol=1e-5)


def _file(folder: Path) -> Path:
    return folder / "adapter" / "adapter_model.safetensors"
