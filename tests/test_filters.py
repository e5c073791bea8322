"""Filters: L1 norms, GDP's sums and one order over all layers, against sums by hand."""

from __future__ import annotations

import pytest
import torch

from prfl import saliency
from prfl.cut import Cut
from prfl.types import Group, Member, Tree

PARAMS: Tree = {
    "a.weight": torch.tensor([[1.0, -2.0], [0.5, 0.5], [3.0, 0.0]]),
    "a.bias": torch.tensor([0.0, 2.0, -1.0]),
    "b.weight": torch.tensor([[9.0, 0.1, 0.1], [9.0, 0.1, 0.1]]),
}
REPORT: Tree = {
    "a.weight": torch.tensor([[1.0, 0.5], [1.0, 1.0], [1.0, 7.0]]),
    "a.bias": torch.tensor([5.0, -0.5, 1.0]),
    "b.weight": torch.tensor([[1.0, 0.0, 0.0], [-1.0, 10.0, 10.0]]),
}
HIDDEN = Group(3, (Member("a.weight", 0), Member("a.bias", 0), Member("b.weight", 1)))
LAST = Group(2, (Member("b.weight", 0),))


def test_l1_norms_by_hand() -> None:
    scores = saliency.l1_filter()(PARAMS, None)
    assert scores["a.weight"].tolist() == [[1.5, 1.5], [0.5, 0.5], [1.5, 1.5]]
    assert scores["a.bias"].tolist() == [0.0, 2.0, 1.0]
    assert scores["b.weight"].sum(1).tolist() == pytest.approx([9.2, 9.2])


def test_a_filter_is_ranked_by_itself_and_not_by_who_reads_it() -> None:
    """By the group filter 0 wins for the 9s that read it; by its own norm it ties with filter 2 and comes first."""
    for by, kept in (("group", [0]), ("filter", [2])):
        params = PARAMS | {"a.weight": PARAMS["a.weight"] * torch.tensor([[0.5], [1.0], [1.0]])}
        cut = Cut(unit="channels", by=by, width="linear")  # type: ignore[arg-type]
        ranking = cut.rank(saliency.magnitude()(params, None), params, (HIDDEN,))
        assert ranking.mask(1 / 3).channels[HIDDEN].tolist() == kept


def test_evenly_dealt_norms_rank_by_the_filter_even_among_all_members() -> None:
    params = PARAMS | {"a.weight": PARAMS["a.weight"] * torch.tensor([[0.5], [1.0], [1.0]])}
    ranking = Cut(unit="channels", width="linear").rank(saliency.l1_filter()(params, None), params, (HIDDEN,))
    assert [ranking.mask(k / 3).channels[HIDDEN].tolist() for k in (1, 2)] == [[2], [0, 2]]


def test_gdp_by_hand() -> None:
    """Signs cancel within a filter before the size is taken: |1 - 1 + 0|, |0.5 + 0.5 - 1|, |3 + 0 - 1|."""
    scores = saliency.gdp()(PARAMS, REPORT)
    assert scores["a.weight"].sum(1).tolist() == [0.0, 0.0, 2.0]
    assert scores["b.weight"].sum(1).tolist() == pytest.approx([9.0, 7.0])
    assert saliency.taylor()(PARAMS, REPORT)["a.weight"].sum(1).tolist() == [2.0, 1.0, 3.0]


def test_gdp_scores_a_filter_by_what_was_reported_of_it() -> None:
    report = {k: v.clone() for k, v in REPORT.items()}
    report["a.weight"][0, 1] = torch.nan
    report["a.weight"][2] = torch.nan
    scores = saliency.gdp()(PARAMS, report)["a.weight"]
    assert scores[0].tolist() == [0.5, 0.5]
    assert scores[2].max() < scores[1].min()  # nobody reported it: last


def test_all_filters_of_the_network_in_one_order() -> None:
    """Five filters, scores 0, 0, 2 and 9, 7: three of five are 2, 9 and 7, but every group keeps its best."""
    cut = Cut(unit="channels", spread="model", by="filter", width="linear")
    ranking = cut.rank(saliency.gdp()(PARAMS, REPORT), PARAMS, (HIDDEN, LAST))
    kept = [{g.size: c.tolist() for g, c in ranking.mask(share).channels.items()} for share in (0.1, 0.6, 0.8)]
    assert kept == [{3: [2], 2: [0]}, {3: [2], 2: [0, 1]}, {3: [0, 2], 2: [0, 1]}]


def test_a_filter_that_was_cut_comes_back_when_its_score_grows() -> None:
    cut = Cut(unit="channels", spread="model", by="filter", width="linear")
    for wanted, gradient in ((1, [[0.0, 0.0], [8.0, 8.0], [0.0, 0.0]]), (0, [[8.0, 0.0], [0.0, 0.0], [0.0, 0.0]])):
        report = {"a.weight": torch.tensor(gradient), "b.weight": torch.zeros(2, 3)}
        ranking = cut.rank(saliency.gdp()(PARAMS, report), PARAMS, (HIDDEN, LAST))
        assert ranking.mask(0.4).channels[HIDDEN].tolist() == [wanted]
