"""Measure samples: features, distances, classifiers, diagnosis."""
