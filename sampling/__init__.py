"""From codes to images, and measurements of them.

from sampling import VQVAE2Pipeline
pipeline = VQVAE2Pipeline.from_pretrained("runs/demo")
images = pipeline(num_images=16, seed=0, temperature=0.9)   # float32 (16, 3, H, W) in [-1, 1]
"""

from sampling.editing import inpaint, variations
from sampling.params import LevelSamplingParams, SamplingParams
from sampling.pipeline import VQVAE2Pipeline
from sampling.sample_level import sample_level

__all__ = ["LevelSamplingParams", "SamplingParams", "VQVAE2Pipeline", "inpaint", "sample_level", "variations"]
