"""Sampling and evaluation: how codes become images, and how good those are."""

from sampling.hierarchy import Generator

__all__ = ["Generator"]
