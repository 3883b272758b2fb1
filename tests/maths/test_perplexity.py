"""Perplexity, also where exp overflows."""

from __future__ import annotations

import math

import pytest

from align.maths.perplexity import perplexity


def test_a_uniform_model_has_the_perplexity_of_its_vocabulary():
    assert perplexity(math.log(29)) == pytest.approx(29)
    assert perplexity(0.0) == 1.0


@pytest.mark.parametrize("mean_nll", [700.0, 709.9, 1e6, math.inf])
def test_it_is_finite_for_every_loss(mean_nll):
    assert perplexity(mean_nll) == pytest.approx(1.0142320547350045e304)


def test_nan_stays_nan():
    assert math.isnan(perplexity(math.nan))
