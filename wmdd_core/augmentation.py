"""Views: crops, flips, rolls and CutMix, drawn in batches and applied as matrix products.

Bilinear resampling is separable, so a crop resized to the output's size, a flip and a roll are
together one matrix for the rows and one for the columns: view = rows · image · columnsᵀ. Both
come from a handful of integers that are drawn on the CPU, which makes a view the same on every
device, replayable from its seed, and differentiable without atomic additions.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from wmdd_core.errors import UserError
from wmdd_core.graphs import replayed

CROP_ATTEMPTS = 10
CROP_RATIO = (3 / 4, 4 / 3)


@dataclass(frozen=True)
class Views:
    """N views of square images, as integers (each field is (N,) or (N, k)), drawn on the CPU."""

    box: Tensor
    """(N, 4) int64: top, left, height, width of the crop, in pixels."""
    flip: Tensor
    """(N,) bool: mirrored from left to right."""
    roll: Tensor
    """(N, 2) int64: cyclic shift of the view, rows and columns, in pixels."""
    partner: Tensor
    """(N,) int64: the image whose view is pasted in by CutMix."""
    patch: Tensor
    """(N, 4) int64: top, left, height, width of the pasted patch; height 0 means none."""

    def __len__(self) -> int:
        return len(self.flip)

    def __getitem__(self, indices: Tensor) -> Views:
        return Views(*(getattr(self, f.name)[indices] for f in fields(self)))

    def to(self, device: torch.device) -> Views:
        """The same views with their integers on `device`."""
        return Views(*(getattr(self, f.name).to(device) for f in fields(self)))


def draw_views(
    count: int,
    resolution: int,
    generator: torch.Generator,
    *,
    crop_scale_min: float | Tensor = 1.0,
    flip: bool = False,
    roll: int = 0,
    cutmix: bool = False,
) -> Views:
    """Draw `count` views of images of `resolution` pixels.

    `crop_scale_min`: smallest share of the area a crop may keep (1 = no crop), for all views or (count,)
    for each; aspect ratio 3/4 to 4/3, ten attempts and then the whole image. `roll`: largest cyclic shift
    in pixels.
    `cutmix`: mix λ ~ Beta(1, 1) of each view with a patch of a partner's view.

    Raises `UserError` for a `crop_scale_min` that is no share.
    """
    none = torch.zeros(count, 4, dtype=torch.int64)
    whole = torch.tensor([0, 0, resolution, resolution]).expand(count, 4)
    scale_min = torch.as_tensor(crop_scale_min, dtype=torch.float32).expand(count)
    if not ((scale_min > 0) & (scale_min <= 1)).all():
        raise UserError(f"crop_scale_min is {crop_scale_min}; it must be above 0 and at most 1")
    return Views(
        box=_draw_crops(resolution, scale_min, generator) if (scale_min < 1).any() else whole,
        flip=torch.rand(count, generator=generator) < 0.5 if flip else torch.zeros(count, dtype=torch.bool),
        roll=torch.randint(-roll, roll + 1, (count, 2), generator=generator) if roll else none[:, :2],
        partner=torch.randperm(count, generator=generator) if cutmix else torch.arange(count),
        patch=_draw_patches(count, resolution, generator) if cutmix else none,
    )


def _draw_crops(resolution: int, scale_min: Tensor, generator: torch.Generator) -> Tensor:
    count = len(scale_min)
    shape = (count, CROP_ATTEMPTS)
    scale_min = scale_min[:, None]
    area = resolution**2 * (scale_min + (1 - scale_min) * torch.rand(shape, generator=generator))
    low, high = (math.log(r) for r in CROP_RATIO)
    ratio = torch.exp(low + (high - low) * torch.rand(shape, generator=generator))
    width, height = (area * ratio).sqrt().round().long(), (area / ratio).sqrt().round().long()
    valid = (width >= 1) & (height >= 1) & (width <= resolution) & (height <= resolution)
    first = valid.int().argmax(1, keepdim=True)
    found = valid.any(1)
    width = torch.where(found, width.gather(1, first)[:, 0], resolution)
    height = torch.where(found, height.gather(1, first)[:, 0], resolution)
    free = torch.stack([resolution - height, resolution - width], 1) + 1
    corner = (torch.rand((count, 2), generator=generator) * free).long()
    return torch.cat([corner, height[:, None], width[:, None]], 1)


def draw_crop(
    height: int, width: int, scale_min: float, generator: torch.Generator
) -> tuple[int, int, int, int]:
    """One crop of an image of any shape: top, left, height, width in pixels.

    The share of the area is uniform in [scale_min, 1], the logarithm of the aspect ratio within `CROP_RATIO`.
    When ten have not fitted, and always if `scale_min` is 1, it is the largest central crop of such a ratio
    (as in torchvision's `RandomResizedCrop`): the whole image unless that is wider or taller.
    """
    low, high = (math.log(r) for r in CROP_RATIO)
    for _ in range(CROP_ATTEMPTS if scale_min < 1 else 0):
        share, place = torch.rand(2, generator=generator).tolist()
        area, ratio = (
            height * width * (scale_min + (1 - scale_min) * share),
            math.exp(low + (high - low) * place),
        )
        crop_height, crop_width = round(math.sqrt(area / ratio)), round(math.sqrt(area * ratio))
        if 1 <= crop_height <= height and 1 <= crop_width <= width:
            down, right = torch.rand(2, generator=generator).tolist()
            return (
                int(down * (height - crop_height + 1)),
                int(right * (width - crop_width + 1)),
                crop_height,
                crop_width,
            )
    crop_height = min(height, round(width / CROP_RATIO[0]))
    crop_width = min(width, round(height * CROP_RATIO[1]))
    return (height - crop_height) // 2, (width - crop_width) // 2, crop_height, crop_width


def _draw_patches(count: int, resolution: int, generator: torch.Generator) -> Tensor:
    side = (resolution * (1 - torch.rand(count, generator=generator)).sqrt()).long()[:, None]
    centre = torch.randint(resolution, (count, 2), generator=generator)
    start = (centre - side // 2).clamp(0, resolution)
    stop = (centre + side // 2).clamp(0, resolution)
    return torch.cat([start, stop - start], 1)


def apply_views(images: Tensor, views: Views) -> Tensor:
    """Apply crop, flip and roll, (N, C, R, R) float → (N, C, R, R); CutMix is `mix_views`.

    Equals cropping, `interpolate(mode="bilinear")` back to R pixels, mirroring and rolling.
    """
    resolution = images.shape[-1]
    box, roll = views.box, views.roll
    rows = resampling_matrix(box[:, 0], box[:, 2], resolution, roll=roll[:, 0])
    columns = resampling_matrix(box[:, 1], box[:, 3], resolution, roll=roll[:, 1], flip=views.flip)
    rows, columns = rows.to(images.dtype), columns.to(images.dtype)
    count, channels = images.shape[:2]
    across = torch.bmm(images.reshape(count, channels * resolution, resolution), columns.transpose(1, 2))
    viewed = rows[:, None] @ across.view(count, channels, resolution, resolution)
    return viewed.contiguous(memory_format=torch.channels_last)


def resampling_matrix(
    start: Tensor, length: Tensor, size: int, *, roll: Tensor | None = None, flip: Tensor | None = None
) -> Tensor:
    """Bilinear resampling of the pixels [start, start + length) to `size` pixels as (N, size, size) matrices.

    Row o holds the weights of the input pixels in output pixel o. Pixel centres are at half-integers
    and samples never leave the crop, as in `interpolate(align_corners=False)` on the cropped image.
    """
    output = torch.arange(size, device=start.device)[None, :]
    if roll is not None:
        output = (output - roll[:, None]) % size
    if flip is not None:
        output = torch.where(flip[:, None], size - 1 - output, output)
    length = length[:, None].float()
    position = ((output + 0.5) * (length / size) - 0.5).clamp(min=0).minimum(length - 1) + start[:, None]
    pixels = torch.arange(size, device=start.device)
    return (1 - (position[:, :, None] - pixels).abs()).clamp(min=0)


def mix_views(views: Views, own: Tensor, partners: Tensor) -> Tensor:
    """CutMix: paste each patch of `partners` into `own`, both (N, C, R, R) views already applied."""
    top, left, height, width = views.patch[:, :, None].unbind(1)
    pixels = torch.arange(own.shape[-1], device=own.device)
    in_rows = (pixels >= top) & (pixels < top + height)
    in_columns = (pixels >= left) & (pixels < left + width)
    return torch.where((in_rows[:, :, None] & in_columns[:, None, :])[:, None], partners, own)


def view_batch(
    images: Tensor, views: Views, indices: Tensor, mean: Tensor, std: Tensor, *, cutmix: bool = True
) -> Tensor:
    """The normalised views of the images at `indices`: uint8 (M, 3, R, R) → float32 (len(indices), 3, R, R).

    `views` holds one view for each of the M images; `mean` and `std` are (3,) in 0..1 units; without
    `cutmix` patches are not looked for. All are on the device of `images`. What a view looks like does
    not depend on which other images are asked for in the same call.
    """

    def viewed(which: Tensor) -> Tensor:
        return apply_views(normalise(images[which], mean, std), views[which])

    own = viewed(indices)
    return mix_views(views[indices], own, viewed(views.partner[indices])) if cutmix else own


def batch_viewer(images: Tensor, mean: Tensor, std: Tensor, *, cutmix: bool) -> Callable[..., Tensor]:
    """(indices, views) → `view_batch` of uint8 `images`, all on their device; see `graphs.replayed`."""
    if images.dtype != torch.uint8:
        raise UserError(f"images are {images.dtype}; give uint8, from 0 to 255")
    mean, std = mean.to(images.device), std.to(images.device)

    def view(indices: Tensor, *drawn: Tensor) -> Tensor:
        return view_batch(images, Views(*drawn), indices, mean, std, cutmix=cutmix)

    graphed = replayed(view, images.device)
    return lambda indices, views: graphed(indices, *vars(views).values())


def normalise(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """uint8 (N, 3, R, R) → float32 with (x / 255 − mean) / std for each channel."""
    mean, std = (v.to(images.device).view(3, 1, 1) for v in (mean, std))
    return ((images.float() / 255 - mean) / std).contiguous(memory_format=torch.channels_last)


def quantise(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """The inverse of `normalise`: float32 (N, 3, R, R) → uint8, rounded and clipped, on the CPU.

    Raises `UserError` for pixels that are not finite.
    """
    pixels = (images.cpu() * std.view(3, 1, 1) + mean.view(3, 1, 1)) * 255
    if not pixels.isfinite().all():
        raise UserError("the last step left pixels that are not finite; lower learning_rate")
    return pixels.round().clamp(0, 255).to(torch.uint8).contiguous()
