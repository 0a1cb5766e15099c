"""Training steps: ours, ours with one thing changed at a time, and ways in which users write them without us.

    python -m benchmarks.train_step --data-dir data/flickr8k                  `lite` on real photographs and captions
    python -m benchmarks.train_step --system gemma-like --memory              301 M parameters, vocabulary of 256,000
    python -m benchmarks.train_step --system dinov2-gemma --device cuda       full size, random weights
    python -m benchmarks.train_step --tiny                                    does it run at all?

All variants train on the same captions with the same frozen models, optimizer, autocast dtype and threads; a sample is
a caption trained. Before anything is timed, the loss of ours and of the published recipe's step on these captions must
agree within 1 %. `benchmarks/baselines.py` says what the baselines do and how they differ.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from benchmarks import harness
from benchmarks.baselines import (
    CaptionDataset,
    clipcap_step,
    collate,
    encoder_decoder_step,
    hugging_face_step,
    published_loss,
    published_step,
)
from benchmarks.harness import Report, Variant
from benchmarks.systems import SYSTEMS, System, SystemName, build_system, own_captioner, recipe_of
from vlm_bridge import device
from vlm_bridge.configuration import Recipe, override_recipe
from vlm_bridge.data_pipeline.loader import IGNORE_INDEX, in_batches, prefetch, whole_rows
from vlm_bridge.model_architecture.captioner import CaptionModel, trained_parameters
from vlm_bridge.training_strategy.data import epoch_plan
from vlm_bridge.training_strategy.step import adamw
from vlm_bridge.training_strategy.validation import Features, LoadedBatch, batch_loss, load_batch

OURS, HUGGING_FACE, PUBLISHED = "ours", "hugging-face", "published"
ENCODER_DECODER, CLIPCAP = "encoder-decoder", "clipcap"
COMPILED = "compile"
LOSSES_AGREE_WITHIN = 1e-2
Step = Callable[[], object]


# Ours.


def summed_loss(model: CaptionModel, batch: LoadedBatch) -> torch.Tensor:
    return batch_loss(model, batch).total


def full_logits_loss(model: CaptionModel, batch: LoadedBatch) -> torch.Tensor:
    """The same from float32 logits of every position, pads included."""
    input_ids, labels, segments, _, features = batch.tensors
    image = model.image_inputs(model.features(features))
    states = model.text_states(input_ids, image, segments, batch.places)
    logits = model.language_model.head(states).float()
    return nn.functional.cross_entropy(
        logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORE_INDEX, reduction="sum"
    )


def our_step(
    system: System,
    *,
    features: Features | None = None,
    loss_of: Callable[[CaptionModel, LoadedBatch], torch.Tensor] = summed_loss,
) -> Step:
    """Train on all captions of a system once, as the trainer does: its batches, its loss, its optimizer."""
    recipe, model, data = system.recipe, system.model, system.data
    images = system.features if features is None else features
    batches = epoch_plan(recipe, data.captions_per_image, data.caption_lengths).batches(0)
    trained = trained_parameters(model, recipe.trainable)
    parameters = [parameter for _, parameter, _ in trained]
    optimizer, _ = adamw(trained, recipe)

    def load(index: int) -> LoadedBatch:
        packed = data.pack(batches[index], share_rows=model.bridge.shares_rows)
        return load_batch(packed, images, model.device)

    def run() -> None:
        device.keep_freed_memory()  # as the trainer
        loaded = prefetch(range(len(batches)), load, recipe.num_workers)
        while group := list(islice(loaded, recipe.gradient_accumulation_steps)):
            num_supervised = sum(batch.packed.num_supervised for batch in group)
            for batch in group:
                with autocast(system):
                    loss = loss_of(model, batch) / num_supervised
                loss.backward()
            nn.utils.clip_grad_norm_(parameters, recipe.gradient_clip_val)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    return run


def autocast(system: System) -> Any:
    return device.autocast(system.model.device, system.recipe.autocast_dtype)


def changed(system: System, *overrides: str) -> System:
    return dataclasses.replace(system, recipe=override_recipe(system.recipe, overrides))


def like_lengths(system: System) -> Step:
    """Batches of rows of like length, as many positions in each as the batches of ours have on average."""
    positions = system.data.caption_lengths.mean() * system.recipe.batch_size
    return our_step(changed(system, f"tokens_per_batch={round(float(positions))}"))


def with_sdpa(system: System) -> Step:
    """The same step with torch's fused attention in the language model."""
    step = our_step(system)

    def run() -> None:
        with system.model.language_model.use_attention("sdpa"):
            step()

    return run


def compiled(system: System) -> Step:
    """Ours with ``compile: true``; the unmeasured call compiles."""
    own = own_captioner(system)
    own.model.language_model.compile_body()
    return our_step(own)


VARIANTS: dict[str, Callable[[System], Step]] = {
    OURS: our_step,
    "no-feature-cache": lambda system: our_step(system, features=system.pixels),
    "no-packing": lambda system: our_step(changed(system, "captions_per_image=1")),
    "full-logits": lambda system: our_step(system, loss_of=full_logits_loss),
    "like-lengths": like_lengths,
    "random-batches": lambda system: our_step(changed(system, "tokens_per_batch=null")),
    "no-autocast": lambda system: our_step(changed(system, "amp_dtype=float32")),
    "sdpa": with_sdpa,
    "enter-at-layer-0": lambda system: our_step(own_captioner(system, enter_at_layer=0)),
    "enter-at-one-third": lambda system: our_step(
        own_captioner(system, enter_at_layer=system.model.language_model.shape.num_layers // 3)
    ),
    COMPILED: compiled,
    HUGGING_FACE: hugging_face_step,
    PUBLISHED: published_step,
    ENCODER_DECODER: encoder_decoder_step,
    CLIPCAP: clipcap_step,
}
"""In the order of the table: ours, ours with one thing changed, and the baselines."""


def applicable(name: SystemName, recipe: Recipe) -> list[str]:
    """The variants that differ from ours for a system; not the compiled one, which takes minutes to begin."""
    without = {COMPILED}
    if recipe.captions_per_image == 1:
        without.add("no-packing")
    entered = getattr(recipe.bridge, "enter_at_layer", 0)
    without.add("enter-at-one-third" if entered else "enter-at-layer-0")
    without.add("random-batches" if recipe.tokens_per_batch is None else "like-lengths")
    if name != "lite":
        without.add("sdpa")  # it cannot soft-cap scores: Gemma 2 would be another model
    return [variant for variant in VARIANTS if variant not in without]


# What is measured.


def losses(system: System) -> tuple[float, float]:
    """Mean loss per token of all captions, by our step and by the published one, without dropout."""
    recipe, model, data = system.recipe, system.model.eval(), system.data
    ours, plain = torch.zeros(2, device=model.device)
    with torch.no_grad():
        rows = whole_rows(data.captions_per_image)
        for some in in_batches(rows, max(1, recipe.batch_size // recipe.captions_per_image)):
            with autocast(system):
                ours += summed_loss(
                    model, load_batch(data.pack(some), system.features, model.device)
                )
        supervised = 0
        captions = CaptionDataset(system)
        for some in in_batches(range(len(captions)), recipe.batch_size):
            batch = collate([captions[index] for index in some])
            of_batch = int((batch["labels"] != IGNORE_INDEX).sum())
            with autocast(system):
                plain += of_batch * published_loss(
                    system, {k: v.to(model.device) for k, v in batch.items()}
                )
            supervised += of_batch
    model.train()
    return ours.item() / supervised, plain.item() / supervised


def num_tokens(system: System) -> int:
    """Tokens of all captions; a call of a variant trains on each once."""
    return int(system.data.caption_lengths.sum())


def step_flops(system: System) -> float:
    """Of a call of a variant; only what a language model needs (`harness.training_flops`).

    Keys and values that BLIP's decoder makes of image tokens count as often as there are images.
    """
    model: Any = system.model
    language_model = model.language_model
    below = {
        parameter
        for layer in language_model.layers()[: getattr(model.bridge, "first_layer", 0)]
        for parameter in layer.parameters()
    }
    table, head = (
        language_model.causal_lm.get_input_embeddings().weight,
        set(language_model.head_module.parameters()),
    )
    flops = 0.0
    for name, parameter in language_model.named_parameters():
        if (
            parameter.ndim < 2
            or "position_embeddings" in name
            or (parameter is table and table not in head)
        ):
            continue
        rows = num_tokens(system)
        if "crossattention.self.key" in name or "crossattention.self.value" in name:
            rows = len(system.data) * model.vision_encoder.num_tokens
        flops += harness.training_flops(
            parameter.numel(),
            rows,
            is_trained=parameter.requires_grad,
            passes_gradient=parameter not in below,
        )
    return flops


def build(options: argparse.Namespace, device: torch.device) -> System:
    batch_size = options.batch_size
    changes = [f"seed={options.seed}"]
    if batch_size is not None:
        changes.append(f"batch_size={batch_size}")
        recipe = recipe_of(options.system, tiny=options.tiny)
        if recipe.tokens_per_batch is not None:
            changes.append(
                f"tokens_per_batch={recipe.tokens_per_batch * batch_size // recipe.batch_size}"
            )
    changes += options.changes
    captions = options.captions or (
        20 if options.tiny else {"lite": 160, "gemma-like": 32}.get(options.system, 64)
    )
    return build_system(
        options.system,
        device,
        num_captions=max(captions, batch_size or 0),
        seed=options.seed,
        tiny=options.tiny,
        data_dir=options.data_dir,
        changes=changes,
    )


def peak_of(options: argparse.Namespace, device: torch.device) -> harness.Peak:
    """Peak of one variant, when only its own models are left in this process."""
    system = build(options, device)
    step = VARIANTS[options.peak_of](system)
    del system  # a variant keeps what it uses
    gc.collect()
    return harness.watch_peak(step, device)


def write_profile(step: Step, device: torch.device, path: Path) -> None:
    """The operators of one call, those that take most time of the device first (torch.profiler)."""
    step()
    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities) as profiler:
        step()
        if on_gpu:
            torch.cuda.synchronize(device)
    order = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(profiler.key_averages().table(sort_by=order, row_limit=40), encoding="utf-8")


def child_arguments(options: argparse.Namespace, variant: str) -> list[str]:
    """The command line of a process that measures the peak of one variant."""
    arguments = [
        "--system",
        options.system,
        "--device",
        options.device,
        "--seed",
        str(options.seed),
    ]
    arguments += ["--peak-of", variant, *options.changes]
    for name in ("data_dir", "batch_size", "captions"):
        if (value := getattr(options, name)) is not None:
            arguments += [f"--{name.replace('_', '-')}", str(value)]
    return [*arguments, "--tiny"] if options.tiny else arguments


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = harness.argument_parser(__doc__)
    parser.add_argument("--system", choices=SYSTEMS, default="lite")
    parser.add_argument("--data-dir", type=Path, help="caption folder of lite (its recipe's)")
    parser.add_argument("--batch-size", type=int, help="captions in a batch (the recipe's)")
    parser.add_argument("--captions", type=int, help="captions trained in one measured call")
    parser.add_argument(
        "--variants", nargs="+", choices=list(VARIANTS), help="only these (all that apply)"
    )
    parser.add_argument(
        "--memory", action="store_true", help="measure peaks too, each in a process of its own"
    )
    parser.add_argument(
        "--profile", type=Path, metavar="FILE", help="write where the time of ours goes"
    )
    parser.add_argument("--peak-of", choices=list(VARIANTS), help=argparse.SUPPRESS)
    parser.add_argument("changes", nargs="*", metavar="KEY=VALUE", help="overrides of the recipe")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse_arguments(arguments)
    device = harness.prepare(options)
    if options.peak_of:
        harness.print_peak(peak_of(options, device))
        return 0

    system = build(options, device)
    names = options.variants or applicable(options.system, system.recipe)
    print(
        f"{options.system}: {system.data.num_captions} captions of {len(system.data)} images, "
        f"{num_tokens(system)} tokens, batches of {system.recipe.batch_size} captions"
    )
    ours_loss, plain_loss = losses(system)
    print(f"loss per token: {ours_loss:.4f} ours, {plain_loss:.4f} published")
    if abs(ours_loss - plain_loss) > LOSSES_AGREE_WITHIN * abs(plain_loss):
        print("FAILED: the losses differ, the variants do not do the same work")
        return 1

    work = {"samples": system.data.num_captions, "tokens": num_tokens(system)}
    variants = [
        Variant(
            name,
            VARIANTS[name](system),
            **work,
            flops=None if name == ENCODER_DECODER else step_flops(system),
        )
        for name in names
    ]
    dtype = getattr(torch, system.recipe.amp_dtype)
    report = Report(
        harness.measure(variants, options.repeats, device),
        device,
        options.seed,
        harness.matmul_flops_per_second(device, dtype, tiny=options.tiny),
    )
    if options.profile is not None:
        write_profile(our_step(system), device, options.profile)
    if options.memory:
        del system, variants
        gc.collect()
        for name in names:
            report.add_peak(
                name, harness.peak_in_child("benchmarks.train_step", child_arguments(options, name))
            )
    if OURS in names:
        report.add_peak_share(OURS)
        for name in names:
            if name != OURS:
                report.add_ratio(OURS, name)
                report.add_memory_ratio(OURS, name)
    report.finish(options.json)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
