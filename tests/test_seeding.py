"""What a seed means, how a set is cut into shards, and the examples in docstrings."""

import doctest
import importlib
import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT
from sklearn.datasets import load_digits

from wmdd_core.augmentation import draw_views
from wmdd_core.baselines import noise_images
from wmdd_core.recovery import initial_noise
from wmdd_core.relabeling import ViewSettings, shuffled
from wmdd_core.seeding import derive_seed, torch_generator
from wmdd_core.sharding import shard_members, shard_total
from wmdd_core.sources import drawn_size, open_source
from workflow_scripts.real_images import random_rows


def test_a_seed_means_the_same_numbers_in_every_version():
    """Changed, every result would differ from what was published under the same seed."""
    assert derive_seed(0, "digits", "recover", 3) == 3146561038909401670


def test_streams_have_the_names_that_results_were_published_with():
    order = torch.randperm(20, generator=torch_generator("n", "order", 3))
    assert torch.equal(torch.cat(shuffled(20, 5, ("n",), 3)), order)

    views = ViewSettings(seed=4, crop_scale_min=0.1, flip=True, cutmix=True).views(2, 20, 32)
    generator = torch_generator(4, "label views", 2)
    wanted = draw_views(20, 32, generator, crop_scale_min=0.1, flip=True, cutmix=True)
    assert torch.equal(views.box, wanted.box) and torch.equal(views.partner, wanted.partner)

    noise = torch.randn(2, 3, 4, 4, generator=torch_generator("n", "noise"))
    assert torch.equal(noise_images(2, 4, ("n",)), noise)
    shard = SimpleNamespace(classes=torch.tensor([7]), group=torch.tensor([0]), index=torch.tensor([2]))
    noise = torch.randn(1, 3, 4, 4, generator=torch_generator("n", "noise", 7, 2))
    assert torch.equal(initial_noise(shard, 4, ("n",)), noise)

    store = SimpleNamespace(labels=np.repeat([0, 1], 9))
    order = torch.randperm(9, generator=torch_generator(3, "digits", "select", 1))
    assert torch.equal(random_rows(store, 1, 3, "digits"), 9 + order)

    zeros = {f"digits/{i}" for i in np.flatnonzero(load_digits().target == 0)}
    settings = {"source": "digits", "seed": 3}
    for purpose in ("test", "validation"):
        ranked = sorted(zeros, key=lambda name: derive_seed(3, "digits", purpose, name))
        drawn = set(ranked[: drawn_size(len(zeros), 0.2)])
        assert zeros & set(open_source(settings, "test").names) == drawn
        zeros, settings = zeros - drawn, {**settings, "validation_fraction": 0.2}


@pytest.mark.parametrize(
    ("classes", "ipc", "batch_size"), [(200, 3, 100), (10, 50, 100), (1000, 1, 64), (7, 200, 100)]
)
@pytest.mark.parametrize("layout", ["whole_classes", "one_per_class"])
def test_shards_hold_every_image_once_and_no_more_than_a_batch(classes, ipc, batch_size, layout):
    seen = []
    for shard in range(shard_total(classes, ipc, batch_size, layout)):
        members, numbers = shard_members(classes, ipc, batch_size, layout, shard)
        assert 0 < len(members) * len(numbers) <= max(batch_size, ipc)  # a class is never cut in two
        seen += itertools.product(members, numbers)
    assert sorted(seen) == list(itertools.product(range(classes), range(ipc)))


def test_no_epoch_repeats_another():
    views = ViewSettings(seed=0, crop_scale_min=0.1, flip=True, cutmix=True)
    boxes = [views.views(epoch, 20, 32).box for epoch in range(6)]
    orders = [torch.cat(shuffled(20, 5, ("names",), epoch)) for epoch in range(6)]
    for drawn in (boxes, orders):
        assert not any(torch.equal(one, other) for one, other in itertools.combinations(drawn, 2))


EXAMPLES = [
    str(path.relative_to(ROOT).with_suffix("")).replace("/", ".")
    for folder in ("wmdd_core", "workflow_scripts", "benchmarks")
    for path in sorted((ROOT / folder).glob("*.py"))
    if ">>> " in path.read_text(encoding="utf-8")
]


@pytest.mark.parametrize("module", EXAMPLES)
def test_the_examples_in_docstrings_hold(module):
    found = doctest.testmod(importlib.import_module(module))
    assert found.attempted > 0 and found.failed == 0
