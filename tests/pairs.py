"""Parametrises a test with few of all combinations of its options; the others are slow tests."""

import itertools
import random

import pytest


def few(axes, also=()):
    """Return few combinations of values in which every pair of values of two axes occurs.

    `axes` has the values of each axis. Every combination of the axes `also`, by their places, occurs too. Combinations
    are chosen in a fixed random order, first those that have the most of what still has to occur.
    """
    parts = [*itertools.combinations(range(len(axes)), 2), *([also] if also else [])]
    missing = {(part, *values) for part in parts for values in itertools.product(*(range(len(axes[n])) for n in part))}
    every = list(itertools.product(*(range(len(axis)) for axis in axes)))
    random.Random(0).shuffle(every)
    chosen = set()
    for most in range(len(parts), 0, -1):
        for one in every:
            new = missing.intersection((part, *(one[n] for n in part)) for part in parts)
            if len(new) >= most:
                missing -= new
                chosen.add(one)
    return chosen


def name_of(value):
    return getattr(value, "__name__", str(value))


def parametrize(names, *axes, also=(), indirect=("isa",)):
    """Return `pytest.mark.parametrize` over all combinations, of which those that `few` leaves out are slow.

    `names` are the arguments, comma-separated; those in `indirect` are fixtures.
    """
    chosen = few(axes, also)
    cases = [
        pytest.param(
            *(axis[n] for axis, n in zip(axes, places, strict=True)),
            marks=() if places in chosen else pytest.mark.slow,
            id="-".join(name_of(axis[n]) for axis, n in zip(axes, places, strict=True)),
        )
        for places in itertools.product(*(range(len(axis)) for axis in axes))
    ]
    return pytest.mark.parametrize(names, cases, indirect=list(indirect))
