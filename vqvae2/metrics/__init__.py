"""Metrics of images, features and codes. Streaming metrics have `update`, `all_reduce` and `compute`."""

import torch


def float64_device(device: torch.device | str) -> torch.device:
    """Return the device for float64 accumulators: the CPU for MPS, which has no float64, else `device`."""
    return torch.device("cpu" if torch.device(device).type == "mps" else device)
