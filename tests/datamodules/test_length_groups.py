"""Batches of conversations that are alike: what each holds, in what order, in every process."""

import numpy as np
import pytest
from conversation_files import record, records, write_llava

from litflora.datamodules import LlavaDataModule
from litflora.datamodules.length_groups import LengthGroupedSampler, lengths_of
from litflora.datamodules.llava import LlavaFile
from litflora.datamodules.samplers import ResumableLoader

COUNT = 1000
RNG = np.random.default_rng(0)
LENGTHS = RNG.integers(1, 500, COUNT)
IMAGES = RNG.random(COUNT) < 0.7


def keys(epoch: int = 0, ranks: int = 1, rank: int = 0, seed: int = 0, size: int = 8):
    options = {"num_replicas": ranks, "rank": rank, "seed": seed}
    sampler = LengthGroupedSampler(LENGTHS, IMAGES, size, **options)
    sampler.set_epoch(epoch)
    drawn = list(sampler)
    assert len(drawn) == len(sampler)
    return np.array(drawn).reshape(-1, size)


def test_no_batch_mixes_texts_and_images_and_lengths_are_alike() -> None:
    batches = keys()
    kinds = IMAGES[batches]
    assert (kinds == kinds[:, :1]).all()
    assert set(batches.ravel()) == set(range(COUNT))
    assert batches.size - COUNT < 2 * 8
    spread = np.ptp(LENGTHS[batches], axis=1).mean()
    shuffled = np.ptp(LENGTHS[RNG.permutation(COUNT)].reshape(-1, 8), axis=1).mean()
    assert spread < shuffled / 10


def test_batches_come_in_no_order_of_length_or_kind() -> None:
    batches = keys()
    means = LENGTHS[batches].mean(1)
    assert abs(np.corrcoef(means, np.arange(len(means)))[0, 1]) < 0.3
    switches = (np.diff(IMAGES[batches[:, 0]].astype(int)) != 0).sum()
    assert switches > len(batches) / 4


def test_order_follows_seed_and_epoch() -> None:
    assert (keys() == keys()).all()
    assert (keys(seed=1) != keys()).any()
    assert (keys(epoch=1) >= COUNT).all()
    assert (keys(epoch=1) - COUNT != keys()).any()


@pytest.mark.parametrize("ranks", [2, 3])
def test_processes_take_like_batches_at_the_same_time(ranks: int) -> None:
    shares = np.stack([keys(2, ranks, rank) % COUNT for rank in range(ranks)])
    kinds = IMAGES[shares]
    assert (kinds == kinds[:1, :, :1]).all()
    assert set(shares.ravel()) == set(range(COUNT))
    totals = LENGTHS[shares].sum(2)
    assert (np.ptp(totals, axis=0) / totals.mean(0)).mean() < 0.05


def test_a_few_samples_make_a_whole_batch() -> None:
    sampler = LengthGroupedSampler(
        np.array([3, 1, 2]), np.array([True, True, False]), 4, num_replicas=1, rank=0
    )
    batches = [{0, 1}, {2}]
    drawn = np.array(list(sampler)).reshape(-1, 4)
    assert sorted(map(set, drawn.tolist()), key=len, reverse=True) == batches


def test_it_goes_on_in_the_middle_of_an_epoch() -> None:
    def loader() -> ResumableLoader:
        data = list(range(COUNT * 4))
        sampler = LengthGroupedSampler(LENGTHS, IMAGES, 8, num_replicas=1, rank=0)
        return ResumableLoader(data, batch_size=8, sampler=sampler)

    whole = loader()
    given = iter(whole)
    for _ in range(5):
        next(given)
    resumed = loader()
    resumed.load_state_dict(whole.state_dict())
    left = [batch.tolist() for batch in given]
    assert [batch.tolist() for batch in resumed] == left
    assert len(left) == len(keys()) - 5


def test_lengths_are_words_and_images(tmp_path) -> None:
    write_llava(tmp_path)
    lengths, images = lengths_of(LlavaFile(tmp_path / "train.json", tmp_path))
    assert lengths.tolist() == [5 + 576] * 4 + [3 + 2 + 5 + 2 + 2 * 576, 3 + 3 + 2]
    assert images.tolist() == [True] * 5 + [False]


class Encoder:
    """What a datamodule wants of an encoder."""

    def train_batch(self, conversations):
        return [len(each.images) for each in conversations]

    eval_batch = predict_batch = train_batch


def test_a_datamodule_groups_when_asked(tmp_path) -> None:
    given = [*records(), *(record(f"text{n}", None) for n in range(5))]
    write_llava(tmp_path, given)
    options = {"train_file": "train.json", "val_file": "train.json", "batch_size": 2}

    def mixed(grouped: bool) -> int:
        data = LlavaDataModule(str(tmp_path), group_by_length=grouped, **options)
        data.encoder = Encoder()
        data.setup("fit")
        batches = []
        for epoch in range(5):
            loader = data.train_dataloader()
            loader.sampler.set_epoch(epoch)
            batches += list(loader)
        return sum(0 in batch and max(batch) > 0 for batch in batches)

    assert mixed(grouped=True) == 0
    assert mixed(grouped=False) > 0


def test_packing_wants_an_encoder_that_can(tmp_path) -> None:
    write_llava(tmp_path)
    data = LlavaDataModule(str(tmp_path), train_file="train.json", pack=True, val_fraction=0.3)
    data.encoder = Encoder()
    data.setup("fit")
    with pytest.raises(ValueError, match="Encoder cannot pack; set pack: false"):
        data.train_dataloader()
    assert data.val_dataloader().collate_fn is not None
