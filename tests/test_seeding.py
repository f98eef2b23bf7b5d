"""What a seed means, how a set is cut into shards, and the examples in docstrings."""

import doctest
import importlib
import itertools

import pytest
import torch
from conftest import ROOT

from wmdd_core.relabeling import ViewSettings, shuffled
from wmdd_core.seeding import derive_seed
from wmdd_core.sharding import shard_members, shard_total


def test_a_seed_means_the_same_numbers_in_every_version():
    """Changed, every result would differ from what was published under the same seed."""
    assert derive_seed(0, "digits", "recover", 3) == 3146561038909401670


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
    for folder in ("wmdd_core", "workflow_scripts")
    for path in sorted((ROOT / folder).glob("*.py"))
    if ">>> " in path.read_text(encoding="utf-8")
]


@pytest.mark.parametrize("module", EXAMPLES)
def test_the_examples_in_docstrings_hold(module):
    found = doctest.testmod(importlib.import_module(module))
    assert found.attempted > 0 and found.failed == 0
