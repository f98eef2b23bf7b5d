"""Names of the terms of recovery's loss: what the configuration says, without importing PyTorch."""

SET_TERMS = ("mmd_linear", "mmd_rbf", "sliced_wasserstein")
"""Feature terms that compare a class's set of features with a mini-batch of its real ones."""
FEATURE_TERMS = ("barycenter", "cross_entropy", *SET_TERMS, "none")
BN_TERMS = ("per_class", "global", "none")
LOSS_FORMS = ("paper", "released")
