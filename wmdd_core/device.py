"""How a device computes: in which precision, and by which of its algorithms."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext

import torch


def precision(settings: Mapping, device: torch.device) -> AbstractContextManager:
    """How networks multiply; losses and statistics are float32 everywhere."""
    half = precision_name(settings, device) == "bfloat16"
    return torch.autocast(device.type, torch.bfloat16) if half else nullcontext()


def precision_name(settings: Mapping, device: torch.device) -> str:
    """`settings["precision"]`; by default `auto`, bfloat16 on a GPU that has it and float32 elsewhere."""
    name = settings.get("precision", "auto")
    if name != "auto":
        return name
    return "bfloat16" if device.type == "cuda" and _multiplies_bfloat16() else "float32"


def _multiplies_bfloat16() -> bool:
    """Whether the GPU does: before compute capability 8 it is emulated, and slower than float32."""
    return torch.cuda.is_bf16_supported(including_emulation=False)


def images_per_pass(device: torch.device) -> int:
    """Images in a forward pass: memory and time, not meaning. On a CPU so few that its caches hold them."""
    return 64 if device.type == "cpu" else 100


def compute_reproducibly() -> None:
    """Take those of a GPU's algorithms that give the same bits each time; where none does, PyTorch warns."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS starts
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # nothing here reads such memory
    # The environment may ask for TF32, which would reach views and statistics too.
    torch.set_float32_matmul_precision("highest")
    # Where a warning is enough, fused attention takes its atomic additions.
    for switch in ("enable_flash_sdp", "enable_mem_efficient_sdp", "enable_cudnn_sdp"):
        getattr(torch.backends.cuda, switch)(False)
