"""Energy-based density estimation, assisted by normalizing flows, with the interface of scikit-learn."""

from sk_ebm._density import EBMFlowDensity, LowEffectiveSampleSizeWarning, TrainingWarning
from sk_ebm._display import DensityDisplay, ProportionsDisplay, TrainingDisplay
from sk_ebm._proportions import ClassProportions, DensityClassifier, ProportionsWarning, class_proportions
from sk_ebm._version import __version__

__all__ = [
    "ClassProportions",
    "DensityClassifier",
    "DensityDisplay",
    "EBMFlowDensity",
    "LowEffectiveSampleSizeWarning",
    "ProportionsDisplay",
    "ProportionsWarning",
    "TrainingDisplay",
    "TrainingWarning",
    "__version__",
    "class_proportions",
]
