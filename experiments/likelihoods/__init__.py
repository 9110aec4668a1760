"""Likelihoods: VAE, VQ-VAE and VIMCO with the same encoder and decoder (van den Oord et al. 2017, section 4.1)."""
