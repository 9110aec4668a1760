"""Procedural landscapes in ten classes: the built-in data set."""

from vqvae2.data.scenes.landscapes import CLASSES, SMALLEST, label, render

__all__ = ["CLASSES", "SMALLEST", "label", "render"]
