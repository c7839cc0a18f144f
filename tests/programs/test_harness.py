"""The comparison of a published program's outputs with those of its network."""

import numpy as np

from programs.harness import matched


def test_stacked_states_are_compared_with_the_states_even_if_an_output_has_their_shape():
    rng = np.random.default_rng(0)
    h, c = rng.normal(size=(2, 2, 3, 4))
    assert matched([h, *c], c) == 0.0
    assert matched([h, *c], h) == 0.0
    assert matched([h, c[0]], c) > 0.1
