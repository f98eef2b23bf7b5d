"""Soft labels: the student sees, bit for bit, the views that were labelled, with the logits of each."""

import json
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from wmdd_core.artifacts import make_header, write_json, write_tensors
from wmdd_core.augmentation import view_batch
from wmdd_core.device import precision
from wmdd_core.errors import UserError
from wmdd_core.models import batchnorm_layers, build_model, freeze
from wmdd_core.progress import Progress
from wmdd_core.relabeling import (
    ViewSettings,
    hard_label_batches,
    label_views,
    mixed_label_loss,
    shuffled,
    soft_label_batches,
    soft_label_loss,
)
from wmdd_core.seeding import torch_generator

COUNT, CLASSES, RESOLUTION, EPOCHS = 11, 4, 8, 3
MEAN, STD = torch.tensor([0.4, 0.5, 0.6]), torch.tensor([0.2, 0.25, 0.3])
IMAGES = torch.randint(
    0, 256, (COUNT, 3, RESOLUTION, RESOLUTION), generator=torch_generator("distilled"), dtype=torch.uint8
)
CLASS = torch.arange(COUNT) % CLASSES
WEIGHTS = torch.linspace(0.5, 1.5, COUNT)
VIEWS = ViewSettings(seed=0, crop_scale_min=0.1, flip=True, cutmix=True)


class Killed(Exception):
    pass


@pytest.fixture
def teacher():
    model = build_model("convnet", CLASSES, RESOLUTION, seed=3, width=6, depth=2)
    for layer in batchnorm_layers(model).values():  # as if trained: running statistics unlike a batch's
        torch.nn.init.uniform_(layer.running_mean, -1, 1, generator=torch_generator("mean"))
        torch.nn.init.uniform_(layer.running_var, 0.5, 2, generator=torch_generator("var"))
    return freeze(model)


def labelled(
    teacher, settings: ViewSettings = VIEWS, epochs: int = EPOCHS, images=IMAGES, **more
) -> np.ndarray:
    labels = np.full((epochs, len(images), CLASSES), np.nan, dtype=np.float16)
    label_views(teacher, images, settings, MEAN, STD, labels, **more)
    assert np.isfinite(labels).all()
    return labels


def as_shown(batches, epoch: int, size: int = COUNT) -> list[torch.Tensor]:
    """What a student sees in an epoch, put back into the order of the images."""
    order = torch.cat(shuffled(COUNT, size, ("s",), epoch))
    return [torch.cat(parts)[order.argsort()] for parts in zip(*batches(epoch), strict=True)]


# ---- views and logits belong together ----------------------------------------------------------


@pytest.mark.parametrize("cutmix", [True, False])
@pytest.mark.parametrize("size", [2, 3, 5, 11, 100])
def test_the_student_sees_the_labelled_views_with_their_logits(teacher, size, cutmix):
    settings = ViewSettings(seed=0, crop_scale_min=0.1, flip=True, cutmix=cutmix)
    seen: list[torch.Tensor] = []
    hook = teacher.register_forward_pre_hook(lambda _m, inputs: seen.append(inputs[0].clone()))
    labels = labelled(teacher, settings, batch_size=4)
    hook.remove()
    by_epoch = torch.cat(seen).split(COUNT)  # what the teacher was shown

    batches = soft_label_batches(IMAGES, WEIGHTS, labels, settings, size, MEAN, STD, ("s",))
    for epoch in range(EPOCHS):
        inputs, logits, weights = as_shown(batches, epoch, size)
        assert torch.equal(inputs, by_epoch[epoch])
        assert torch.equal(logits, torch.from_numpy(labels[epoch]).float())
        assert torch.equal(weights, WEIGHTS)
        # And the teacher, asked again about what the student sees, says the same to float16's last digit.
        torch.testing.assert_close(teacher(inputs), logits, rtol=1e-3, atol=1e-4)


def test_rounded_logits_of_the_students_view_are_the_stored_bits(teacher):
    labels = labelled(teacher, batch_size=COUNT)
    batches = soft_label_batches(IMAGES, WEIGHTS, labels, VIEWS, 4, MEAN, STD, ("s",))
    for epoch in range(EPOCHS):
        inputs, logits, _ = as_shown(batches, epoch, 4)
        assert torch.equal(teacher(inputs).half(), logits.half())


def test_online_labels_are_the_stored_ones(teacher):
    labels = labelled(teacher, batch_size=COUNT)
    stored = soft_label_batches(IMAGES, WEIGHTS, labels, VIEWS, 4, MEAN, STD, ("s",))
    online = soft_label_batches(IMAGES, WEIGHTS, teacher, VIEWS, 4, MEAN, STD, ("s",))
    for epoch in range(EPOCHS):
        for one, other in zip(stored(epoch), online(epoch), strict=True):
            assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
            assert not other[1].requires_grad


@pytest.mark.parametrize("resolution", [16, 33, 64])
def test_views_are_the_same_bits_in_any_batch_at_any_size(resolution):
    """Matrix products may take another path for another batch; then the student would see other pixels."""
    images = torch.randint(
        0, 256, (9, 3, resolution, resolution), generator=torch_generator("x"), dtype=torch.uint8
    )
    views = VIEWS.views(0, 9, resolution)
    whole = view_batch(images, views, torch.arange(9), MEAN, STD)
    for chosen in ([4], [8, 2], [7, 6, 5, 0]):
        assert torch.equal(view_batch(images, views, torch.tensor(chosen), MEAN, STD), whole[chosen])


def test_each_epoch_has_its_own_views_and_seeds_matter(teacher):
    first, second = (VIEWS.views(epoch, COUNT, RESOLUTION) for epoch in (0, 1))
    for name in ("box", "flip", "partner", "patch"):
        assert not torch.equal(getattr(first, name), getattr(second, name))
        again = VIEWS.views(0, COUNT, RESOLUTION)
        assert torch.equal(getattr(first, name), getattr(again, name))
    labels = labelled(teacher)
    assert not np.array_equal(labels[0], labels[1])
    other = ViewSettings(seed=1, crop_scale_min=0.1, flip=True, cutmix=True)
    assert not np.array_equal(labelled(teacher, other)[0], labels[0])
    assert np.array_equal(labelled(teacher), labels)
    assert np.array_equal(labelled(teacher, epochs=1)[0], labels[0])  # more epochs change no earlier one


def test_labels_do_not_depend_on_the_batch_size(teacher):
    wanted = labelled(teacher).astype(np.float32)
    for size in (1, 4, COUNT):
        np.testing.assert_allclose(
            labelled(teacher, batch_size=size).astype(np.float32), wanted, rtol=2e-3, atol=1e-4
        )


def test_without_augmentation_every_view_is_the_image(teacher):
    plain = ViewSettings(seed=0, crop_scale_min=1, flip=False, cutmix=False)
    labels = labelled(teacher, plain)
    assert np.array_equal(labels[0], labels[1])
    batches = soft_label_batches(IMAGES, WEIGHTS, labels, plain, 3, MEAN, STD, ("s",))
    inputs, _, _ = as_shown(batches, 0, 3)
    wanted = (IMAGES.float() / 255 - MEAN.view(3, 1, 1)) / STD.view(3, 1, 1)
    torch.testing.assert_close(inputs, wanted, rtol=1e-6, atol=1e-6)


# ---- batches -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("count", "size"), [(10, 3), (10, 4), (10, 10), (10, 100), (11, 10), (1, 5), (3, 2)])
def test_each_epoch_shows_each_image_once_and_no_batch_of_one(count, size):
    epochs = [shuffled(count, size, ("s",), epoch) for epoch in range(3)]
    for parts in epochs:
        assert torch.cat(parts).sort().values.tolist() == list(range(count))
        assert all(len(p) > 1 for p in parts) or count == 1
        assert max(map(len, parts)) <= size + 1
    assert count < 4 or not torch.equal(torch.cat(epochs[0]), torch.cat(epochs[1]))
    assert count < 4 or not torch.equal(torch.cat(shuffled(count, size, ("t",), 0)), torch.cat(epochs[0]))
    assert torch.equal(torch.cat(shuffled(count, size, ("s",), 0)), torch.cat(epochs[0]))


def test_hard_labels_have_the_same_views_and_say_how_much_is_pasted():
    soft = soft_label_batches(IMAGES, WEIGHTS, np.zeros((1, COUNT, CLASSES)), VIEWS, 4, MEAN, STD, ("s",))
    hard = hard_label_batches(IMAGES, WEIGHTS, CLASS, VIEWS, 4, MEAN, STD, ("s",))
    inputs, own, pasted, share, weights = as_shown(hard, 0, 4)
    assert torch.equal(inputs, as_shown(soft, 0, 4)[0])
    assert torch.equal(own, CLASS) and torch.equal(weights, WEIGHTS)
    views = VIEWS.views(0, COUNT, RESOLUTION)
    assert torch.equal(pasted, CLASS[views.partner])
    for i, (top, left, height, width) in enumerate(views.patch.tolist()):
        mask = torch.zeros(RESOLUTION, RESOLUTION)
        mask[top : top + height, left : left + width] = 1
        assert float(share[i]) == pytest.approx(float(mask.mean()))
    assert 0 < share.max() < 1
    plain = ViewSettings(seed=0, crop_scale_min=0.1, flip=True, cutmix=False)
    _, own, pasted, share, _ = as_shown(
        hard_label_batches(IMAGES, WEIGHTS, CLASS, plain, 4, MEAN, STD, ("s",)), 0, 4
    )
    assert torch.equal(own, pasted) and not share.any()


# ---- losses ------------------------------------------------------------------------------------


def logits(name: str, count: int = 5) -> torch.Tensor:
    return 4 * torch.randn(count, CLASSES, dtype=torch.float64, generator=torch_generator(name))


@pytest.mark.parametrize("temperature", [1, 4, 20])
def test_soft_label_loss_is_the_weighted_kl_divergence(temperature):
    student, teacher, weights = logits("student"), logits("teacher"), torch.tensor([2.0, 0, 1, 1, 1]).double()
    wanted = 0
    for s, t, w in zip(student, teacher, weights, strict=True):
        p, q = (torch.exp(x / temperature) / torch.exp(x / temperature).sum() for x in (t, s))
        wanted = wanted + w * (p * (p / q).log()).sum() / 5
    assert float(soft_label_loss(temperature)(student, teacher, weights)) == pytest.approx(
        float(wanted), rel=1e-10
    )
    float32 = soft_label_loss(temperature)(student.float(), teacher.float(), weights.float())
    assert float(float32) == pytest.approx(float(wanted), rel=1e-3)


def test_equal_logits_have_no_loss_and_no_gradient():
    teacher = logits("teacher")
    student = (teacher + torch.randn(5, 1)).requires_grad_(True)  # softmax does not see a shift
    loss = soft_label_loss(4)(student, teacher, torch.ones(5).double())
    loss.backward()
    assert float(loss.detach()) == pytest.approx(0, abs=1e-12) and student.grad.abs().max() < 1e-12


def test_soft_label_loss_has_the_gradient_of_cross_entropy():
    student, teacher, weights = (
        logits("student").requires_grad_(True),
        logits("teacher"),
        torch.rand(5).double(),
    )
    soft_label_loss(4)(student, teacher, weights).backward()
    wanted = (F.softmax(student / 4, 1) - F.softmax(teacher / 4, 1)) * weights[:, None] / 4 / 5
    torch.testing.assert_close(student.grad, wanted.detach(), rtol=1e-9, atol=1e-12)


def test_mixed_label_loss_is_cross_entropy_with_interpolated_labels():
    student, weights = logits("student"), torch.tensor([2.0, 0, 1, 1, 1]).double()
    own, pasted = torch.tensor([0, 1, 2, 3, 0]), torch.tensor([1, 1, 0, 2, 3])
    share = torch.tensor([0, 0.3, 0.5, 1, 0.25]).double()
    target = (1 - share)[:, None] * F.one_hot(own, CLASSES) + share[:, None] * F.one_hot(pasted, CLASSES)
    wanted = (weights * -(target * F.log_softmax(student, 1)).sum(1)).mean()
    assert float(mixed_label_loss(student, own, pasted, share, weights)) == pytest.approx(
        float(wanted), rel=1e-10
    )


# ---- the teacher's BatchNorm -------------------------------------------------------------------


def test_batch_mode_normalises_with_the_batch_and_leaves_the_running_statistics(teacher):
    before = {n: v.clone() for n, v in teacher.state_dict().items()}
    labels = labelled(teacher, teacher_mode="batch", batch_size=4)
    after = teacher.state_dict()
    for name, value in before.items():
        assert torch.equal(after[name], value) or name.endswith("num_batches_tracked")

    # By hand: evaluation mode, with the statistics of this very batch put in the place of the running ones.
    plain = freeze(build_model("convnet", CLASSES, RESOLUTION, seed=3, width=6, depth=2))
    views = VIEWS.views(1, COUNT, RESOLUTION)
    chosen = shuffled(COUNT, 4, (VIEWS.seed, "label batches"), 1)[1]
    x = view_batch(IMAGES, views, chosen, MEAN, STD)
    for module in plain.trunk:
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_var, module.running_mean = torch.var_mean(x, (0, 2, 3), correction=0)
        x = module(x)
    np.testing.assert_allclose(
        labels[1, chosen].astype(np.float32), plain.classifier(x).numpy(), rtol=5e-3, atol=1e-3
    )
    assert np.abs(labels.astype(np.float32) - labelled(teacher).astype(np.float32)).max() > 0.05


def test_evaluation_mode_follows_batch_mode(teacher):
    wanted = labelled(teacher)
    labelled(teacher, teacher_mode="batch")
    assert np.array_equal(labelled(teacher), wanted)


def test_logits_that_float16_cannot_hold_are_told(teacher):
    with torch.no_grad():
        teacher.classifier.bias.fill_(7e4)
    with pytest.raises(UserError, match="above 65,504.*lower learning_rate"):
        labelled(teacher)


def test_labels_of_another_set_and_unknown_modes_are_refused(teacher):
    labels = labelled(teacher)
    for call in (
        lambda: label_views(teacher, IMAGES[:-1], VIEWS, MEAN, STD, labels),
        lambda: soft_label_batches(IMAGES[:-1], WEIGHTS[:-1], labels, VIEWS, 4, MEAN, STD, ("names",)),
        lambda: soft_label_batches(IMAGES, WEIGHTS, labels[0], VIEWS, 4, MEAN, STD, ("names",)),
    ):
        with pytest.raises(UserError, match="labels have the shape"):
            call()
    with pytest.raises(UserError, match="teacher_mode is 'train'; known are eval, batch"):
        label_views(teacher, IMAGES, VIEWS, MEAN, STD, labels, teacher_mode="train")


# ---- resuming ----------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["eval", "batch"])
def test_resumed_labelling_ends_bit_identical(teacher, tmp_path, mode):
    wanted = labelled(teacher, teacher_mode=mode, batch_size=4, epochs=5)
    path, stop = tmp_path / "labels.npy", []

    def interrupt(_module, _inputs):
        stop.append(1)
        if len(stop) in (5, 9):  # in the middle of an epoch
            raise Killed

    hook = teacher.register_forward_pre_hook(interrupt)
    for _ in range(3):
        labels = np.lib.format.open_memmap(path, "r+" if path.exists() else "w+", np.float16, wanted.shape)
        progress = Progress("labels", tmp_path / "state.pt", "stamp", save_every=0)
        try:
            label_views(
                teacher, IMAGES, VIEWS, MEAN, STD, labels, teacher_mode=mode, batch_size=4, progress=progress
            )
        except Killed:
            assert not labels[-1].any()
        del labels
    hook.remove()
    assert len(stop) < 5 * 3 + 2 + 2 + 1  # three batches an epoch; an epoch that was done is not done again
    assert np.array_equal(np.load(path), wanted)


class Files:
    """A relabelling job on disk, run as the workflow runs it, without Snakemake."""

    def __init__(self, folder, teacher) -> None:
        self.folder = folder
        data = make_header("describe_dataset", {}, {}, "c0de")
        description = {
            "classes": list("abcd"),
            "mean": MEAN.tolist(),
            "std": STD.tolist(),
            "resolution": RESOLUTION,
        }
        write_json(folder / "description.json", description, data)
        network = {
            "architecture": "convnet",
            "classes": CLASSES,
            "resolution": RESOLUTION,
            "width": 6,
            "depth": 2,
        }
        header = make_header("pretrain_teacher", {"teacher": "t"}, {}, "c0de", [data], network=network)
        write_tensors(folder / "teacher.safetensors", teacher.state_dict(), header)
        header = make_header("gather_images", {}, {}, "c0de", [data])
        write_tensors(folder / "images.safetensors", {"images": IMAGES}, header)

    def job(self, epochs: int, seed: int, **recipe):
        from workflow_scripts.job import Job

        views = {"seed": seed, "crop_scale_min": 0.1, "flip": True, "cutmix": True}
        return Job(
            rule="relabel_images",
            wildcards={"recipe": "r"},
            input={
                "description": str(self.folder / "description.json"),
                "teacher": str(self.folder / "teacher.safetensors"),
                "images": str(self.folder / "images.safetensors"),
            },
            output={"labels": str(self.folder / "labels.npy"), "header": str(self.folder / "header.json")},
            settings={"views": views, "epochs": epochs, "teacher_mode": "eval", **recipe},
            code="c0de",
            device_name="cpu",
            threads=1,
            checkpoints=str(self.folder / "checkpoints"),
        )

    def run(self, epochs: int, seed: int = 0, **recipe) -> np.ndarray:
        from workflow_scripts.relabel_images import main

        main(self.job(epochs, seed, **recipe))
        labels = np.load(self.folder / "labels.npy")
        header = json.loads((self.folder / "header.json").read_text())
        assert header["shape"] == list(labels.shape) == [epochs, COUNT, CLASSES]
        shutil.rmtree(self.folder / "checkpoints", ignore_errors=True)
        return labels


@pytest.fixture
def files(tmp_path, teacher, monkeypatch):
    monkeypatch.setenv("WMDD_SAVE_EVERY", "0")
    return Files(tmp_path, teacher)


def kill_while_labelling(files: Files, epochs: int, monkeypatch, seed: int = 0) -> None:
    """Stop the job after two epochs, as a signal would."""
    with monkeypatch.context() as patch:
        views = ViewSettings.views

        def stopping(self, epoch, *shape):
            if epoch == 2:
                raise Killed
            return views(self, epoch, *shape)

        patch.setattr(ViewSettings, "views", stopping)
        with pytest.raises(Killed):
            files.run(epochs, seed)


@pytest.mark.parametrize("mode", ["eval", "batch"])
def test_a_job_labels_in_the_mode_and_the_batches_of_its_recipe(files, teacher, mode):
    wanted = labelled(teacher, teacher_mode=mode, batch_size=4)
    assert np.array_equal(files.run(EPOCHS, teacher_mode=mode, batch_size=4), wanted)


def test_a_job_labels_in_the_precision_of_its_settings(files, teacher):
    half = {"precision": "bfloat16"}
    found = files.run(EPOCHS, **half)
    assert np.array_equal(found, labelled(teacher, precision=precision(half, torch.device("cpu"))))
    assert not np.array_equal(found, labelled(teacher))


def test_a_relabelling_job_goes_on_after_a_kill(files, monkeypatch, teacher, capsys):
    kill_while_labelling(files, 4, monkeypatch)
    assert np.array_equal(files.run(4), labelled(teacher, epochs=4))
    assert "resuming after step 2\n" in capsys.readouterr().out


@pytest.mark.parametrize("epochs", [3, 6])
def test_a_killed_jobs_labels_are_dropped_when_its_settings_change(files, monkeypatch, teacher, epochs):
    """The array beside an ignored checkpoint has the shape of the other settings."""
    kill_while_labelling(files, 4, monkeypatch)
    assert np.array_equal(files.run(epochs), labelled(teacher, epochs=epochs))


def test_another_seeds_killed_run_leaves_nothing_in_the_labels(files, monkeypatch, teacher):
    """Killed, tried with another seed and killed before its first checkpoint, then the first seed again."""
    kill_while_labelling(files, 4, monkeypatch)
    monkeypatch.setenv("WMDD_SAVE_EVERY", "3600")
    kill_while_labelling(files, 4, monkeypatch, seed=1)
    assert np.array_equal(files.run(4), labelled(teacher, epochs=4))


def test_a_job_killed_between_its_outputs_starts_afresh(files, monkeypatch, teacher):
    """The labels are in place, the header is not: Snakemake deletes the labels and runs the job again."""
    with monkeypatch.context() as patch:

        def no_header(*_arguments):
            raise Killed

        patch.setattr("workflow_scripts.relabel_images.write_json", no_header)
        with pytest.raises(Killed):
            files.run(4)
    (files.folder / "labels.npy").unlink(missing_ok=True)
    assert np.array_equal(files.run(4), labelled(teacher, epochs=4))
