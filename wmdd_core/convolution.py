"""Convolutions on a CPU: 3×3 ones by minimal filtering, and the gradient of images in blocks of pixels.

Winograd's minimal filtering F(4×4, 3×3) needs a quarter of the multiplications. For a tile d of 6×6 inputs
and a kernel g of 3×3 the 4×4 outputs are (Lavin and Gray 2016, Eq. 8)

    Y = Aᵀ [(G g Gᵀ) ⊙ (Bᵀ d B)] A

and the sum over channels at each of the 36 places is one matrix product over all tiles. What the direct
convolution spends on multiplications this spends on additions, a block of tiles at a time, which the caches
hold. In float32 it rounds four times as coarsely: 2·10⁻⁶ of the result instead of 6·10⁻⁷.

The gradient of images is what distillation wants of a network's first layer and training never does.
PyTorch computes it a pixel at a time, whose three channels leave most of a vector register empty.
`ImageConvolution` computes it for 2×2 pixels at a time, in half the time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

TILES = 256
"""Tiles in a block, or one image's: 4.7 MB at 128 channels. Fewer than these are not worth the transforms."""

IMAGE_CHANNELS = 4
"""Channels up to which the input of a convolution counts as images."""

OUTPUTS = 2**18
"""Outputs beyond which the gradient of images repays its kernels: 16 images of 16 pixels and 64 channels."""

BY_PLACE = {"groups": 36, "dilation": 2}
"""The products of matrices at the 36 places, as groups of a 1×1 convolution.

oneDNN computes it with AVX-512 on every processor that has it, PyTorch's products of matrices on Intel's
alone: on AMD's latest that is half the time. A dilation, which means nothing to a 1×1 kernel, keeps PyTorch
from computing it by those products where there is one thread.
"""

# Bᵀ and Aᵀ are written out below; points 0, ±1, ±2 and ∞.
G = torch.tensor(
    [[6, 0, 0], [-4, -4, -4], [-4, 4, -4], [1, 2, 4], [1, -2, 4], [0, 0, 24]], dtype=torch.float64
).div(24)

G_BOTH = torch.kron(G, G)
"""G g Gᵀ as one matrix (36, 9) for the nine values of g."""


class Conv2d(nn.Conv2d):
    """`torch.nn.Conv2d`, by `MinimalFiltering` or `ImageConvolution` wherever that is faster."""

    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if _filters_faster(x, weight):
            return MinimalFiltering.apply(x, weight, bias)
        if _is_of_images(x, weight, bias, self.stride[0]):
            return ImageConvolution.apply(x, weight, bias, self.stride[0])
        return super()._conv_forward(x, weight, bias)


def use_fast_convolutions(model: nn.Module) -> None:
    """Turn the convolutions of `model` that can be faster into `Conv2d`, weights and all."""
    for module in model.modules():
        if type(module) is nn.Conv2d and _can_be_faster(module):
            module.__class__ = Conv2d


def _can_be_faster(layer: nn.Conv2d) -> bool:
    """3×3 kernels with stride 1, or odd ones on images with stride 1 or 2; half a kernel of padding."""
    size, stride = layer.kernel_size[0], layer.stride[0]
    shape = (layer.kernel_size, layer.stride, layer.padding, layer.dilation)
    if shape != ((size, size), (stride, stride), (size // 2, size // 2), (1, 1)):
        return False
    if layer.groups != 1 or layer.padding_mode != "zeros":
        return False
    return (size, stride) == (3, 1) or (layer.in_channels <= IMAGE_CHANNELS and size % 2 == 1 and stride <= 2)


def _filters_faster(x: Tensor, weight: Tensor) -> bool:
    """Measured on one and two cores of a processor whose vector units have 512 bits."""
    if x.device.type != "cpu" or x.dtype != torch.float32 or torch.is_autocast_enabled("cpu") or x.ndim != 4:
        return False
    large = min(weight.shape[:2]) >= 128 and min(x.shape[2:]) >= 7
    return large and len(x) * _tiles(x.shape[2]) * _tiles(x.shape[3]) >= TILES


def _is_of_images(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int) -> bool:
    """Many images of even sides and few channels, and nothing else wants a gradient."""
    if x.device.type != "cpu" or x.ndim != 4 or not (torch.is_grad_enabled() and x.requires_grad):
        return False
    if weight.requires_grad or (bias is not None and bias.requires_grad):
        return False
    count, channels, height, width = x.shape
    outputs = count * len(weight) * height * width // stride**2
    return channels <= IMAGE_CHANNELS and height % 2 == width % 2 == 0 and outputs > OUTPUTS


class ImageConvolution(torch.autograd.Function):
    """Convolve images x (N, C, H, W) of even sides with frozen kernels (K, C, k, k), k odd; padding k // 2.

    `stride` is 1 or 2, `bias` (K,) or None. Only the gradient in x is computed.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None, stride: int) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.stride = stride
        return F.conv2d(x, weight, bias, stride, weight.shape[-1] // 2)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (weight,) = ctx.saved_tensors
        return _image_gradient(gradient, weight.to(gradient.dtype), ctx.stride), None, None, None


def _image_gradient(gradient: Tensor, weight: Tensor, stride: int) -> Tensor:
    """The gradient in x, from that in the outputs.

    Output p sees pixel 2a + u of x, u = 0 or 1, through the weight 2a + u + k // 2 - stride · p. So the
    pixels of all blocks a are a convolution of `gradient`, 2 / stride outputs a block, by kernels that hold
    these weights in the order of p, and 0 where there is none.
    """
    size, step = weight.shape[-1], 2 // stride
    before = size // 2 // stride  # outputs that see a block and lie before its own
    largest = size // 2 + stride * before  # weight through which the first of them sees u = 0
    taps = (1 + largest) // stride + 1
    span, left = stride * (taps - 1) + 1, largest + 2 - size
    padded = F.pad(weight.flip(2, 3), (left, span + 1 - left - size) * 2)
    windows = padded.unfold(2, span, 1).unfold(3, span, 1)[..., ::stride, ::stride].flip(2, 3)
    kernels = windows.permute(1, 2, 3, 0, 4, 5).reshape(-1, len(weight), taps, taps)
    more = (taps - 1 - 2 * before) // step  # blocks at the start that are of the padding, alike at both ends
    blocks = F.conv2d(
        gradient,
        kernels.contiguous(memory_format=torch.channels_last),
        stride=step,
        padding=before + more * step,
    )
    rows, columns = (side // step for side in gradient.shape[2:])
    return F.pixel_shuffle(blocks[:, :, more : more + rows, more : more + columns], 2)


class MinimalFiltering(torch.autograd.Function):
    """Convolve x (N, C, H, W) with kernels (K, C, 3, 3), stride and padding 1; add a bias (K,) or None."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _convolved(x, _spectrum(weight), bias)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        of_x, of_weight, of_bias = ctx.needs_input_grad
        bias = gradient.sum((0, 2, 3)) if of_bias else None
        kernels = nn.grad.conv2d_weight(x, weight.shape, gradient, padding=1) if of_weight else None
        if not of_x:
            return None, kernels, bias
        if torch.is_grad_enabled():  # to be differentiated again, as gradient matching does
            return nn.grad.conv2d_input(x.shape, weight, gradient, padding=1), kernels, bias
        mirrored = weight.flip(2, 3).transpose(0, 1)
        return _convolved(gradient, _spectrum(mirrored)), kernels, bias


class Tiling(NamedTuple):
    """How a batch is worked off: blocks at a time, images in each, rows and columns of tiles in an image."""

    blocks: int
    each: int
    rows: int
    columns: int


def _tile(x: Tensor) -> Tiling:
    """A block for each thread.

    Operations split their outermost dimension, so every thread finds in its cache what it wrote before, in
    this layer and the last. Threads at work on one block took up to twice as long.
    """
    rows, columns = _tiles(x.shape[2]), _tiles(x.shape[3])
    most = max(1, TILES // (rows * columns))
    blocks = min(torch.get_num_threads(), -(-len(x) // most))
    share = len(x) // blocks
    return Tiling(blocks, -(-share // -(-share // most)), rows, columns)


def _parts(images: Tensor, tiling: Tiling) -> Iterator[Tensor]:
    """(N, H, W, C) as views (blocks, images, H, W, C): a share for each thread, some of each at a time."""
    even = len(images) - len(images) % tiling.blocks
    yield from images[:even].unflatten(0, (tiling.blocks, -1)).split(tiling.each, 1)
    if even < len(images):
        yield images[even:, None]


def _tiles(side: int) -> int:
    return -(-side // 4)


def _convolved(x: Tensor, spectrum: Tensor, bias: Tensor | None = None) -> Tensor:
    """Y of every tile, cut to the size of x (N, C, H, W), for kernels of this `_spectrum`."""
    (count, _, height, width), channels = x.shape, len(spectrum) // 36
    blocks, each, rows, columns = tiling = _tile(x)
    half, spare = (x.new_empty(blocks, each, rows, columns, k, channels) for k in (24, 6))
    found = torch.empty((count, channels, height, width), dtype=x.dtype, memory_format=torch.channels_last)
    output = found.permute(0, 2, 3, 1)
    fits = height % 4 == width % 4 == 0
    patch = None if fits else x.new_empty(blocks, each, 4 * rows, 4 * columns, channels)
    for own, tiles in zip(_parts(output, tiling), _transformed_parts(x, tiling), strict=True):
        b, n = own.shape[:2]
        part, free = half[:b, :n].unflatten(4, (4, 6)), spare[:b, :n]
        product = F.conv2d(_planes(tiles), spectrum, **BY_PLACE).permute(0, 2, 3, 1)
        product = product.reshape(b, n, rows, columns, 6, 6, channels)
        _output_transform(product.unbind(4), part.unbind(4), free)
        target = own if patch is None else patch[:b, :n]
        by_place = target.unflatten(3, (columns, 4)).unflatten(2, (rows, 4)).permute(5, 0, 1, 2, 4, 3, 6)
        _output_transform(part.unbind(5), by_place.unbind(0), free[..., :4, :])
        if patch is not None:
            own.copy_(target[:, :, :height, :width])
        if bias is not None:
            own += bias
    return found


def _transformed_parts(x: Tensor, tiling: Tiling) -> Iterator[Tensor]:
    """Bᵀ d B of the tiles of each part, (blocks, images, rows, columns, 6, 6, C). The next overwrites it."""
    _, channels, height, width = x.shape
    blocks, each, rows, columns = tiling
    padded = x.new_zeros(blocks, each, 4 * rows + 2, 4 * columns + 2, channels)
    half = x.new_empty(blocks, 6, each, rows, 4 * columns + 2, channels)
    whole = x.new_empty(blocks, each, rows, columns, 6, 6, channels)
    for images in _parts(x.permute(0, 2, 3, 1), tiling):
        b, n = images.shape[:2]
        padded[:b, :n, 1 : height + 1, 1 : width + 1] = images
        part, result = half[:b, :, :n], whole[:b, :n]
        _input_transform(padded[:b, :n].unfold(2, 6, 4).unbind(-1), part.unbind(1))
        by_row = result.permute(0, 4, 1, 2, 3, 5, 6)
        _input_transform(part.unfold(4, 6, 4).unbind(-1), by_row.unbind(5))
        yield result


def _planes(whole: Tensor) -> Tensor:
    """(blocks, images, rows, columns, 6, 6, C) as images (blocks, 36 · C, images · rows, columns)."""
    return whole.flatten(1, 2).flatten(3).permute(0, 3, 1, 2)


def _spectrum(weight: Tensor) -> Tensor:
    """G g Gᵀ of the kernels g, place by place: (K, C, 3, 3) → (36 · K, C, 1, 1)."""
    kernels = weight.permute(2, 3, 0, 1)
    return (G_BOTH.to(weight.dtype) @ kernels.reshape(9, -1)).view(-1, kernels.shape[3], 1, 1)


def _input_transform(d: Sequence[Tensor], v: Sequence[Tensor]) -> None:
    """v = Bᵀ d, six of six."""
    even, odd = v[1], v[5]
    torch.add(d[4], d[2], alpha=-4, out=even)
    torch.add(d[3], d[1], alpha=-4, out=odd)
    torch.sub(even, odd, out=v[2])
    even += odd
    even, odd = v[3], v[5]
    torch.sub(d[4], d[2], out=even)
    torch.sub(d[3], d[1], out=odd)
    torch.add(even, odd, alpha=-2, out=v[4])
    even.add_(odd, alpha=2)
    torch.add(d[4], d[2], alpha=-5, out=v[0]).add_(d[0], alpha=4)
    torch.add(d[5], d[3], alpha=-5, out=v[5]).add_(d[1], alpha=4)


def _output_transform(m: Sequence[Tensor], y: Sequence[Tensor], spare: Tensor) -> None:
    """y = Aᵀ m, four of six. Overwrites m and `spare`."""
    near, far = (spare, m[1]), (m[2], m[3])
    torch.add(m[1], m[2], out=spare)
    m[1].sub_(m[2])
    torch.add(m[3], m[4], out=m[2])
    m[3].sub_(m[4])
    torch.add(near[0], far[0], out=y[0]).add_(m[0])
    torch.add(near[1], far[1], alpha=2, out=y[1])
    torch.add(near[0], far[0], alpha=4, out=y[2])
    torch.add(near[1], far[1], alpha=8, out=y[3]).add_(m[5])
