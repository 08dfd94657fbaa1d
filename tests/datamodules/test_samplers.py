"""Repeat-factor sampling: how often, in what order, and under which keys."""

import numpy as np
import pytest

from litflora.datamodules.samplers import (
    EpochSampler,
    RepeatFactorSampler,
    ResumableLoader,
    repeat_factors,
)


def keys(factors: np.ndarray, epoch: int = 0, ranks: int = 1, rank: int = 0, seed: int = 0):
    sampler = RepeatFactorSampler(factors, num_replicas=ranks, rank=rank, seed=seed)
    sampler.set_epoch(epoch)
    drawn = list(sampler)
    assert len(drawn) == len(sampler)
    return drawn


def test_factors_follow_the_rarest_class() -> None:
    present = np.zeros((100, 4), bool)
    present[:, 0] = True  # everywhere
    present[:4, 1] = True  # share 0.04: sqrt(0.16 / 0.04) = 2
    present[:1, 2] = True  # share 0.01: 4
    factors = repeat_factors(present, 0.16)
    assert factors.tolist() == [4, 2, 2, 2] + [1] * 96


FACTORS = np.array([1, 1, 2.3, 1, 4, 1.5, 1])


def test_an_epoch_holds_each_sample_about_as_often_as_its_factor() -> None:
    counts = np.array(
        [np.bincount(np.array(keys(FACTORS, epoch)) % 7, minlength=7) for epoch in range(400)]
    )
    assert (counts.sum(1) == 12).all()  # 11.8 rounded
    expected = FACTORS * 12 / FACTORS.sum()
    assert (counts >= np.floor(expected)).all()
    assert (counts <= np.floor(expected) + 1).all()
    assert np.abs(counts.mean(0) - expected).max() < 0.08


def test_no_key_comes_twice_in_any_epoch() -> None:
    every = [key for epoch in range(50) for key in keys(FACTORS, epoch)]
    assert len(set(every)) == len(every)


def test_order_follows_seed_and_epoch() -> None:
    assert keys(FACTORS) == keys(FACTORS)
    orders = [keys(FACTORS), keys(FACTORS, seed=1), [key % 7 for key in keys(FACTORS, epoch=1)]]
    assert orders[0] not in orders[1:]


@pytest.mark.parametrize("ranks", [2, 3])
def test_processes_share_an_epoch_without_overlap(ranks: int) -> None:
    shares = [keys(FACTORS, 2, ranks, rank) for rank in range(ranks)]
    together = [key for share in shares for key in share]
    assert sorted(together) == sorted(keys(FACTORS, 2))


def test_equal_factors_give_each_sample_once() -> None:
    assert sorted(keys(np.ones(9), epoch=0)) == list(range(9))


def test_a_place_in_an_epoch_is_one_of_batches_of_a_size() -> None:
    def loader(batch_size: int, processes: int = 1) -> ResumableLoader:
        data = list(range(24))
        sampler = EpochSampler(data, num_replicas=processes, rank=0)
        return ResumableLoader(data, batch_size=batch_size, sampler=sampler)

    begun = loader(4)
    next(iter(begun))
    state = begun.state_dict()
    loader(4).load_state_dict(state)
    for other in (loader(8), loader(4, processes=2)):
        with pytest.raises(ValueError, match="middle of an epoch of batches of 4 in 1 process"):
            other.load_state_dict(state)
        other.load_state_dict({**state, "batches": 0})
