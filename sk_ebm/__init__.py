"""Energy-based density estimation, assisted by normalizing flows, with the interface of scikit-learn."""

from sk_ebm._density import EBMFlowDensity, LowEffectiveSampleSizeWarning, TrainingWarning

__all__ = ["EBMFlowDensity", "LowEffectiveSampleSizeWarning", "TrainingWarning"]
__version__ = "0.1.0"
