"""Views against torchvision-style cropping and interpolation, and CutMix against a written-out case."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from wmdd_core.augmentation import (
    Views,
    apply_views,
    batch_viewer,
    draw_crop,
    draw_views,
    mix_views,
    normalise,
    quantise,
    view_batch,
)
from wmdd_core.errors import UserError
from wmdd_core.seeding import torch_generator

MEAN, STD = torch.tensor([0.4, 0.5, 0.6]), torch.tensor([0.2, 0.25, 0.3])


def images(count: int, resolution: int) -> torch.Tensor:
    shape = (count, 3, resolution, resolution)
    return torch.randint(0, 256, shape, generator=torch_generator("images"), dtype=torch.uint8)


def test_views_equal_crop_interpolate_flip_and_roll():
    x = images(40, 16).double()
    views = draw_views(40, 16, torch_generator(1), crop_scale_min=0.08, flip=True, roll=5)
    viewed = apply_views(x, views)
    for i, image in enumerate(x):
        top, left, height, width = views.box[i].tolist()
        crop = image[None, :, top : top + height, left : left + width]
        wanted = F.interpolate(crop, (16, 16), mode="bilinear", align_corners=False)[0]
        if views.flip[i]:
            wanted = wanted.flip(-1)
        wanted = wanted.roll(views.roll[i].tolist(), (1, 2))
        # The matrices are float32, so positions are exact to about 1e-6 pixels of a range of 255.
        torch.testing.assert_close(viewed[i], wanted, atol=2e-3, rtol=0)


def test_crops_are_distributed_as_torchvisions():
    from torchvision.transforms import RandomResizedCrop

    image = torch.zeros(3, 64, 64)
    torch.manual_seed(0)
    theirs = [RandomResizedCrop.get_params(image, [0.25, 1.0], [3 / 4, 4 / 3]) for _ in range(4000)]
    theirs = torch.tensor(theirs, dtype=torch.float64)
    ours = draw_views(20000, 64, torch_generator(2), crop_scale_min=0.25).box.double()
    for box in (ours, theirs):
        top, left, height, width = box.T
        assert (top >= 0).all() and (top + height <= 64).all() and (left + width <= 64).all()
    # Means of top, left, height and width, and their deviations, to four standard errors.
    tolerance = 4 * theirs.std(0) / 4000**0.5
    assert ((ours.mean(0) - theirs.mean(0)).abs() < tolerance).all()
    assert ((ours.std(0) - theirs.std(0)).abs() < tolerance).all()


def test_crops_lie_everywhere_in_the_image():
    """Each place that a crop of a side can have is taken as often as the others."""
    generator = torch_generator("places")
    squares = draw_views(20000, 8, generator, crop_scale_min=0.3).box
    others = torch.tensor([draw_crop(9, 13, 0.3, generator) for _ in range(8000)])
    for boxes, sides in ((squares, (8, 8)), (others, (9, 13))):
        for axis, side in enumerate(sides):
            length = side - 1
            places = boxes[boxes[:, 2 + axis] == length, axis]
            assert len(places) > 100
            assert abs(places.double().mean() - 0.5) < 4 * 0.5 / len(places) ** 0.5  # 0 or 1


def test_after_ten_attempts_a_crop_is_the_whole_image():
    """Of nearly the whole area only crops that are nearly square fit."""
    count, side, least = 20000, 100, 0.98
    generator = np.random.default_rng(0)
    area = side**2 * generator.uniform(least, 1, (count, 10))
    ratio = np.exp(generator.uniform(np.log(3 / 4), np.log(4 / 3), (count, 10)))
    fits = (np.rint(np.sqrt(area * ratio)) <= side) & (np.rint(np.sqrt(area / ratio)) <= side)
    found = fits.argmax(1)
    rows = np.arange(count)
    width, height = np.rint(np.sqrt(area * ratio)), np.rint(np.sqrt(area / ratio))
    drawn = np.where(fits.any(1), width[rows, found] * height[rows, found], side**2)
    wanted = (drawn == side**2).mean(), drawn.mean() / side**2
    boxes = draw_views(count, side, torch_generator("attempts"), crop_scale_min=least).box
    single = torch.tensor([draw_crop(side, side, least, torch_generator("one", i)) for i in range(2000)])
    for own, tolerance in ((boxes, 0.02), (single, 0.05)):
        share = own[:, 2:].prod(1).double() / side**2
        assert float((share == 1).double().mean()) == pytest.approx(wanted[0], abs=tolerance)
        assert float(share.mean()) == pytest.approx(wanted[1], abs=5e-4)


@pytest.mark.parametrize(("height", "width"), [(100, 10), (10, 100), (100, 11), (11, 100), (30, 31)])
def test_a_crop_of_the_whole_area_is_torchvisions(height, width):
    from torchvision.transforms import RandomResizedCrop

    image = torch.zeros(3, height, width)
    theirs = RandomResizedCrop.get_params(image, [1.0, 1.0], [3 / 4, 4 / 3])
    if (height, width) == (30, 31):
        theirs = (0, 0, height, width)  # torchvision may draw a crop of the same area that just fits
    assert draw_crop(height, width, 1.0, torch_generator(0)) == tuple(theirs)


def test_a_pasted_patch_that_the_border_does_not_cut_has_even_sides():
    """Half of its side, rounded down, on both sides of its centre, as torchvision's."""
    patch = draw_views(2000, 33, torch_generator("patches"), cutmix=True).patch
    inside = (patch[:, :2] > 0).all(1) & (patch[:, :2] + patch[:, 2:] < 33).all(1)
    assert inside.sum() > 200 and (patch[inside][:, 2:] % 2 == 0).all()


def test_a_patch_whose_side_is_below_two_pixels_is_none():
    """The side is R sqrt(u), u uniform, rounded down: on 8 pixels it is below 2 in (2 / 8)² of the draws."""
    patch = draw_views(20000, 8, torch_generator("small patches"), cutmix=True).patch
    share, wanted = float((patch[:, 2] == 0).double().mean()), (2 / 8) ** 2
    assert share == pytest.approx(wanted, abs=4 * (wanted * (1 - wanted) / 20000) ** 0.5)


def test_crops_are_as_often_wide_as_tall():
    """The logarithm of the aspect ratio is uniform; with the ratio itself 4 in 7 would be wide."""
    generator = torch_generator("ratios")
    single = torch.tensor([draw_crop(200, 200, 0.1, generator) for _ in range(4000)])
    for boxes in (draw_views(20000, 200, generator, crop_scale_min=0.1).box, single):
        sign = (boxes[:, 3] - boxes[:, 2]).sign().double()
        assert abs(sign.mean()) < 4 * sign.std() / len(sign) ** 0.5


def test_no_augmentation_is_the_identity():
    x = images(3, 9).float()
    torch.testing.assert_close(apply_views(x, draw_views(3, 9, torch_generator(3))), x)


def test_a_scale_for_each_view_bounds_each_view():
    scale = torch.tensor([1.0, 0.9, 0.08] * 200)
    box = draw_views(600, 32, torch_generator(4), crop_scale_min=scale).box
    area = box[:, 2] * box[:, 3] / 32**2
    assert (area[0::3] == 1).all() and (area[1::3] > 0.85).all() and (area[2::3] < 0.5).any()


def test_cutmix_pastes_the_patch_and_nothing_else():
    own, partners = torch.zeros(1, 1, 4, 4), torch.ones(1, 1, 4, 4)
    views = Views(
        *(torch.zeros(1, 4).long(), torch.zeros(1).bool(), torch.zeros(1, 2).long()),
        torch.tensor([0]),
        torch.tensor([[1, 2, 2, 1]]),
    )
    wanted = torch.zeros(4, 4)
    wanted[1:3, 2] = 1
    assert torch.equal(mix_views(views, own, partners)[0, 0], wanted)


def test_cutmix_boxes_are_distributed_as_torchvisions():
    from torchvision.transforms.v2 import CutMix

    count, size = 20000, 64
    ours = draw_views(count, size, torch_generator(5), cutmix=True).patch.double()
    torch.manual_seed(0)
    theirs, cutmix = [], CutMix(num_classes=2)
    for _ in range(count // 4):
        x1, y1, x2, y2 = cutmix.make_params([torch.zeros(2, 3, size, size)])["box"]
        theirs.append([y1, x1, y2 - y1, x2 - x1])
    theirs = torch.tensor(theirs).double()
    share = [(p[:, 2] * p[:, 3])[:, None] for p in (ours, theirs)]
    ours, theirs = (torch.cat([p, s], 1) for p, s in zip((ours, theirs), share, strict=True))
    # Means and deviations within four standard errors of their differences.
    error = theirs.std(0) * (1 / len(ours) + 1 / len(theirs)) ** 0.5
    assert ((ours.mean(0) - theirs.mean(0)).abs() < 4 * error).all()
    assert ((ours.std(0) - theirs.std(0)).abs() < 4 * error).all()


def test_half_of_the_views_are_mirrored():
    assert abs(draw_views(20000, 8, torch_generator(9), flip=True).flip.float().mean() - 0.5) < 0.02


def test_partners_are_a_permutation():
    partner = draw_views(100, 64, torch_generator(5), cutmix=True).partner
    assert torch.equal(partner.sort().values, torch.arange(100))


def test_a_mixed_view_shows_its_partners_own_view_within_the_patch():
    x = images(12, 8)
    views = draw_views(12, 8, torch_generator(10), crop_scale_min=0.3, flip=True, cutmix=True)
    plain = apply_views(normalise(x, MEAN, STD), views)
    found = view_batch(x, views, torch.arange(12), MEAN, STD)
    for i, (top, left, height, width) in enumerate(views.patch.tolist()):
        wanted, patch = plain[i].clone(), (slice(None), slice(top, top + height), slice(left, left + width))
        wanted[patch] = plain[views.partner[i]][patch]
        torch.testing.assert_close(found[i], wanted)
    assert not torch.allclose(found, plain)  # something was pasted


@pytest.mark.parametrize("size", [1, 2, 7])
def test_a_view_does_not_depend_on_its_batch(size):
    """The student must see, bit for bit, what the teacher labelled, in whatever batches either works."""
    x = images(20, 16)
    views = draw_views(20, 16, torch_generator(6), crop_scale_min=0.08, flip=True, cutmix=True)
    whole = view_batch(x, views, torch.arange(20), MEAN, STD)
    order = torch.randperm(20, generator=torch_generator(7))
    for chosen in order.split(size):
        assert torch.equal(view_batch(x, views, chosen, MEAN, STD), whole[chosen])


def test_gradients_flow_through_views():
    x = torch.rand(2, 3, 8, 8, dtype=torch.float64, requires_grad=True)
    views = draw_views(2, 8, torch_generator(8), crop_scale_min=0.3, flip=True, roll=2)
    assert torch.autograd.gradcheck(lambda v: apply_views(v, views), (x,))


def test_quantise_inverts_normalise():
    x = torch.arange(256, dtype=torch.uint8).repeat(3).view(1, 3, 16, 16)
    assert torch.equal(quantise(normalise(x, MEAN, STD), MEAN, STD), x)


def test_quantise_rounds_to_the_nearest_and_clips():
    x = torch.tensor([-9.0, 0.004, 9.0]).view(1, 3, 1, 1)
    assert quantise(x, torch.zeros(3), torch.ones(3)).flatten().tolist() == [0, 1, 255]


@pytest.mark.parametrize("share", [0, -1.0, 2.0, math.nan, torch.tensor([0.5, 1.5])])
def test_a_share_of_the_area_is_above_0_and_at_most_1(share):
    with pytest.raises(UserError, match="it must be above 0 and at most 1"):
        draw_views(2, 8, torch.Generator(), crop_scale_min=share)


def test_images_between_0_and_1_are_refused():
    with pytest.raises(UserError, match="images are torch.float32; give uint8"):
        batch_viewer(torch.rand(2, 3, 8, 8), MEAN, STD, cutmix=False)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_pixels_that_are_not_finite_are_no_image(value):
    with pytest.raises(UserError, match="pixels that are not finite"):
        quantise(torch.full((1, 3, 2, 2), value), MEAN, STD)
