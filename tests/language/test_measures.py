"""How good answers are, against numbers worked out by hand."""

import pytest
import torch

from litflora.answers import AnswersModule
from litflora.language.measures import (
    AnswerMean,
    Bleu,
    TokenLoss,
    are_sentences,
    is_exact,
    vqa_accuracy,
)
from litflora.language.output import Output, token_loss


@pytest.mark.parametrize(
    ("answer", "accepted", "exact"),
    [
        ("Yes.", ["yes"], True),
        ("a red  Square", ["the red square"], True),
        ('"two"', ["2", "two"], True),
        ("no", ["yes", "maybe"], False),
        ("another", ["nother"], False),  # an article is a word, not a beginning
        ("U.S.A.", ["u.s.a"], True),
        ("B", ["A, B"], False),
        ("vitamin", ["vitamin A"], False),
        ("a", ["A."], True),
        ("on mat", ["on the mat"], False),  # an article in the midst is said, or not
        ("2", ["two"], False),
        ("", ["yes"], False),
    ],
)
def test_exact(answer, accepted, exact):
    assert is_exact(answer, accepted) is exact


@pytest.mark.parametrize(
    ("people", "accuracy"), [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)]
)
def test_vqa_accuracy_of_ten_people(people, accuracy):
    accepted = ["cat"] * people + [f"dog {n}" for n in range(10 - people)]
    assert vqa_accuracy("The cat", accepted) == pytest.approx(accuracy)


def test_vqa_accuracy_of_few_people_is_all_or_nothing():
    assert vqa_accuracy("cat", ["cat", "dog"]) == 1.0
    assert vqa_accuracy("cow", ["cat", "dog"]) == 0.0
    assert vqa_accuracy("cat", ["cat", "dog", "cow"]) == pytest.approx((0 + 1 / 3 + 1 / 3) / 3)


def test_loss_is_of_tokens_whatever_batches_they_come_in():
    """A mean of batches' means would count the tokens of the short batch more."""
    generator = torch.Generator().manual_seed(0)
    first, second = (
        torch.randn(n, length, 5, generator=generator, dtype=torch.float64)
        for n, length in ((2, 7), (1, 4))
    )
    labels = [torch.full((2, 7), -100), torch.full((1, 4), -100)]
    labels[0][0, 2:6], labels[0][1, 6], labels[1][0, 3] = torch.tensor([1, 4, 0, 2]), 3, 1
    metric, means = TokenLoss(), []
    for logits, truth in zip((first, second), labels, strict=True):
        losses = token_loss(logits, truth, reduction="none").view(len(truth), -1)
        metric.update(losses, truth)
        means.append(token_loss(logits, truth))
    told = [(first[0, 1:5], [1, 4, 0, 2]), (first[1, 5:6], [3]), (second[0, 2:3], [1])]
    by_hand = [
        -row.log_softmax(0)[token].item()
        for rows, tokens in told
        for row, token in zip(rows, tokens, strict=True)
    ]
    assert len(by_hand) == 6
    assert metric.compute().item() == pytest.approx(sum(by_hand) / 6, rel=1e-5)
    assert metric.compute().item() != pytest.approx(sum(means).item() / 2, rel=1e-3)


def test_a_mean_of_nothing_is_none():
    metric = AnswerMean()
    metric.update([])
    assert metric.compute().isnan()
    metric.update([1.0, 0.0, 1.0])
    metric.update([])
    assert metric.compute().item() == pytest.approx(2 / 3)


def test_bleu_by_hand():
    metric = Bleu()
    metric.update([], [])
    assert metric.compute().isnan()
    # Runs of 1 to 4 words found: 5 of 6, 4 of 5, 3 of 4, 2 of 3; as long as the reference.
    metric.update(["A dog sits on the mat"], [["a cat sits on the mat"]])
    by_hand = (5 / 6 * 3 / 5 * 2 / 4 * 1 / 3) ** 0.25
    assert metric.compute().item() == pytest.approx(by_hand, rel=1e-5)
    assert are_sentences(["a cat sits down", "it is a cat"], None)
    assert not are_sentences(["a cat sits down", "a cat"], None)
    assert not are_sentences(["a cat sits down"], False)


class Parrot(AnswersModule):
    """Says what it is told to, and finds every next token of four as likely."""

    def __init__(self, said):
        super().__init__(weights=None)
        self.said, self.logged = said, {}
        self.net = lambda **asked: Output(None, torch.zeros(len(said), 3, 4))

    def inputs(self, batch):
        return {}

    def _generation(self, prompt):
        return {}

    def _told(self, tokens):
        return self.said

    def log(self, name, value, **options):
        self.logged[name] = round(float(value), 4)


def evaluate(said, accepted, closed, unanswered=()):
    module = Parrot(said)
    labels = torch.full((len(said), 3), 1)
    batch = {"labels": labels, "prompt": {}, "accepted": accepted, "closed": closed}
    batch["unanswered"] = [index in unanswered for index in range(len(said))]
    module.test_step(batch, 0)
    module.on_test_epoch_end()
    logged = {key.removeprefix("test/"): value for key, value in module.logged.items()}
    assert logged.pop("loss") == round(torch.tensor(4.0).log().item(), 4)
    return logged


def test_open_and_closed_questions_are_told_apart():
    logged = evaluate(["yes", "no", "cat"], [["yes"], ["yes"], ["dog"]], [True, True, False])
    assert logged == {"exact": 0.3333, "vqa": 0.3333, "exact_closed": 0.5, "exact_open": 0.0}


def test_what_was_not_asked_is_not_answered():
    said = evaluate(["yes", "yes"], [["yes"], ["yes"]], [True, True], unanswered=[1])
    assert said == {"exact": 0.5, "vqa": 0.5, "exact_closed": 0.5}


def test_bleu_is_of_captions_alone():
    caption = ["A cat sits on the mat."]
    logged = evaluate(
        [*caption, "it is on the mat"], [caption, ["on the mat there"]], [None, False]
    )
    assert logged == {"exact": 0.5, "vqa": 0.5, "exact_open": 0.0, "bleu": 1.0}
