"""Parametrises a test with few of all combinations of its options, or few seeds; the others are slow tests."""

import itertools
import random

import pytest


def few(every, lengths, also=(), unpaired=()):
    """Return few of the combinations `every`, in which every pair of values of two axes occurs.

    A combination has the index of a value for each axis; `lengths` has the numbers of values. Every combination of the
    axes `also`, by their places, occurs too. Of the axes `unpaired`, every value occurs, with any values of the others.
    Combinations are chosen in a fixed random order, first those that have the most of what still has to occur.
    """
    paired = [n for n in range(len(lengths)) if n not in unpaired]
    parts = [*itertools.combinations(paired, 2), *((n,) for n in range(len(lengths))), *([also] if also else [])]
    missing = {(part, *values) for part in parts for values in itertools.product(*(range(lengths[n]) for n in part))}
    occurring = [
        (one, {(part, *(one[n] for n in part)) for part in parts}) for one in random.Random(0).sample(every, len(every))
    ]
    chosen = set()
    for most in range(len(parts), 0, -1):
        for one, occurs in occurring:
            new = missing & occurs
            if len(new) >= most:
                missing -= new
                chosen.add(one)
    return chosen


def name_of(value):
    return getattr(value, "__name__", str(value))


def parametrize(names, *axes, also=(), unpaired=(), unless=lambda *values: False, indirect=()):
    """Return `pytest.mark.parametrize` over all combinations, of which those that `few` leaves out are slow.

    `names` are the arguments, comma-separated; those in `indirect` are fixtures. Combinations for which `unless` holds
    don't exist.
    """
    lengths = [len(axis) for axis in axes]
    at = lambda places: [axis[n] for axis, n in zip(axes, places, strict=True)]  # noqa: E731
    every = [places for places in itertools.product(*map(range, lengths)) if not unless(*at(places))]
    chosen = few(every, lengths, also, unpaired)
    cases = [
        pytest.param(
            *at(places),
            marks=() if places in chosen else pytest.mark.slow,
            id="-".join(map(name_of, at(places))),
        )
        for places in every
    ]
    return pytest.mark.parametrize(names, cases, indirect=list(indirect))


def seeds(few, many):
    """Return `pytest.mark.parametrize` over `many` seeds, of which all but the first `few` are slow."""
    cases = [pytest.param(seed, marks=() if seed < few else pytest.mark.slow) for seed in range(many)]
    return pytest.mark.parametrize("seed", cases)
