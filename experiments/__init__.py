"""Experiments of the papers beyond images, built on the library."""
