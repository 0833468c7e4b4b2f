"""Draws from any density with `sample`, whatever the details of its signature."""

import copy
import inspect
from typing import Any

import numpy as np


def draw_samples(density: Any, n_samples: int, random_state: Any) -> np.ndarray:
    """Draw rows from a fitted density, shape (n_samples, n_features).

    GaussianMixture returns a tuple and keeps its `random_state` to itself; KernelDensity and others take one.
    """
    if not hasattr(density, "sample"):
        raise TypeError(
            f"{type(density).__name__} has no `sample`. Pass the fitted density itself, such as the last step of a "
            "pipeline, and what belongs to it in its units."
        )
    options = {}
    if "random_state" in inspect.signature(density.sample).parameters:
        options["random_state"] = random_state
    elif random_state is not None and hasattr(density, "get_params") and "random_state" in density.get_params():
        density = copy.copy(density).set_params(random_state=random_state)
    drawn = density.sample(n_samples, **options)
    return drawn[0] if isinstance(drawn, tuple) else drawn
