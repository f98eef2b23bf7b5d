"""The optimisers against PyTorch's own, and what they import."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from benchmarks.startup import imported_by
from wmdd_core import optimizers
from wmdd_core.seeding import torch_generator

KINDS = {
    "SGD": {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01},
    "Adam": {"lr": 0.1, "betas": (0.5, 0.9), "fused": True},
    "AdamW": {"lr": 0.1, "weight_decay": 0.1, "fused": True},
}


def steps(optimizer: torch.optim.Optimizer, network: nn.Module, first: int, last: int) -> None:
    for step in range(first, last):
        x = torch.randn(8, 5, generator=torch_generator("optimizers", step))
        optimizer.zero_grad(set_to_none=True)
        network(x).square().sum().backward()
        optimizer.step()
        assert network.weight.requires_grad and torch.is_grad_enabled()


@pytest.mark.parametrize("kind", KINDS)
def test_steps_and_states_are_those_of_pytorch(kind):
    """Three steps, and three more from a state that the other one saved."""

    def built(module) -> tuple[nn.Linear, torch.optim.Optimizer]:
        torch.manual_seed(0)
        network = nn.Linear(5, 3)
        return network, getattr(module, kind)(network.parameters(), **KINDS[kind])

    pairs = [built(module) for module in (optimizers, torch.optim)]
    start = pairs[0][0].weight.detach().clone()
    for network, optimizer in pairs:
        steps(optimizer, network, 0, 3)
    (ours, own), (theirs, other) = pairs
    assert torch.equal(ours.weight, theirs.weight) and not torch.equal(ours.weight, start)
    states = own.state_dict(), other.state_dict()
    torch.testing.assert_close(*states, rtol=0, atol=0)
    for (network, optimizer), state in zip(pairs, reversed(states), strict=True):
        optimizer.load_state_dict(state)
        steps(optimizer, network, 3, 6)
    assert torch.equal(ours.weight, theirs.weight) and torch.equal(ours.bias, theirs.bias)


JOBS = {
    "training": """
import torch
from torch import nn
from wmdd_core.training import Schedule, fit

for kind in ("sgd", "adam", "adamw"):
    batch = torch.randn(4, 5), torch.zeros(4, dtype=torch.int64)
    fit(nn.Linear(5, 3), Schedule(2, kind, 0.1), lambda epoch: [batch], nn.functional.cross_entropy)
""",
    "recovery": """
import torch
from torch import nn
from wmdd_core.models import build_model, freeze
from wmdd_core.recovery import RecoverySettings, Shard, recover_images

model = freeze(build_model("convnet", 2, 8, seed=0, width=4))
classes = torch.arange(2)
shard = Shard(classes, classes, torch.zeros(2).long(), torch.ones(2), {}, torch.zeros(2, 4))
settings = RecoverySettings(iterations=2, learning_rate=0.1, lambda_bn=0, bn_term="none")
names = {"mean": torch.full((3,), 0.5), "std": torch.ones(3), "seed_names": (0,)}
recover_images(model, shard, settings, resolution=8, **names, device=torch.device("cpu"))
""",
    "gradient matching": """
import torch
from wmdd_core.baselines import DcSettings, distil_dc
from wmdd_core.models import build_model

def real(label, count, generator):
    return torch.randn(count, 3, 8, 8, generator=generator)

def network(seed):
    return build_model("convnet", 2, 8, seed=seed, width=4)

settings = DcSettings(outer_loops=2, inner_steps=1, iterations=1, real_batch=4)
distil_dc(real, torch.zeros(2, 3, 8, 8), torch.arange(2), network, settings, (0,))
""",
}


@pytest.mark.parametrize("job", JOBS)
def test_no_job_imports_the_compiler(job):
    """It takes longer to import than the rest of PyTorch."""
    assert "torch._dynamo" not in imported_by(JOBS[job])
