"""Flows that are bases: when one is fitted, what it is worth, and what energies must promise beside it."""

import math
from unittest.mock import Mock

import pytest
import torch

from sk_ebm._base_flows import (
    BaseFlows,
    Lead,
    base_flow_batch_size,
    base_flow_layers,
    base_flow_steps,
    lead_of_flow,
)
from sk_ebm._bases import Bases
from sk_ebm._folds import Folds
from sk_ebm._mixture import Mixture
from sk_ebm._parallel import ALONE


@pytest.mark.parametrize(("n_rows", "n_steps"), [(20, 500), (1000, 500), (2000, 1000), (8000, 2000), (10**6, 8000)])
def test_flows_take_more_steps_where_they_have_more_rows(n_rows, n_steps):
    assert base_flow_steps(n_rows, 120 * 16) in range(n_steps - 1, n_steps + 1)
    # Where energies have hardly any, neither have flows.
    assert base_flow_steps(n_rows, 10) in range(n_steps // 50 - 1, n_steps // 50 + 1)


def test_flows_take_smaller_batches_but_some_row():
    assert [base_flow_batch_size(n) for n in (256, 3, 1)] == [128, 1, 1]


def test_flows_are_deeper_where_rows_are_many():
    assert base_flow_layers(9999) < base_flow_layers(10_000)


def gaussian(scale):
    mean, scale = torch.zeros(1, 1), torch.full((1, 1, 1), scale)
    return Mixture(torch.zeros(1).double(), mean.double(), scale.double())


def two_folds(rows):
    return Folds(rows, torch.ones(len(rows)), torch.arange(len(rows)) // (len(rows) // 2), 2)


def bases_of(data, **scales):
    def bases(density):
        log_prob = torch.stack([density.log_prob(data.rows.double())] * 2)
        return Bases([density] * 2, data.held_out_mean(log_prob))

    return {name: bases(gaussian(scale)) for name, scale in scales.items()}


def test_a_flow_is_worth_what_it_adds_to_the_best_candidate_on_the_rows_it_was_judged_by():
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(400, 1, generator=generator)
    # A few outliers, on fold 0 alone.
    rows[:4] = 30.0
    data = two_folds(rows)
    bases = bases_of(data, gaussian=6.0, mixture=5.0)

    def lead(flow, gain_of_energies=0.0, gain_of_size=0.0):
        return lead_of_flow(flow.float(), bases, {"mixture": gain_of_energies}, data, gain_of_size).value

    # What is of no use has no lead: 200 rows may make it seem some .01 nats better.
    by_chance = 2 / 200
    assert abs(lead(gaussian(5.0)) + by_chance) < 1e-4
    # It knows nearly all rows far better, and yet has the lower likelihood.
    narrow = gaussian(1.0)
    on_fold_0 = rows[:200].double()
    assert narrow.log_prob(on_fold_0).mean() < gaussian(5.0).log_prob(on_fold_0).mean() - 1
    assert lead(narrow) > 0.5
    assert lead(narrow, gain_of_energies=0.5) < lead(narrow) - 0.3
    assert lead(gaussian(5.5), gain_of_size=0.25) > lead(gaussian(5.5)) + 0.001
    # A flow that overflows on every row adds nothing.
    narrow.log_prob = lambda z: torch.full((len(z),), torch.nan)
    assert abs(lead(narrow) + by_chance) < 1e-6


def test_the_lead_is_as_uncertain_as_a_mean_over_so_many_rows():
    leads = []
    for seed in range(200):
        data = two_folds(torch.randn(400, 1, generator=torch.Generator().manual_seed(seed)))
        leads.append(lead_of_flow(gaussian(1.0).float(), bases_of(data, gaussian=2.0), {"gaussian": 0.0}, data))
    spread = torch.tensor([lead.value for lead in leads]).std()
    claimed = torch.tensor([lead.std_error for lead in leads]).mean()
    assert 0.8 < claimed / spread < 1.25


def test_a_lead_that_no_row_tells_is_not_worth_it():
    assert Lead(0.06, 0.1).is_worth_it()
    assert not Lead(0.04, 0.0).is_worth_it()
    assert not Lead(math.nan, math.nan).is_worth_it()


class TestBaseFlows:
    """The first is fitted when the small flow promises, the others when the first keeps the promise."""

    @pytest.fixture
    def data(self):
        return two_folds(torch.randn(400, 1, generator=torch.Generator().manual_seed(0)))

    @pytest.fixture
    def make(self, data):
        """Return what makes flows, given how wide the small one and the large ones are; the rows have scale one."""
        bases = bases_of(data, gaussian=3.0, heavy_tailed_mixture=2.0)

        def make(small, large, n_flows=2):
            fit = Mock()
            made = BaseFlows(lambda: gaussian(large).float(), n_flows, gaussian(small).float(), fit, bases, data, ALONE)
            return made, lambda: [call.args[1] for call in fit.call_args_list]

        return make

    def test_a_small_flow_that_leads_has_the_first_fitted_before_energies(self, make):
        flows, fitted_folds = make(small=1.84, large=1.0)
        rival = flows.rival_score("heavy_tailed_mixture")
        assert fitted_folds() == [[0]]
        base = flows.bases["heavy_tailed_mixture"]
        # Energies have to come near the flow, but for what pays for it and what may be noise.
        gain = float((gaussian(1.0).log_prob(flows.judged.rows[:200].double())).mean())
        gain -= float(base.members[0].log_prob(flows.judged.rows[:200].double()).mean())
        assert base.score < rival < base.score + gain - 0.05
        assert len(flows.fit_if_worth_it({"heavy_tailed_mixture": 0.0})) == 2
        # Nothing is fitted twice.
        assert fitted_folds() == [[0], [1]]

    def test_all_are_fitted_side_by_side_where_the_small_one_leads_for_sure(self, make):
        flows, fitted_folds = make(small=1.2, large=1.0)
        assert flows.rival_score("heavy_tailed_mixture") > flows.bases["heavy_tailed_mixture"].score
        assert len(flows.fit_if_worth_it({"heavy_tailed_mixture": 0.0})) == 2
        assert fitted_folds() == [[0, 1]]
        # They take long to score, so they still have to pay.
        assert flows.fit_if_worth_it({"heavy_tailed_mixture": 1.0}) == []

    def test_energies_that_do_as_well_save_the_other_flows(self, make):
        flows, fitted_folds = make(small=1.84, large=1.0)
        rival = flows.rival_score("heavy_tailed_mixture")
        assert flows.fit_if_worth_it({"heavy_tailed_mixture": 1.0}) == []
        assert fitted_folds() == [[0]]
        # What ends energies would not have saved them.
        gain = rival - flows.bases["heavy_tailed_mixture"].score
        assert len(flows.fit_if_worth_it({"heavy_tailed_mixture": gain})) == 2

    def test_a_small_flow_that_only_promises_waits_for_energies(self, make):
        flows, fitted_folds = make(small=1.9, large=1.0)
        assert flows.rival_score("heavy_tailed_mixture") == -math.inf
        assert fitted_folds() == []
        assert len(flows.fit_if_worth_it({"heavy_tailed_mixture": 0.0})) == 2
        assert fitted_folds() == [[0], [1]]

    def test_no_flow_is_fitted_where_none_promises_or_none_can_be_a_base(self, make):
        for flows, fitted_folds in (make(small=2.0, large=1.0), make(small=1.0, large=1.0, n_flows=0)):
            assert flows.rival_score("heavy_tailed_mixture") == -math.inf
            assert flows.fit_if_worth_it({"heavy_tailed_mixture": 0.3}) == []
            assert fitted_folds() == []
