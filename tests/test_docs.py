"""The code in the pages runs."""

import re
from pathlib import Path

import numpy as np
import pytest

from sk_ebm import EBMFlowDensity

PAGES = Path(__file__).parents[1] / "docs"


@pytest.fixture(scope="module")
def extending():
    """What the code of the page on extending defines."""
    scope = {}
    for code in re.findall(r"```python\n(.*?)```", (PAGES / "extending.md").read_text(), re.DOTALL):
        definition, _, _ = code.partition("density = ")
        exec(definition, scope)
    return scope


@pytest.mark.parametrize(
    ("parameter", "name", "base"), [("energy", "AdditiveEnergy", "gaussian"), ("base", "fit_logistic", "own")]
)
def test_what_the_page_on_extending_defines_trains(extending, parameter, name, base):
    X = np.random.default_rng(0).logistic(size=(100, 3))
    parameters = {"base": "gaussian", parameter: extending[name]}
    density = EBMFlowDensity(**parameters, n_estimators=2, max_iter=10, random_state=0).fit(X)
    assert density.history_[0]["log_normalizer"] == pytest.approx(0, abs=1e-6)
    assert density.base_["name"] == base
    assert np.isfinite(density.score(X))
    assert np.isfinite(density.sample(100, random_state=0)).all()
