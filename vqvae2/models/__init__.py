"""Autoencoders: images to code maps and back."""

from vqvae2.models.autoencoder import Autoencoder, AutoencoderConfig, LevelConfig

__all__ = ["Autoencoder", "AutoencoderConfig", "LevelConfig"]
