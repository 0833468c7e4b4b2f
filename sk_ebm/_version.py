"""Version of the package, and of what a pickled estimator looks like."""

__version__ = "0.1.0"
# Raised when the fitted estimators of this version and those of the last one cannot be exchanged.
STATE_FORMAT = 5
