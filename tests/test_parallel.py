"""Processes that train one model together, started as a user starts them."""

import os
import pickle
import subprocess
import sys

import numpy as np
import pytest
from sklearn.datasets import make_moons
from torch import distributed

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
from tests.test_parallel import SETTINGS, moons

torch.set_num_threads(1)
distributed.init_process_group("gloo")
rank, size = distributed.get_rank(), distributed.get_world_size()
density = EBMFlowDensity(distributed=True, **SETTINGS)
X = np.ones((9, 2)) if rank == 1 else moons(9)
try:
    density.fit(X)
except ValueError as error:
    message = str(error)
X = moons(1200)
X = X[:800] if rank == 0 else X[800:]
density.fit(X)
with open(os.path.join(sys.argv[1], str(rank)), "wb") as file:
    pickle.dump((density, message), file)
distributed.destroy_process_group()
"""


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


def test_each_process_has_the_held_out_log_densities_of_its_own_rows(fits):
    assert [len(density.oob_log_density_) for density, _ in fits] == [800, 400]


def test_failure_in_one_process_is_raised_in_all(fits):
    (_, elsewhere), (_, own) = fits
    assert own.startswith("All rows of positive weight are equal")
    assert elsewhere == f"In process 1: {own}"


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
