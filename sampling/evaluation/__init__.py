"""Evaluation of samples: features, metrics, classifiers and diagnosis."""
