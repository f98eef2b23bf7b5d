"""WMDD, dataset distillation via the Wasserstein metric (Liu et al., ICCV 2025).

Tensors and arrays in, dataclasses out: the library knows neither Snakemake nor result
paths. Import its modules one by one; nothing heavy is imported here, since a barycenter
job has no use for PyTorch.
"""
