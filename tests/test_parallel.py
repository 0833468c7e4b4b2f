"""Processes that train one model together, started as a user starts them."""

import os
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
from sklearn.datasets import make_moons
from torch import distributed, nn

from sk_ebm import EBMFlowDensity

SETTINGS = {"n_estimators": 2, "max_iter": 20, "random_state": 0}
SCRIPT = """
import os
import pickle
import sys

import numpy as np
import torch
from torch import distributed

from sk_ebm import EBMFlowDensity
from tests.test_parallel import SETTINGS, SplitEnergy, moons

torch.set_num_threads(1)
distributed.init_process_group("gloo")
rank, size = distributed.get_rank(), distributed.get_world_size()
density = EBMFlowDensity(distributed=True, **SETTINGS)
messages = []
X = moons(1200)
# Neither the same number of rows nor rows of the same law.
X = X[X[:, 0].argsort()]
X = X[:800] if rank == 0 else X[800:]
for part, energy in ((np.ones((9, 2)) if rank == 1 else X[:9], None), (X, SplitEnergy)):
    try:
        EBMFlowDensity(distributed=True, energy=energy, **SETTINGS).fit(part)
    except ValueError as error:
        messages.append(str(error))
density.fit(X)
with open(os.path.join(sys.argv[1], str(rank)), "wb") as file:
    pickle.dump((density, messages), file)
distributed.destroy_process_group()
"""


class SplitEnergy(nn.Linear):
    """Energy that is finite where one process has its rows, and infinite where the other has."""

    def __init__(self, n_features):
        super().__init__(n_features, 1)

    def forward(self, z):
        return torch.where(z[..., 0] > 0.5, torch.inf, super().forward(z).squeeze(-1))


def moons(n_rows, seed=0):
    return make_moons(n_rows, noise=0.1, random_state=seed)[0]


@pytest.fixture(scope="module")
def fits(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    script = folder / "train.py"
    script.write_text(SCRIPT)
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", script, folder],
        check=True,
        timeout=300,
        env=os.environ | {"PYTHONPATH": root, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
        capture_output=True,
    )
    return [pickle.loads((folder / str(rank)).read_bytes()) for rank in range(2)]


def test_every_process_ends_with_the_same_model(fits):
    first, second = (density for density, _ in fits)
    rows = moons(100, seed=1)
    np.testing.assert_array_equal(first.score_samples(rows), second.score_samples(rows))
    np.testing.assert_array_equal(first.sample(5, random_state=0), second.sample(5, random_state=0))
    assert str(first.history_) == str(second.history_)
    assert first.log_normalizer_ == second.log_normalizer_


def test_likelihood_is_that_of_one_process_with_all_rows(fits):
    rows = moons(2000, seed=1)
    alone = EBMFlowDensity(**SETTINGS).fit(moons(1200)).score_samples(rows)
    together = fits[0][0].score_samples(rows)
    assert together.mean() == pytest.approx(alone.mean(), abs=0.03)


def test_rows_count_alike_in_whichever_process_they_are(fits):
    last_of_first = np.sort(moons(1200)[:, 0])[799]
    drawn = fits[0][0].sample(20_000, random_state=0)
    assert np.mean(drawn[:, 0] > last_of_first) == pytest.approx(1 / 3, abs=0.03)


def test_each_process_has_the_held_out_log_densities_of_its_own_rows(fits):
    assert [len(density.oob_log_density_) for density, _ in fits] == [800, 400]


def test_failure_in_one_process_is_raised_in_all(fits):
    (_, (elsewhere, first)), (_, (own, second)) = fits
    assert own.startswith("All rows of positive weight are equal")
    assert elsewhere == f"In process 1: {own}"
    assert "energy" in first
    assert first == second


def test_group_of_one_process_is_that_process(tmp_path):
    X = moons(100)
    alone = EBMFlowDensity(n_estimators=2, max_iter=2, random_state=0).fit(X)
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        grouped = EBMFlowDensity(n_estimators=2, max_iter=2, random_state=0, distributed=True).fit(X)
    finally:
        distributed.destroy_process_group()
    np.testing.assert_array_equal(alone.score_samples(X), grouped.score_samples(X))


def test_no_group_is_a_clear_error():
    with pytest.raises(ValueError, match="torchrun"):
        EBMFlowDensity(distributed=True).fit(moons(20))
