"""Captioning: ours, ours with one thing changed at a time, the published loop, and the decoder's own `generate` alone.

    python -m benchmarks.caption --checkpoint bundled --data-dir data/flickr8k                real models and pictures
    python -m benchmarks.caption --system pvt-blip --images 64                                full size, random weights
    python -m benchmarks.caption --system dinov2-gemma --device cuda --compile --images 256   full size, random weights
    python -m benchmarks.caption --tiny                                                       does it run at all?

A sample is a picture captioned, from its file (or random pixels) to token ids. All variants search the same way with
the same models. The published loop captions one picture after another and runs encoder, bridge and the whole text so
far through the models for every token of every beam; slow variants caption fewer pictures, and speeds are per picture.
Plain generate is what a user of transformers writes with the same decoder: no scores of captions, and for pvt-blip
nothing of ours but the weights.

Before anything is timed, ours, the published loop and `generate` must find the same captions in float32. In bfloat16
the three round differently, and of two captions that are equally likely but for that, either may win: how many are the
same is printed.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import harness
from benchmarks.harness import Report, Variant
from benchmarks.systems import (
    EOS,
    START,
    as_if_trained,
    random_captioner,
    random_configs,
    recipe_of,
)
from vlm_bridge.captioning.pipeline import DECODE_AHEAD, Captioner
from vlm_bridge.configuration import DecodeSettings
from vlm_bridge.data_pipeline.caption_folder import CaptionFolder
from vlm_bridge.data_pipeline.images import open_image
from vlm_bridge.data_pipeline.loader import in_batches, prefetch
from vlm_bridge.device import autocast
from vlm_bridge.model_architecture.attach import attach
from vlm_bridge.model_architecture.captioner import CaptionModel

OURS, PUBLISHED, PLAIN = "ours", "published loop", "plain generate"
Captions = list[list[int]]
SYSTEMS = ("lite", "dinov2-gemma", "pvt-blip")


@dataclass(frozen=True)
class Subject:
    """A captioner, pictures to caption, and how.

    Attributes:
        load: pixels [len, 3, h, w] of pictures by index: opened and preprocessed, or random.
        amp_dtype: autocast's, None for none.
    """

    model: CaptionModel
    load: Callable[[Sequence[int]], torch.Tensor]
    prompt_ids: list[int]
    decode: DecodeSettings
    amp_dtype: str | None

    def autocast(self) -> Any:
        return autocast(self.model.device, self.amp_dtype)


CaptionBatch = Callable[[Subject, torch.Tensor], Captions]


# Ways to caption a batch of pictures.


def ours(subject: Subject, pixels: torch.Tensor) -> Captions:
    features = subject.model.features(pixels)
    with subject.autocast():
        captions = subject.model.generate(features, subject.prompt_ids, subject.decode)
    return [caption.ids for caption in captions]


@torch.inference_mode()
def plain_generate(subject: Subject, pixels: torch.Tensor, *, use_cache: bool = True) -> Captions:
    """The decoder's own `generate`, with the options that a user of transformers gives it."""
    model, decode = subject.model, subject.decode
    causal_lm: Any = model.language_model.causal_lm
    features = model.features(pixels)
    prompt = torch.tensor([subject.prompt_ids] * len(pixels), device=model.device)
    options: dict[str, Any] = {
        "attention_mask": torch.ones_like(prompt),
        "num_beams": decode.num_beams,
        "max_new_tokens": decode.max_new_tokens,
        "min_new_tokens": decode.min_new_tokens or None,
        "no_repeat_ngram_size": decode.no_repeat_ngram_size,
        "length_penalty": decode.length_penalty if decode.num_beams > 1 else None,
        "eos_token_id": model.language_model.eos_id,
        "pad_token_id": model.language_model.eos_id,
        "use_cache": use_cache,
    }
    with subject.autocast():
        image = model.image_inputs(features)
        if image.encoder_hidden_states is not None:
            states = image.encoder_hidden_states.to(causal_lm.dtype)
            rows = causal_lm.generate(
                prompt, encoder_hidden_states=states, is_decoder=True, **options
            )
        else:
            with attach(model.language_model, image) as attached:
                rows = causal_lm.generate(**attached.inputs(prompt), **options)
    return [until_eos(subject, row) for row in rows[:, prompt.shape[1] :].tolist()]


@torch.inference_mode()
def without_cache(subject: Subject, pixels: torch.Tensor) -> Captions:
    """Every token reads the whole text so far."""
    return plain_generate(subject, pixels, use_cache=False)


def until_eos(subject: Subject, ids: list[int]) -> list[int]:
    eos = subject.model.language_model.eos_id
    return ids[: ids.index(eos)] if eos in ids else ids


@torch.inference_mode()
def read_twice(subject: Subject, pixels: torch.Tensor) -> Captions:
    """Ours, and then scores from a second pass of all captions through the language model."""
    captions = ours(subject, pixels)
    model = subject.model
    eos: Any = model.language_model.eos_id
    longest = max(map(len, captions))
    ids = torch.tensor(
        [
            [*subject.prompt_ids, *caption, *[eos] * (longest + 1 - len(caption))]
            for caption in captions
        ],
        device=model.device,
    )
    with subject.autocast():
        states = model.text_states(ids[:, :-1], model.image_inputs(model.features(pixels)))
        log_probs = model.language_model.head(states).float().log_softmax(-1)
    log_probs.gather(-1, ids[:, 1:, None]).sum().item()
    return captions


@torch.inference_mode()
def published_loop(subject: Subject, pixels: torch.Tensor) -> Captions:
    return [published_caption(subject, picture[None]) for picture in pixels]


def published_caption(subject: Subject, picture: torch.Tensor) -> list[int]:
    """Beam search as `generate` defines it (`early_stopping=False`), the plain way: nothing is kept between tokens."""
    decode, eos = subject.decode, subject.model.language_model.eos_id
    beams, running, ended = decode.num_beams, [(0.0, [])], []
    for length in range(1, decode.max_new_tokens + 1):
        candidates = [
            (total + value, [*ids, token])
            for total, ids in running
            for value, token in likeliest(next_log_probs(subject, picture, ids), 2 * beams)
        ]
        candidates = sorted(candidates, key=lambda candidate: candidate[0], reverse=True)[
            : 2 * beams
        ]
        is_last = length == decode.max_new_tokens
        stops = [is_last or ids[-1] == eos for _, ids in candidates]
        ended += [
            (total / length**decode.length_penalty, ids)
            for (total, ids), stop in zip(candidates[:beams], stops, strict=False)
            if stop
        ]
        ended = sorted(ended, key=lambda caption: caption[0], reverse=True)[:beams]
        running = [
            candidate for candidate, stop in zip(candidates, stops, strict=True) if not stop
        ][:beams]
        best_possible = running[0][0] / length**decode.length_penalty if running else float("-inf")
        if is_last or (len(ended) == beams and best_possible <= ended[-1][0]):
            break
    return until_eos(subject, ended[0][1])


def next_log_probs(subject: Subject, picture: torch.Tensor, ids: list[int]) -> torch.Tensor:
    """Log-probabilities [vocabulary] of the token behind ``ids``, from pixels on."""
    model, decode = subject.model, subject.decode
    features = model.features(picture)
    row = torch.tensor([[*subject.prompt_ids, *ids]], device=model.device)
    with subject.autocast():
        logits = model(row, model.image_inputs(features))[0, -1]
    log_probs = logits.float().log_softmax(-1)
    if (n := decode.no_repeat_ngram_size) > 0:
        text = row[0].tolist()
        said = [text[start : start + n] for start in range(len(text) - n + 1)]
        log_probs[[words[-1] for words in said if words[:-1] == text[len(text) - n + 1 :]]] = float(
            "-inf"
        )
    if len(ids) < decode.min_new_tokens:
        log_probs[model.language_model.eos_id] = float("-inf")
    return log_probs


def likeliest(log_probs: torch.Tensor, count: int) -> list[tuple[float, int]]:
    values, tokens = log_probs.topk(count)
    return list(zip(values.tolist(), tokens.tolist(), strict=True))


# Variants.


@dataclass(frozen=True)
class Way:
    """How a variant captions.

    Attributes:
        change: what it changes of the subject.
        batch_size: pictures in a batch; None for the run's.
        ahead: batches that are opened and preprocessed while another is captioned.
        is_slow: caption only ``--baseline-images`` pictures.
    """

    caption_batch: CaptionBatch = ours
    change: Callable[[Subject], Subject] = lambda subject: subject
    batch_size: int | None = None
    ahead: int = DECODE_AHEAD
    is_slow: bool = False

    def run(self, subject: Subject, num_images: int, batch_size: int) -> Captions:
        batches = in_batches(range(num_images), self.batch_size or batch_size)
        pixels = prefetch(batches, subject.load, self.ahead)
        return [ids for batch in pixels for ids in self.caption_batch(subject, batch)]


def in_float32(subject: Subject) -> Subject:
    model = copy.deepcopy(subject.model)
    model.language_model.float()
    return dataclasses.replace(subject, model=model, amp_dtype=None)


def with_static_cache(subject: Subject) -> Subject:
    model = copy.copy(subject.model)  # the same weights
    model.use_static_cache()
    return dataclasses.replace(subject, model=model)


WAYS: dict[str, Way] = {
    OURS: Way(),
    "batch 1": Way(batch_size=1),
    "batch 8": Way(batch_size=8),
    "batch 16": Way(batch_size=16),
    "batch 32": Way(batch_size=32),
    "batch 64": Way(batch_size=64),
    "compiled step": Way(change=with_static_cache),
    "no KV cache": Way(without_cache, is_slow=True),
    "scores by a second pass": Way(read_twice),
    "nothing read ahead": Way(ahead=0),
    "float32": Way(change=in_float32),
    PLAIN: Way(plain_generate),
    PUBLISHED: Way(published_loop, batch_size=1, is_slow=True),
}
"""In the order of the table: ours, ours with one thing changed, and the baselines."""


def applicable(options: argparse.Namespace) -> list[str]:
    """All variants that are not ours under another name; a step is compiled only when asked for."""
    same = {f"batch {options.batch_size}"}
    return [
        name for name in WAYS if name not in same and (options.compile or name != "compiled step")
    ]


def pictures_of(options: argparse.Namespace, name: str) -> int:
    """How many pictures a call of a variant captions."""
    if name == OURS:
        return options.images
    return min(
        options.images, options.baseline_images if WAYS[name].is_slow else options.variant_images
    )


# Subjects.


def build(options: argparse.Namespace, device: torch.device) -> Subject:
    subject = (
        _random(options, device) if options.tiny or options.system != "lite" else _lite(options)
    )
    changes = {"num_beams": options.num_beams, "max_new_tokens": options.max_new_tokens}
    given = {key: value for key, value in changes.items() if value is not None}
    return dataclasses.replace(subject, decode=subject.decode.replace(**given))


def _lite(options: argparse.Namespace) -> Subject:
    captioner = Captioner.from_pretrained(options.checkpoint, options.device)
    recipe, encoder = captioner.recipe, captioner.model.vision_encoder
    paths = [
        image.path for image in CaptionFolder.open(options.data_dir or recipe.data_dir).split("val")
    ]
    options.images = min(options.images, len(paths))
    return Subject(
        captioner.model,
        lambda indices: encoder.preprocess([open_image(paths[index]) for index in indices]),  # type: ignore[operator]
        captioner.format.prompt_ids,
        recipe.decode.replace(object_threshold=0.0),  # plain generate puts no words into prompts
        recipe.autocast_dtype,
    )


def _random(options: argparse.Namespace, device: torch.device) -> Subject:
    """A system of random weights. Its captions hardly ever end by themselves: all have as many tokens as asked for."""
    recipe = recipe_of(options.system, tiny=options.tiny)
    with device:
        model = random_captioner(recipe, *random_configs(options.system, tiny=options.tiny)).eval()
    as_if_trained(model.bridge, options.seed)
    model.language_model.start_id, model.language_model.eos_id = START, EOS
    size: Any = model.vision_encoder.image_size

    def load(indices: Sequence[int]) -> torch.Tensor:
        return torch.stack(
            [
                torch.randn(3, size, size, generator=torch.Generator().manual_seed(index))
                for index in indices
            ]
        )

    num_beams = {"lite": 3, "dinov2-gemma": 1, "pvt-blip": recipe.decode.num_beams}[options.system]
    decode = DecodeSettings(num_beams=num_beams, max_new_tokens=6 if options.tiny else 40)
    return Subject(model, load, [START], decode, recipe.autocast_dtype)


# What is measured.


def same_captions(subject: Subject, options: argparse.Namespace) -> bool:
    """Print how many captions of ours the published loop and `generate` find as well; whether all, in float32."""
    num_images = pictures_of(options, PUBLISHED)
    all_same = True
    for precision, one in (("float32", in_float32(subject)), ("as measured", subject)):
        found = {
            name: WAYS[name].run(one, num_images, options.batch_size)
            for name in (OURS, PUBLISHED, PLAIN)
        }
        for name in (PUBLISHED, PLAIN):
            same = sum(a == b for a, b in zip(found[OURS], found[name], strict=True))
            print(f"same captions: {same}/{num_images} ({precision}, {OURS} and {name})")
            all_same &= same == num_images or precision != "float32"
    return all_same


def peak_of(options: argparse.Namespace, device: torch.device) -> harness.Peak:
    """Peak of one variant, in a process that has its models alone."""
    way = WAYS[options.peak_of]
    subject = way.change(build(options, device))
    gc.collect()
    num_images = pictures_of(options, options.peak_of)
    return harness.watch_peak(
        lambda: way.run(subject, num_images, options.batch_size), device, times=1
    )


def child_arguments(options: argparse.Namespace, name: str) -> list[str]:
    """The command line of a process that measures the peak of one variant."""
    arguments = ["--peak-of", name, "--system", options.system, "--device", options.device]
    for key in (
        "checkpoint", "data_dir", "images", "variant_images", "baseline_images", "num_beams", "max_new_tokens",
        "batch_size", "seed",
    ):  # fmt: skip
        if (value := getattr(options, key)) is not None:
            arguments += [f"--{key.replace('_', '-')}", str(value)]
    return [*arguments, "--tiny"] if options.tiny else arguments


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = harness.argument_parser(__doc__, repeats=3)
    parser.add_argument("--system", choices=SYSTEMS, default="lite")
    parser.add_argument(
        "--checkpoint", type=Path, default=Path("bundled"), help="of lite"
    )
    parser.add_argument("--data-dir", type=Path, help="caption folder of lite (its recipe's)")
    parser.add_argument(
        "--images", type=int, help="pictures that ours captions in a measured call (1000)"
    )
    parser.add_argument(
        "--variant-images", type=int, default=128, help="pictures of the other variants"
    )
    parser.add_argument(
        "--baseline-images", type=int, default=24, help="pictures of the slow variants"
    )
    parser.add_argument("--num-beams", type=int, help="beams (its recipe's; dinov2-gemma: 1)")
    parser.add_argument("--max-new-tokens", type=int, help="longest caption (lite: its recipe's)")
    parser.add_argument("--batch-size", type=int, help="pictures in a batch (32; dinov2-gemma: 64)")
    parser.add_argument("--compile", action="store_true", help="measure the compiled step as well")
    parser.add_argument(
        "--variants", nargs="+", choices=list(WAYS), help="only these (all that apply)"
    )
    parser.add_argument(
        "--memory", action="store_true", help="measure peaks too, each in a process of its own"
    )
    parser.add_argument("--peak-of", choices=list(WAYS), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.images is None:
        options.images = 6 if options.tiny else 1000
    if options.batch_size is None:
        options.batch_size = 4 if options.tiny else 64 if options.system == "dinov2-gemma" else 32
    if options.tiny:
        options.baseline_images = min(options.baseline_images, 3)
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse_arguments(arguments)
    device = harness.prepare(options)
    if options.peak_of:
        harness.print_peak(peak_of(options, device))
        return 0

    subject = build(options, device)
    names = options.variants or applicable(options)
    print(f"{options.system}: batches of {options.batch_size} pictures, {subject.decode}")
    if not same_captions(subject, options):
        print("FAILED: the variants do not do the same work")
        return 1

    captions = WAYS[OURS].run(subject, options.images, options.batch_size)
    variants = []
    for name in names:
        way, num_images = WAYS[name], pictures_of(options, name)
        changed = way.change(subject)
        tokens = sum(
            min(len(ids) + 1, subject.decode.max_new_tokens) for ids in captions[:num_images]
        )
        run = lambda way=way, changed=changed, n=num_images: way.run(changed, n, options.batch_size)  # noqa: E731
        variants.append(Variant(name, run, num_images, tokens))
    report = Report(harness.measure(variants, options.repeats, device), device, options.seed)
    if options.memory:
        del subject, variants, changed, run
        gc.collect()
        for name in names:
            report.add_peak(
                name, harness.peak_in_child("benchmarks.caption", child_arguments(options, name))
            )
    for name in names:
        if OURS in names and name != OURS:
            report.add_ratio(OURS, name)
            report.add_memory_ratio(OURS, name)
    report.finish(options.json)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
