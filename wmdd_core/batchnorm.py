"""Per-class BatchNorm statistics: measured on real images, compared on synthetic ones.

For a BatchNorm layer with input x (N, C, H, W) and a class c with images j of weight w_j (Σ w_j = 1):

    mean_c = Σ_j w_j m_j                        m_j, v_j: mean and variance of image j over its pixels
    var_c  = Σ_j w_j (v_j + (m_j − mean_c)²)    (law of total variance, biased)

Real images weigh the same; synthetic ones have the weights of their barycenter's atoms.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wmdd_core.models import batchnorm_layers

Moments = tuple[Tensor, Tensor]
"""A mean and a biased variance of equal shape."""


def _pixel_moments(x: Tensor) -> Moments:
    """Mean and biased variance over the pixels of (N, C, H, W), in float32."""
    if x.is_cuda and x.dtype != torch.float32:
        # Two reductions that read half the bytes of a float32 copy. The difference loses digits of the
        # variance where a mean is large, but fewer than half precision has lost.
        mean = x.mean((2, 3), dtype=torch.float32)
        norm = torch.linalg.vector_norm(x, dim=(2, 3), dtype=torch.float32)
        return mean, (norm.square() / (x.shape[2] * x.shape[3]) - mean.square()).clamp_(min=0)
    if x.is_cuda:
        var, mean = torch.var_mean(x, (2, 3), correction=0)
        return mean, var
    # With the channels last in memory this takes a sixth of the time of `torch.var_mean` on a CPU.
    pixels = x.float().permute(0, 2, 3, 1).flatten(1, 2)
    mean = pixels.mean(1)
    return mean, (pixels - mean[:, None]).square_().mean(1)


def _moments_gradient(x: Tensor, mean: Tensor, grad_mean: Tensor, grad_var: Tensor) -> Tensor:
    """The gradient of `_pixel_moments`, of the type and memory format of `x`."""
    count = x.shape[2] * x.shape[3]
    slope = (2 * grad_var / count)[:, :, None, None]
    offset = (grad_mean / count)[:, :, None, None] - slope * mean[:, :, None, None]
    if x.is_cuda:
        return torch.addcmul(offset, x, slope, out=torch.empty_like(x))
    return torch.addcmul(offset, x.float(), slope).to(x.dtype)  # of bfloat16, 1.6 times as fast on a CPU


class _PixelMoments(torch.autograd.Function):
    """`_pixel_moments`, which keeps nothing but the input, stored by the convolution before anyway."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Moments:
        mean, var = _pixel_moments(x)
        ctx.save_for_backward(x, mean)
        return mean, var

    @staticmethod
    def backward(ctx, grad_mean: Tensor, grad_var: Tensor) -> Tensor:
        return _moments_gradient(*ctx.saved_tensors, grad_mean, grad_var)


class _FrozenBatchNorm(torch.autograd.Function):
    """A frozen BatchNorm layer and the moments of its input, for a GPU.

    Gradients keep the channels last in memory. Those of PyTorch's own layer in evaluation mode do not,
    and every operation before it then works against the grain: a third of a step of recovery.
    """

    @staticmethod
    def forward(
        ctx, x: Tensor, running_mean: Tensor, running_var: Tensor, weight: Tensor, bias: Tensor, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        mean, var = _pixel_moments(x)
        ctx.save_for_backward(x, mean, weight * torch.rsqrt(running_var + eps))
        return F.batch_norm(x, running_mean, running_var, weight, bias, eps=eps), mean, var

    @staticmethod
    def backward(ctx, grad_output: Tensor, grad_mean: Tensor, grad_var: Tensor) -> tuple[Tensor | None, ...]:
        x, mean, scale = ctx.saved_tensors
        gradient = _moments_gradient(x, mean, grad_mean, grad_var)
        return gradient.addcmul_(grad_output, scale[:, None, None]), None, None, None, None, None


def image_moments(x: Tensor) -> Moments:
    """Mean and variance over the pixels of each image, (N, C, H, W) or (N, C) → two (N, C) tensors.

    In float32, or in float64 if `x` is; whatever autocast makes of the activations.
    """
    if x.ndim == 2:
        x = x if x.dtype == torch.float64 else x.float()
        return x, torch.zeros_like(x)
    if x.dtype == torch.float64:
        var, mean = torch.var_mean(x, (2, 3), correction=0)
        return mean, var
    return _PixelMoments.apply(x)


def group_moments(moments: Moments, weights: Tensor) -> Moments:
    """Moments of groups of images: (N, C) moments and weights (G, N) with rows summing to 1 → (G, C)."""
    mean, var = moments
    group_mean = weights @ mean
    # Deviations instead of E[x²] − mean²: float32 would lose the variance of layers with a large mean.
    group = weights.argmax(0)
    deviation = (mean - group_mean[group]) ** 2
    return group_mean, weights @ (var + deviation)


@contextmanager
def record_input_moments(model: nn.Module) -> Iterator[dict[str, Moments]]:
    """While open, each forward pass of `model` fills the yielded dictionary, layer name → `image_moments`."""
    recorded: dict[str, Moments] = {}

    def observe(name: str, layer: nn.Module, x: Tensor) -> Tensor:
        frozen = not layer.training and not any(p.requires_grad for p in layer.parameters())
        if x.is_cuda and x.ndim == 4 and x.dtype != torch.float64 and frozen:
            statistics = layer.running_mean, layer.running_var, layer.weight, layer.bias, layer.eps
            output, *recorded[name] = _FrozenBatchNorm.apply(x, *statistics)
            return output
        recorded[name] = image_moments(x)
        return type(layer).forward(layer, x)

    layers = batchnorm_layers(model)
    for name, layer in layers.items():
        layer.forward = partial(observe, name, layer)
    try:
        yield recorded
    finally:
        for layer in layers.values():
            del layer.forward


@dataclass(frozen=True)
class LayerStatistics:
    """Statistics of one layer's input: per class `mean`, `var` (classes, C), and over all images (C,)."""

    mean: Tensor
    var: Tensor
    global_mean: Tensor
    global_var: Tensor


class StatisticsAccumulator:
    """Exact per-class statistics from batches of any size and order, in float64.

    Sums over images of m_j and of v_j + m_j² add up without loss; averaging variances over batches
    would drop the variance between them.
    """

    def __init__(self, classes: int) -> None:
        self.counts = torch.zeros(classes, dtype=torch.float64)
        self.sums: dict[str, Tensor] = {}

    def add(self, moments: dict[str, Moments], labels: Tensor) -> None:
        """Add a batch: `record_input_moments`'s dictionary and the labels (N,) of its images."""
        labels = labels.cpu()
        self.counts += torch.bincount(labels, minlength=len(self.counts))
        if not moments:
            return
        # One copy from the device for all layers: a GPU waits for each.
        parts = [part.detach() for pair in moments.values() for part in pair]
        rows = torch.cat(parts, 1).cpu().split([part.shape[1] for part in parts], 1)
        for name, mean, var in zip(moments, rows[::2], rows[1::2], strict=True):
            mean, var = mean.double(), var.double()
            batch = torch.stack([mean, var + mean**2], 1)
            if name not in self.sums:
                self.sums[name] = torch.zeros(len(self.counts), *batch.shape[1:], dtype=torch.float64)
            self.sums[name].index_add_(0, labels, batch)

    def state(self) -> dict:
        """Tensors to resume from; see `restore`."""
        return {"counts": self.counts, "sums": self.sums}

    def restore(self, state: dict) -> None:
        """Continue from a `state`."""
        self.counts, self.sums = state["counts"], dict(state["sums"])

    def statistics(self) -> dict[str, LayerStatistics]:
        """Layer name → `LayerStatistics` in float64. A class without images has NaN."""

        def moments(sums: Tensor, count: Tensor) -> Moments:
            mean, second = (sums / count).unbind(-2)
            return mean, (second - mean**2).clamp(min=0)

        return {
            name: LayerStatistics(
                *moments(sums, self.counts[:, None, None]), *moments(sums.sum(0), self.counts.sum())
            )
            for name, sums in self.sums.items()
        }
