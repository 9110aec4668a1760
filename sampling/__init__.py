"""Sampling and evaluation: how codes become images, and how good those are."""

from sampling.pipeline import VQVAE2Pipeline

__all__ = ["VQVAE2Pipeline"]
