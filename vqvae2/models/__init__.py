"""Autoencoders of images and speech, and their likelihoods."""

from vqvae2.models.autoencoder import Autoencoder, AutoencoderConfig, LevelConfig

__all__ = ["Autoencoder", "AutoencoderConfig", "LevelConfig"]
