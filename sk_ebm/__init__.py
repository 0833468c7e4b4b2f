"""Energy-based density estimation, assisted by normalizing flows, with the interface of scikit-learn."""

from sk_ebm._density import EBMFlowDensity, LowEffectiveSampleSizeWarning, TrainingWarning
from sk_ebm._display import DensityDisplay, ProportionsDisplay, TrainingDisplay
from sk_ebm._proportions import ClassProportions, DensityClassifier, ProportionsWarning, class_proportions

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
    "class_proportions",
]
__version__ = "0.1.0"
