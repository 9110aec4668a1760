"""Training: the loop and the stages that turn images into an autoencoder, codes and priors."""
