"""Staleness: laws over the table, golden values, errors."""

from itertools import pairwise
from math import inf, nan

import pytest

from prfl import staleness


@pytest.mark.parametrize("name", staleness.TABLE)
def test_fresh_is_one_and_age_never_helps(name: str):
    values = [staleness.TABLE[name]()(age) for age in range(50)]
    assert values[0] == 1.0
    assert all(0 < late <= soon for soon, late in pairwise(values))


def test_golden_values():
    assert [staleness.polynomial(1.0)(s) for s in (0, 1, 3)] == [1.0, 0.5, 0.25]
    assert staleness.polynomial(0.5)(3) == 0.5
    assert [staleness.hinge(a=10, b=4)(s) for s in (4, 5, 14)] == [1.0, 1 / 11, 1 / 101]
    assert staleness.constant()(1000) == 1.0


def test_pr_fl_counts_from_one():
    """PR-FL: t = max(n - v, 1), s = t ** -0.6; a client that keeps pace has t = 1."""
    for t in (1, 2, 5):
        assert staleness.PR_FL(t - 1) == t**-0.6


@pytest.mark.parametrize(("part", "field"), [("polynomial", "a"), ("hinge", "a"), ("hinge", "b")])
@pytest.mark.parametrize("value", [-1.0, inf, nan])
def test_refuses(part: str, field: str, value: float):
    with pytest.raises(ValueError, match=f"{part}: {field} must be 0 or more, got"):
        staleness.TABLE[part](**{field: value})
