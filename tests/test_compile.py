"""torch.compile: priors are one graph, and a compiled autoencoder step equals an eager one, also under bf16.

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
from train.stages.autoencoder import AutoencoderObjective, exclude_from_compilation
from train.stages.prior import PriorObjective
from vqvae2 import AutoencoderConfig, PixelCNNConfig, PixelSNAILConfig, PriorSpec, TransformerConfig
from vqvae2.data.code_store import CodeBatch
from vqvae2.data.images import ImageSample

torch.set_num_threads(1)
torch.manual_seed(0)
network = AutoencoderConfig(channels=8, residual_channels=4, residual_layers=1).build((16, 16)).train()
batch = ImageSample(torch.randint(256, (3, 3, 16, 16), dtype=torch.uint8), torch.zeros(3, dtype=torch.int64))
eager = AutoencoderObjective(network)
eager(batch)  # k-means
for quantizer in network.quantizers:
    quantizer.update()
compiled = copy.deepcopy(eager)
exclude_from_compilation(compiled.network)
results = {"steps": []}
for enabled in (False, True):
    step = []
    for objective in (eager, torch.compile(compiled, backend="aot_eager")):
        objective.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss, _ = objective(batch)
        loss.backward()
        norms = [float(p.grad.norm()) for p in objective.parameters() if p.grad is not None]
        step.append([float(loss.detach()), *norms])
    results["steps"].append(step)
bottom, top = network.map_specs
codes = CodeBatch((torch.randint(512, (2, 4, 4)), torch.randint(512, (2, 2, 2))), torch.tensor([0, 2]))
for config in (
    PixelSNAILConfig(channels=8, residual_channels=8, blocks=2, layers=1, heads=2, kernel=3),
    PixelCNNConfig(channels=8, layers=2, output_channels=8, kernel=3),
    TransformerConfig(channels=8, layers=2, heads=2),
):
    dynamo.reset()
    prior = config.build(PriorSpec(level=bottom, coarser=(top,), num_classes=3)).train()
    results[config.kind] = dynamo.explain(PriorObjective(prior, 0, label_dropout=0.1))(codes).graph_break_count
print(json.dumps(results))
"""


def test_compiled_networks() -> None:
    root = Path(__file__).parents[1]
    finished = subprocess.run([sys.executable, "-c", SCRIPT], cwd=root, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    results = json.loads(finished.stdout.splitlines()[-1])
    for kind in ("pixelsnail", "pixelcnn", "transformer"):
        assert results[kind] == 0, f"graph breaks of {kind}"
    for eager, compiled in results["steps"]:
        assert len(eager) > 20
        for ours, theirs in zip(eager, compiled, strict=True):
            assert abs(ours - theirs) <= 1e-4 * abs(ours) + 1e-6
