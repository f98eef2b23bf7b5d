"""Training from files and teachers of the user's: what large datasets and users' own work need."""

import os
import subprocess
import sys
import urllib.error
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torchvision
from conftest import ROOT
from PIL import Image
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms.functional import resized_crop

from wmdd_core import training
from wmdd_core.augmentation import draw_crop, normalise
from wmdd_core.data import ImageStore
from wmdd_core.errors import UserError
from wmdd_core.models import build_model
from wmdd_core.progress import STOPS
from wmdd_core.seeding import torch_generator
from wmdd_core.sources import UnreadableImage, open_source
from wmdd_core.training import FileCrops, file_batches
from workflow_scripts import real_images
from workflow_scripts.pretrain_teacher import load_published

MEAN, STD = torch.tensor([0.5, 0.5, 0.5]), torch.tensor([0.25, 0.25, 0.25])


@pytest.fixture
def source(tmp_path):
    for split, count in (("train", 7), ("test", 2)):
        for label, name in enumerate(("a b", "ü")):
            folder = tmp_path / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = np.full((30 + i, 50, 3), 100 * label + i, dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.png")
    settings = {"source": "imagefolder", "root": str(tmp_path), "resolution": 16, "seed": 0}
    return open_source(settings, "train")


def test_each_file_is_seen_once_in_an_epoch_with_its_label(source):
    crops = FileCrops(source, 16, (0, "names"), 0.3, True)
    device = torch.device("cpu")
    for workers in (1, 2):
        batches = file_batches(crops, 4, MEAN, STD, workers=workers, device=device)
        images, labels = (torch.cat(parts) for parts in zip(*batches(3), strict=True))
        values = (images.mean((1, 2, 3)) * 0.25 + 0.5).mul(255).round().long()  # each file has one grey
        order = torch.randperm(14, generator=torch_generator(0, "names", "epoch", 3))
        assert torch.equal(values, torch.tensor([*range(7), *range(100, 107)])[order])
        assert torch.equal(labels, (values >= 100).long())


def test_an_item_is_the_drawn_crop_of_its_image_upright_or_mirrored(tmp_path):
    """Images whose every pixel differs: a grey one looks the same however it is cut."""
    for label, name in enumerate("ab"):
        for split in ("train", "test"):
            (tmp_path / split / name).mkdir(parents=True)
            pixels = np.random.default_rng(label).integers(0, 256, (40, 60, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / split / name / "0.png")
    settings = {"source": "imagefolder", "root": str(tmp_path), "resolution": 16, "seed": 0}
    source, mirrored = open_source(settings, "train"), set()
    crops = FileCrops(source, 16, (0, "names"), 0.3, True)
    items = [(epoch, i) for epoch in range(8) for i in range(2)]
    for epoch, i in items:
        image, generator = source.image(i), torch_generator(0, "names", "crop", epoch, i)
        cut = resized_crop(image, *draw_crop(40, 60, 0.3, generator), [16, 16])
        wanted, (found, label) = torch.from_numpy(np.array(cut)).permute(2, 0, 1), crops[epoch, i]
        flipped = bool(torch.rand((), generator=generator) < 0.5)
        assert label == i and torch.equal(found, wanted.flip(-1) if flipped else wanted)
        mirrored.add(flipped)
    assert mirrored == {False, True}
    assert len({crops[item][0].numpy().tobytes() for item in items}) == len(items)


def test_without_flips_no_item_is_mirrored():
    ramp = Image.fromarray(np.tile(np.arange(0, 240, 4, dtype=np.uint8)[None, :, None], (40, 1, 3)))
    crops = FileCrops(SimpleNamespace(image=lambda _: ramp, labels=[0]), 16, (0, "names"), 0.3, False)
    assert all((crops[epoch, 0][0].float().diff(dim=-1) >= 0).all() for epoch in range(12))


@pytest.mark.parametrize(("height", "width"), [(30, 40), (6, 9)], ids=["shrunk", "enlarged"])
def test_a_crop_shows_nothing_of_what_is_around_it(height, width, monkeypatch):
    """Bright noise amid black: a filter that reaches beyond the crop darkens its edges."""
    pixels = np.zeros((50, 70, 3), dtype=np.uint8)
    pixels[8 : 8 + height, 11 : 11 + width] = np.random.default_rng(0).integers(200, 256, (height, width, 3))
    image, box = Image.fromarray(pixels), (8, 11, height, width)
    monkeypatch.setattr(training, "draw_crop", lambda *_: box)
    crops = FileCrops(SimpleNamespace(image=lambda _: image, labels=[0]), 16, (0, "names"), 0.3, False)
    found = crops[0, 0][0].permute(1, 2, 0).numpy()
    np.testing.assert_array_equal(found, np.array(resized_crop(image, *box, [16, 16])))
    assert found.min() >= 200


def test_workers_and_repetition_change_no_pixel(source):
    crops = FileCrops(source, 16, (0, "names"), 0.3, True)
    one, two = (
        torch.cat([x for x, _ in file_batches(crops, 5, MEAN, STD, workers=w, device=torch.device("cpu"))(1)])
        for w in (1, 2)
    )
    assert torch.equal(one, two)
    other = torch.cat(
        [x for x, _ in file_batches(crops, 5, MEAN, STD, workers=1, device=torch.device("cpu"))(2)]
    )
    assert not torch.equal(one, other)


@pytest.mark.parametrize("device, threads", [("cpu", 1), ("cuda", 3)])
def test_beside_decoding_processes_a_network_on_a_cpu_has_one_thread(device, threads):
    """Or how many processes may decode, which the number of cores decides, would change its rounding."""
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        real_images.leave_cores_to_decoding(torch.device(device))
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)


def test_crops_of_any_shape_are_distributed_as_torchvisions():
    ours = torch.tensor([draw_crop(300, 500, 0.08, torch_generator(i)) for i in range(4000)]).double()
    torch.manual_seed(0)
    image = torch.zeros(3, 300, 500)
    theirs = [RandomResizedCrop.get_params(image, [0.08, 1.0], [3 / 4, 4 / 3]) for _ in range(4000)]
    theirs = torch.tensor(theirs).double()
    top, left, height, width = ours.T
    assert (top >= 0).all() and (top + height <= 300).all() and (left + width <= 500).all()
    # Two samples of 4,000: four standard errors of their difference.
    tolerance = 4 * theirs.std(0) * (2 / 4000) ** 0.5
    assert ((ours.mean(0) - theirs.mean(0)).abs() < tolerance).all()
    assert draw_crop(1, 1, 0.08, torch_generator(0)) == (0, 0, 1, 1)


@pytest.mark.parametrize("scale_min", [0.9, 1.0])
@pytest.mark.parametrize(("height", "width"), [(50, 200), (201, 50), (7, 3)])
def test_where_no_crop_fits_it_is_the_middle_as_torchvisions(height, width, scale_min):
    """Such shares of such images are higher or wider than the image at every aspect ratio drawn."""
    image = torch.zeros(3, height, width)
    wanted = RandomResizedCrop.get_params(image, [scale_min, 1.0], [3 / 4, 4 / 3])
    assert draw_crop(height, width, scale_min, torch_generator(0)) == wanted != (0, 0, height, width)


@pytest.mark.parametrize(("height", "width"), [(30, 40), (40, 30), (33, 33)])
def test_without_a_smaller_share_a_crop_is_an_image_that_is_not_too_wide_or_tall(height, width):
    assert draw_crop(height, width, 1.0, torch_generator(0)) == (0, 0, height, width)


def test_a_teacher_of_the_users_is_loaded_strictly(tmp_path):
    made = build_model("convnet", 10, 16, seed=3, width=8)
    path = tmp_path / "teacher.pt"
    torch.save({"state_dict": {f"module.{k}": v for k, v in made.state_dict().items()}}, path)
    loaded = build_model("convnet", 10, 16, seed=4, width=8)
    load_published(loaded, "convnet", str(path))
    for name, value in made.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value)
    with pytest.raises(UserError, match=r"of another shape: classifier.bias \(10,\) instead of \(7,\)"):
        load_published(build_model("convnet", 7, 16, seed=0, width=8), "convnet", str(path))
    with pytest.raises(UserError, match="there is no file"):
        load_published(loaded, "convnet", str(tmp_path / "none.pt"))


@pytest.mark.parametrize("content", ["a whole network", "cut off", "a list"])
def test_a_file_that_holds_no_weights_is_told_in_one_line(tmp_path, content):
    path, made = tmp_path / "teacher.pt", build_model("convnet", 10, 16, seed=3, width=8)
    torch.save({"a whole network": made, "a list": [1, 2]}.get(content, made.state_dict()), path)
    if content == "cut off":
        path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(UserError, match=r"^[^\n]*teacher.pt holds no weights that can be read [^\n]*$"):
        load_published(made, "convnet", str(path))


def test_weights_that_cannot_be_fetched_are_told(monkeypatch):
    def unreachable(*_: object, **__: object) -> None:
        raise urllib.error.URLError("Name or service not known")

    monkeypatch.setattr(torchvision.models, "get_model", unreachable)
    with pytest.raises(UserError, match=r"cannot be fetched .*TORCH_HOME"):
        load_published(build_model("resnet18", 10, 32, seed=0), "resnet18", "torchvision")


class Unreadable(torch.utils.data.Dataset):
    """As a dataset of files of which one is damaged."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, i: int) -> int:
        if i == 3:
            raise UnreadableImage("photos/3.jpg", "3.jpg", "truncated: no end")
        return i


@pytest.mark.parametrize("workers", [0, 2])
def test_a_damaged_file_is_told_in_one_line_by_decoding_processes_too(workers):
    with pytest.raises(UnreadableImage) as caught:
        list(torch.utils.data.DataLoader(Unreadable(), num_workers=workers))
    told = "photos/3.jpg cannot be read as an image (truncated: no end); replace or remove it"
    assert str(caught.value).startswith(told) and "\n" not in str(caught.value)


def test_a_pickle_is_not_executed(tmp_path):
    class Harmful:
        def __reduce__(self):
            return open, (str(tmp_path / "executed"), "w")

    torch.save({"classifier.weight": Harmful()}, tmp_path / "harmful.pt")
    model = build_model("convnet", 10, 16, seed=0, width=8)
    with pytest.raises(Exception, match="(?i)weights.only|unsupported"):
        load_published(model, "convnet", str(tmp_path / "harmful.pt"))
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("workers", [1, 2])
def test_images_are_read_in_order_from_any_start_by_any_number_of_processes(source, workers, monkeypatch):
    monkeypatch.setattr(real_images, "IMAGES_PER_PASS", 4)
    store = ImageStore.from_source(source, 16)
    description = {"mean": MEAN.tolist(), "std": STD.tolist()}
    wanted = normalise(store.read(slice(None)), MEAN, STD)
    for start in (0, 5):
        passes = list(real_images.in_order(store, description, torch.device("cpu"), start, workers))
        positions, images, labels = zip(*passes, strict=True)
        assert positions == tuple(range(start, 14, 4))
        assert torch.equal(torch.cat(images), wanted[start:])
        assert torch.cat(labels).tolist() == store.labels[start:].tolist()


READING = """
import signal, sys, time
from types import SimpleNamespace
import numpy as np, torch
from PIL import Image
from wmdd_core.training import FileCrops, file_batches

def image(i):
    time.sleep(0.05)
    return Image.fromarray(np.zeros((16, 16, 3), np.uint8))

signal.signal(int(sys.argv[1]), lambda *_: None)  # as a job that will save its state
class Source(SimpleNamespace):
    def __len__(self):
        return 24
crops = FileCrops(Source(image=image, labels=[0] * 24), 16, (0, "names"), 0.5, False)
batches = file_batches(crops, 2, torch.zeros(3), torch.ones(3), workers=2, device=torch.device("cpu"))
for number, _ in enumerate(batches(0)):
    print(number, flush=True)
"""


@pytest.mark.parametrize("number", STOPS)
def test_processes_that_decode_go_on_when_the_job_is_told_to_stop(number):
    """The batch that is being read is of the step that ends before the state is saved."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    pipe, command = subprocess.PIPE, [sys.executable, "-c", READING, str(int(number))]
    job = subprocess.Popen(command, stdout=pipe, start_new_session=True, env=environment, text=True)
    assert job.stdout.readline() == "0\n"
    os.killpg(job.pid, number)
    # Not by `communicate`, which loses what came in one piece with the first line.
    assert job.stdout.read().split() == [str(n) for n in range(1, 12)]
    assert job.wait(timeout=60) == 0
