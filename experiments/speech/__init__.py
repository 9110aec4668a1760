"""Speech: a VQ-VAE of waveforms with a WaveNet decoder (van den Oord et al. 2017, section 4.3)."""
