"""torch.compile: networks are one graph, and a compiled autoencoder step equals an eager one, also under bf16.

It runs in another process, because the shape checks that pytest installs cannot be compiled.
"""

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = """
import copy, json
import torch
import torch._dynamo as dynamo
from train.losses import AdversarialLoss
from train.stages.autoencoder import AutoencoderObjective
from train.stages.prior import PriorObjective
from vqvae2 import AutoencoderConfig, GradientConfig, LevelConfig, PriorSpec
from vqvae2 import PixelCNNConfig, PixelSNAILConfig, TransformerConfig
from vqvae2.data.code_store import CodeBatch
from vqvae2.data.images import ImageSample
from vqvae2.models.discriminator import DiscriminatorConfig
from vqvae2.training_config import AdversarialLossConfig, AutoencoderLossConfig

torch.set_num_threads(1)
torch.manual_seed(0)
levels = LevelConfig(stride=4), LevelConfig(quantizer=GradientConfig())
config = AutoencoderConfig(levels=levels, channels=8, residual_channels=4, residual_layers=1)
network = config.build((16, 16)).train()
batch = ImageSample(torch.randint(256, (3, 3, 16, 16), dtype=torch.uint8), torch.zeros(3, dtype=torch.int64))
adversarial = AdversarialLossConfig(weight=0.1, discriminator=DiscriminatorConfig(channels=8, layers=2))
term = AdversarialLoss(adversarial, adversarial.discriminator.build((16, 16)))
term.active = True
eager = AutoencoderObjective(network, AutoencoderLossConfig(adversarial=adversarial), adversarial=term)
eager(batch)  # k-means
network.update_codebooks()
compiled = copy.deepcopy(eager)
results = {"steps": []}
dynamo.reset()
results["autoencoder"] = dynamo.explain(copy.deepcopy(eager))(batch).graph_break_count
dynamo.reset()
for enabled in (False, True):
    step = []
    for objective in (eager, torch.compile(compiled, backend="aot_eager")):
        objective.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss, _ = objective(batch)
        loss.backward()
        norms = [float(p.grad.norm()) for p in objective.parameters() if p.grad is not None]
        sums = [float(quantizer._sums.norm()) for quantizer in objective.network.quantizers]
        usage = [float(each) for each in objective.usage.take().values()]
        objective.network.update_codebooks()
        step.append([float(loss.detach()), *norms, *sums, *usage])
    results["steps"].append(step)
bottom, top = network.map_specs
codes = CodeBatch((torch.randint(512, (2, 4, 4)), torch.randint(512, (2, 2, 2))), torch.tensor([0, 2]))
for name, config in {
    "pixelsnail": PixelSNAILConfig(channels=8, residual_channels=8, blocks=2, layers=1, heads=2, kernel=3),
    "pixelcnn": PixelCNNConfig(channels=8, layers=2, output_channels=8, kernel=3),
    "transformer": TransformerConfig(channels=8, layers=2, heads=2),
    "wavefront": TransformerConfig(channels=8, layers=2, heads=2, attention_order="wavefront"),
}.items():
    dynamo.reset()
    prior = config.build(PriorSpec(level=bottom, coarser=(top,), num_classes=3)).train()
    results[name] = dynamo.explain(PriorObjective(prior, 0, label_dropout=0.1))(codes).graph_break_count
print(json.dumps(results))
"""


def test_compiled_networks() -> None:
    root = Path(__file__).parents[1]
    finished = subprocess.run([sys.executable, "-c", SCRIPT], cwd=root, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    results = json.loads(finished.stdout.splitlines()[-1])
    for kind in ("autoencoder", "pixelsnail", "pixelcnn", "transformer", "wavefront"):
        assert results[kind] == 0, f"graph breaks of {kind}"
    for eager, compiled in results["steps"]:
        assert len(eager) > 20
        for ours, theirs in zip(eager, compiled, strict=True):
            assert abs(ours - theirs) <= 1e-4 * abs(ours) + 1e-6
