"""The code in the pages runs."""

import re
from pathlib import Path

import numpy as np
import pytest

from sk_ebm import EBMFlowDensity

PAGES = Path(__file__).parents[1] / "docs"


def test_the_energy_of_the_page_on_extending_trains():
    (code,) = re.findall(r"```python\n(.*?)```", (PAGES / "extending.md").read_text(), re.DOTALL)
    definition, _, _ = code.partition("density = ")
    scope = {}
    exec(definition, scope)
    X = np.random.default_rng(0).normal(size=(100, 3))
    density = EBMFlowDensity(
        base="gaussian", energy=scope["AdditiveEnergy"], n_estimators=2, max_iter=10, random_state=0
    ).fit(X)
    assert density.history_[0]["log_normalizer"] == pytest.approx(0, abs=1e-6)
    assert np.isfinite(density.score(X))
