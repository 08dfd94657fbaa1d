"""Seeded, stratified choices of samples by label."""

from collections.abc import Hashable, Iterable, Sequence

import numpy as np


def hold_out(labels: Sequence[int], fraction: float, seed: int) -> tuple[list[int], list[int]]:
    """Split the indices of `labels` in (kept, held out), taking the same share of each class."""
    held: list[int] = []
    for members in _by_class(labels, seed):
        count = min(max(1, round(fraction * len(members))), len(members) - 1)
        held += members[:count]
    if not held:
        raise ValueError(
            "cannot hold out a validation or test split: no class has more than one image; "
            "add images, or make the split a folder of its own"
        )
    chosen = set(held)
    return [i for i in range(len(labels)) if i not in chosen], sorted(held)


def hold_out_groups(sizes: Sequence[int], fraction: float, seed: int) -> set[int]:
    """Choose groups to hold out whole, in an order drawn from the seed, while there is room.

    Args:
        sizes: Of each group; there are two at least.
        fraction: Share of all members to hold out, below a half; at least one group is.
        seed: Decides the order.
    """
    room = max(round(fraction * sum(sizes)), min(sizes))
    held = set()
    for group in _by_class([0] * len(sizes), seed)[0]:
        if sizes[group] <= room:
            held.add(group)
            room -= sizes[group]
    return held


def linked(sets: Iterable[Sequence[Hashable]]) -> tuple[list[int], list[int]]:
    """Number the groups of sets that share members, with each other or through others.

    Returns:
        The group of each set, and how many members each group has.
    """
    above: dict[Hashable, Hashable] = {}  # of each member another of its group, or itself

    def top(member: Hashable) -> Hashable:
        while above.setdefault(member, member) != member:
            above[member] = above[above[member]]  # shortens the way of those who come later
            member = above[member]
        return member

    first = []
    for members in sets:
        for member in members:
            above[top(member)] = top(members[0])
        first.append(members[0])
    numbers: dict[Hashable, int] = {}
    groups = [numbers.setdefault(top(member), len(numbers)) for member in first]
    sizes = [0] * len(numbers)
    for member in list(above):
        sizes[numbers[top(member)]] += 1
    return groups, sizes


def few_shot(labels: Sequence[int], count: int, seed: int, class_names: Sequence[str]) -> list[int]:
    """Choose `count` indices of each class; a smaller count gives a part of a larger one's."""
    if count < 1:
        raise ValueError(f"samples_per_class={count}: give at least 1, or leave it out for all")
    groups = list(_by_class(labels, seed))
    smallest = min(groups, key=len)
    if len(smallest) < count:
        raise ValueError(
            f"samples_per_class={count}, but class {class_names[labels[smallest[0]]]!r} has only "
            f"{len(smallest)} training images; give {len(smallest)} or fewer"
        )
    return sorted(i for members in groups for i in members[:count])


def _by_class(labels: Sequence[int], seed: int) -> list[list[int]]:
    """The indices of each class that occurs, in an order drawn from the seed."""
    every = np.asarray(labels)
    groups = []
    for label in np.unique(every):
        rng = np.random.default_rng((seed, int(label)))
        groups.append(rng.permutation(np.flatnonzero(every == label)).tolist())
    return groups
