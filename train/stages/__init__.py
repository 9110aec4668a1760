"""The training stages: autoencoder, code extraction, priors."""
