"""Procedural landscapes in ten classes: the built-in data set."""

from vqvae2.data.scenes.landscapes import CLASSES, MIN_SIZE, label, render

__all__ = ["CLASSES", "MIN_SIZE", "label", "render"]
