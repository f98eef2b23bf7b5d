"""Random generators derived by name, never from global state or from the order of calls."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch


def derive_seed(*names: object) -> int:
    """Hash `names` (for instance seed, dataset, stage, class, step) to an integer in [0, 2**63).

    >>> derive_seed(0, "digits", "recover", 3) == derive_seed(0, "digits", "recover", 3)
    True
    >>> derive_seed(1, 23) == derive_seed(12, 3)
    False
    """
    text = "\x1f".join(f"{type(name).__name__}:{name}" for name in names)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def numpy_generator(*names: object) -> np.random.Generator:
    """A NumPy generator for `names`; see `derive_seed`."""
    return np.random.default_rng(derive_seed(*names))


def torch_generator(*names: object) -> torch.Generator:
    """A PyTorch CPU generator for `names`; see `derive_seed`.

    Always on the CPU, so that what is drawn is the same on every device. PyTorch's CPU generator heeds the
    lower 32 bits of the seed: of 100,000 names two may share a stream.
    """
    import torch

    return torch.Generator().manual_seed(derive_seed(*names))
