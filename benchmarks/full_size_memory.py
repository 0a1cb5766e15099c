"""The DINOv2-large + Gemma-2-2B system at full size with random weights: what a training step allocates.

    python -m benchmarks.full_size_memory                                        # one step on the CPU, about 10 GiB
    python -m benchmarks.full_size_memory --device cuda --batch-size 8 --steps 10
    python -m benchmarks.full_size_memory --tiny                                 # the same checks in seconds

Runs forward and backward in bfloat16 while every tensor that an operator makes is looked at, and torch's profiler
counts allocations. It fails unless the logits of the whole batch never exist in float32, a gradient reaches every
parameter of the bridge, and no frozen one.
"""

from __future__ import annotations

import argparse
import math
import time
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.systems import as_if_trained, random_captioner, random_configs
from vlm_bridge.configuration import DEFAULT_RECIPE, Recipe, load_recipe, shipped_recipe
from vlm_bridge.device import autocast, peak_rss_gib, resolve_device
from vlm_bridge.model_architecture.captioner import CaptionModel, trained_parameters
from vlm_bridge.training_strategy.step import adamw

MIB = 2**20


class TensorWatch(TorchDispatchMode):
    """Remembers the largest tensor made, and the largest float32 one whose rows are as long as the vocabulary.

    Views of weights are not made: the head's transposed weight has the vocabulary for its last dimension too.
    """

    def __init__(self, model: torch.nn.Module, vocab_size: int):
        super().__init__()
        self.vocab_size = vocab_size
        self.weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
        self.largest = (0, "nothing")
        self.largest_logits = (0, "nothing")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if (
                isinstance(tensor, torch.Tensor)
                and tensor.untyped_storage().data_ptr() not in self.weights
            ):
                size = tensor.numel() * tensor.element_size()
                seen = (
                    size,
                    f"{list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')} by {func}",
                )
                self.largest = max(self.largest, seen)
                if tensor.dtype == torch.float32 and tensor.shape[-1:] == (self.vocab_size,):
                    rows = tensor.numel() // self.vocab_size
                    self.largest_logits = max(self.largest_logits, (rows, seen[1]))
        return result


def training_loss(model: CaptionModel, batch_size: int, caption_tokens: int) -> torch.Tensor:
    """Mean loss per token of random captions of random pictures; every position is supervised."""
    encoder: Any = model.vision_encoder
    shape = (batch_size, caption_tokens)
    ids, labels = (
        torch.randint(model.language_model.text_config.vocab_size, shape, device=model.device)
        for _ in range(2)
    )
    pixels = torch.randn(batch_size, 3, encoder.image_size, encoder.image_size)
    with autocast(model.device, "bfloat16"):
        state = model.image_inputs(model.features(pixels))
        loss = model.caption_loss(ids, labels, torch.ones_like(ids), state)
    return loss.total / loss.num_tokens


def largest_allocation(profiler: Any) -> tuple[float, str]:
    """Bytes and name of the operator that allocated most in one call, by torch's profiler."""
    return max(
        (float(max(event.self_cpu_memory_usage, event.self_device_memory_usage)), event.name)
        for event in profiler.events()
    )


def watched_step(model: CaptionModel, batch_size: int, caption_tokens: int) -> list[str]:
    """Run one forward and backward pass, print what it made, and return what is wrong with it."""
    on_gpu = model.device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    watch = TensorWatch(model, model.language_model.text_config.vocab_size)
    start = time.perf_counter()
    with profile(activities=activities, profile_memory=True) as profiler, watch:
        loss = training_loss(model, batch_size, caption_tokens)
        loss.backward()
    seconds = time.perf_counter() - start

    vocab_size = watch.vocab_size
    positions = batch_size * caption_tokens
    logits_rows, logits = watch.largest_logits
    allocated, operator = largest_allocation(profiler)
    bridge = dict(model.bridge.named_parameters())
    missing = [name for name, parameter in bridge.items() if parameter.grad is None]
    # A key's bias moves all scores of a query alike, and a softmax does not see that: its gradient is rounding.
    zero = [
        name
        for name, parameter in bridge.items()
        if name != "key.bias" and parameter.grad is not None and not parameter.grad.any()
    ]
    frozen = [
        name for name, p in model.named_parameters() if not p.requires_grad and p.grad is not None
    ]
    print(
        f"loss                 {loss.item():.3f} nats/token (uniform: {math.log(vocab_size):.3f})"
    )
    print(f"largest tensor       {watch.largest[0] / MIB:.1f} MiB: {watch.largest[1]}")
    print(f"largest allocation   {allocated / MIB:.1f} MiB in one call of {operator} (profiler)")
    print(f"largest logits       {logits}")
    print(
        f"  instead of         {[batch_size, caption_tokens, vocab_size]}, {positions * vocab_size * 4 / MIB:.1f} MiB"
    )
    print(
        f"gradients            {len(bridge) - len(missing)} of {len(bridge)} of the bridge, {len(frozen)} frozen"
    )
    print(f"forward + backward   {seconds:.1f} s, watched")

    problems = []
    # The last position of a caption may go unsupervised: one row less would be the whole batch as well.
    if logits_rows >= positions - batch_size:
        problems.append(f"logits of the whole batch exist in float32: {logits}")
    if missing or zero:
        problems.append(f"no gradient reaches {', '.join(missing + zero)}")
    if frozen:
        problems.append(f"frozen parameters have gradients: {', '.join(frozen[:3])}")
    if not math.isfinite(loss.item()):
        problems.append(f"the loss is {loss.item()}")
    return problems


def timed_steps(
    model: CaptionModel, recipe: Recipe, batch_size: int, caption_tokens: int, steps: int
) -> None:
    """Print samples per second of whole training steps, without a watch, after one to warm up."""
    optimizer, _ = adamw(trained_parameters(model, recipe.trainable), recipe)
    start = 0.0
    for step in range(steps + 1):
        if step == 1:
            start = time.perf_counter()
        training_loss(model, batch_size, caption_tokens).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if model.device.type == "cuda":
            torch.cuda.synchronize()
    print(
        f"training steps       {steps * batch_size / (time.perf_counter() - start):.2f} samples/s, pictures encoded"
    )


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument(
        "--caption-tokens", type=int, help="of each caption (64; tiny: 512, as logits are small)"
    )
    parser.add_argument("--steps", type=int, default=0, help="training steps to time as well")
    parser.add_argument("--gradient-checkpointing", action="store_true")
    parser.add_argument(
        "--tiny", action="store_true", help="small random models of the same classes"
    )
    options = parser.parse_args()
    caption_tokens = options.caption_tokens or (512 if options.tiny else 64)

    torch.manual_seed(0)
    recipe = load_recipe(shipped_recipe(DEFAULT_RECIPE))
    model = random_captioner(recipe, *random_configs("dinov2-gemma", tiny=options.tiny))
    as_if_trained(model.bridge, seed=0)
    model.train()
    if options.gradient_checkpointing:
        model.language_model.checkpoint_activations()
    model.to(resolve_device(options.device))
    parameters = sum(p.numel() for p in model.parameters())
    print(
        f"torch {torch.__version__}, {model.device}, {torch.get_num_threads()} threads, {parameters:,} parameters"
    )
    print(
        f"one batch of {options.batch_size} pictures, captions of {caption_tokens} tokens, bfloat16"
    )
    problems = watched_step(model, options.batch_size, caption_tokens)
    if options.steps:
        timed_steps(model, recipe, options.batch_size, caption_tokens, options.steps)
    if model.device.type == "cuda":
        print(f"peak GPU memory      {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB")
    print(f"peak resident memory {peak_rss_gib():.1f} GiB")
    print("\n".join(f"FAILED: {problem}" for problem in problems) or "all checks hold")
    return int(bool(problems))


if __name__ == "__main__":
    raise SystemExit(main())
