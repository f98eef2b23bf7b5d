"""PyTorch's SGD, Adam and AdamW, without the compiler that they would import.

Some of their methods are wrapped for the sake of `torch.compile`, and the wrappers import it when they are
first called: 1.7 s and 150 MB in every process, for nothing that is used here. Below them the methods are the
same.
"""

from __future__ import annotations

import inspect

import torch

WRAPPED = ("add_param_group", "load_state_dict", "state_dict", "zero_grad")
"""Methods of `torch.optim.Optimizer` beside `step`, which is wrapped for each kind."""


def _unwrapped(kind: type[torch.optim.Optimizer]) -> type[torch.optim.Optimizer]:
    """`kind` as it is below the wrappers; those of `step` also switch gradients off."""
    methods = {name: inspect.unwrap(getattr(kind, name)) for name in WRAPPED}
    return type(kind.__name__, (kind,), {**methods, "step": torch.no_grad()(inspect.unwrap(kind.step))})


SGD, Adam, AdamW = map(_unwrapped, (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW))
