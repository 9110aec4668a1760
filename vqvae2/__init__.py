"""The hierarchical VQ-VAE-2: quantizers, autoencoder, priors, code store, metrics."""
