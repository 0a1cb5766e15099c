"""Tiny random models with real tokenizers and image processors, as `from_pretrained` expects them.

Each `save_*` function writes one folder and returns it. Weights are random but the same on every run
and in any order, because each builder seeds a random state of its own.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from vlm_bridge.model_architecture.pvt_cbam import PvtCbam, PvtCbamConfig, image_processor
from vlm_bridge.model_architecture.weights import word_piece_tokenizer

HIDDEN = 32
VOCABULARY = 320
# As transformers names sizes, and as GPT-2 does.
TEXT = {"hidden_size": HIDDEN, "intermediate_size": 64, "num_hidden_layers": 2}
TEXT |= {"num_attention_heads": 4}
GPT2 = {"n_embd": HIDDEN, "n_layer": 2, "n_head": 4, "n_positions": 128}
CLIP = {**TEXT, "image_size": 32, "patch_size": 8}
PYRAMID: dict[str, Any] = {
    "image_size": 64,
    "hidden_sizes": [8, 16, 24, HIDDEN],
    "depths": [1, 1, 1, 1],
    "num_attention_heads": [1, 2, 2, 4],
}
# The order in which the tokenizer's trainer is given them.
SPECIAL_IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}

# 256 bytes and three special tokens leave room for some sixty merges.
CORPUS = (
    "A small red square on a white background.",
    "A large blue circle on a white background.",
    "A green square and a yellow circle.",
    "Two dogs run on the grass near a fence.",
    "A boy and a girl are playing in a pool of water.",
    "The black dog is above the brown dog, to the left of the fence.",
)


@contextlib.contextmanager
def seeded(seed: int = 0) -> Iterator[None]:
    """Run a block under a fixed torch seed without disturbing the caller's random state."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def _save(folder: Path, model: Any, config: Any, beside: Any, seed: int = 0) -> Path:
    """Save a model of random weights, and its tokenizer or image processor."""
    with seeded(seed):
        model(config).save_pretrained(folder)
    beside.save_pretrained(folder)
    return folder


def build_tokenizer() -> hf.PreTrainedTokenizerFast:
    """Byte-level BPE over ``CORPUS``: any text round-trips, without special tokens unasked."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        clean_up_tokenization_spaces=False,
        model_max_length=128,
    )


def _tiny_llama_config(vocab_size: int) -> hf.LlamaConfig:
    sizes = {**TEXT, "num_key_value_heads": 2, "max_position_embeddings": 128}
    return hf.LlamaConfig(vocab_size=vocab_size, tie_word_embeddings=True, **sizes, **SPECIAL_IDS)


def save_tiny_llama(folder: Path) -> Path:
    """Llama: rotary positions, 4 heads that share 2 key-value heads, tied embeddings."""
    tokenizer = build_tokenizer()
    return _save(folder, hf.LlamaForCausalLM, _tiny_llama_config(len(tokenizer)), tokenizer)


def save_tiny_gemma2(folder: Path) -> Path:
    """Gemma 2: scaled embeddings, softcaps, a sliding window shorter than a caption.

    Softcaps are small and weights large, so that code which forgets a softcap is visibly wrong.
    """
    tokenizer = build_tokenizer()
    config = hf.Gemma2Config(
        vocab_size=len(tokenizer),
        num_key_value_heads=2,
        head_dim=8,
        query_pre_attn_scalar=8,
        sliding_window=8,
        attn_logit_softcapping=5.0,
        final_logit_softcapping=2.0,
        max_position_embeddings=128,
        initializer_range=0.3,
        **TEXT,
        **SPECIAL_IDS,
    )
    return _save(folder, hf.Gemma2ForCausalLM, config, tokenizer)


def save_tiny_gpt2(folder: Path, **options: Any) -> Path:
    """GPT-2: learned absolute positions (so position ids matter), Conv1D, tied embeddings."""
    tokenizer = build_tokenizer()
    config = hf.GPT2Config(vocab_size=len(tokenizer), **GPT2, **SPECIAL_IDS, **options)
    return _save(folder, hf.GPT2LMHeadModel, config, tokenizer)


def save_tiny_cross_gpt2(folder: Path) -> Path:
    """GPT-2 with cross-attention, as a decoder of transformers' VisionEncoderDecoder has it."""
    return save_tiny_gpt2(folder, initializer_range=0.2, add_cross_attention=True)


def save_tiny_bert(folder: Path, *, cross_attention: bool = True) -> Path:
    """A BERT that reads from left to right and cross-attends; its head has a transform."""
    config = hf.BertConfig(
        vocab_size=VOCABULARY,
        max_position_embeddings=128,
        initializer_range=0.2,
        is_decoder=cross_attention,
        add_cross_attention=cross_attention,
        **TEXT,
    )
    return _save(folder, hf.BertLMHeadModel, config, word_piece_tokenizer(CORPUS, VOCABULARY))


def save_tiny_blip(folder: Path) -> Path:
    """A whole BLIP captioner: BERT's tokenizer, and `[DEC]` and `[ENC]` as ids beyond its words.

    Its vision tower is 24 wide, and so are the states that its text decoder's cross-attention
    reads. Weights are large, so that captions differ between images.
    """
    tokenizer = word_piece_tokenizer(CORPUS, VOCABULARY)
    text = {
        **TEXT, "vocab_size": VOCABULARY + 2, "max_position_embeddings": 64,
        "initializer_range": 0.3, "bos_token_id": VOCABULARY,
        "sep_token_id": tokenizer.sep_token_id, "pad_token_id": tokenizer.pad_token_id,
    }  # fmt: skip
    vision = {**CLIP, "hidden_size": 24, "intermediate_size": 48, "initializer_range": 0.3}
    config = hf.BlipConfig(text_config=text, vision_config=vision, projection_dim=16)
    hf.BlipImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder)
    return _save(folder, hf.BlipForConditionalGeneration, config, tokenizer, seed=3)


def save_tiny_pvt_v2(folder: Path) -> Path:
    """PVTv2 at 64 px: a pyramid that ends in a 2x2 grid of width 32."""
    processor = hf.PvtImageProcessorPil(size={"height": 64, "width": 64})
    return _save(folder, hf.PvtV2Model, hf.PvtV2Config(**PYRAMID), processor)


def save_tiny_pvt(folder: Path) -> Path:
    """PVT (the first) at 64 px: the same pyramid, with a class token in its last stage."""
    processor = hf.PvtImageProcessorPil(size={"height": 64, "width": 64})
    return _save(folder, hf.PvtModel, hf.PvtConfig(**PYRAMID), processor)


def save_tiny_pvt_cbam(folder: Path) -> Path:
    """PVT-Tiny with CBAM at 64 px: a pyramid that ends in a 2x2 grid of width 64."""
    with seeded():
        PvtCbam(PvtCbamConfig((8, 16, 40, 64), cbam="sequence", image_size=64)).save_pretrained(
            folder
        )
    image_processor().save_pretrained(folder)
    return folder


def save_tiny_dinov2(folder: Path) -> Path:
    """DINOv2 at 56 px with 14 px patches: one class token and a 4x4 grid."""
    sizes = {"hidden_size": HIDDEN, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = hf.Dinov2Config(**sizes, mlp_ratio=2, image_size=56, patch_size=14)
    # As published: shorter side to a bit more than the crop, then the center of it.
    crop = {"height": 56, "width": 56}
    processor = hf.BitImageProcessorPil(size={"shortest_edge": 64}, crop_size=crop)
    return _save(folder, hf.Dinov2Model, config, processor)


def save_tiny_vit(folder: Path) -> Path:
    """ViT at 48 px with 16 px patches: one class token and a 3x3 grid."""
    config = hf.ViTConfig(**TEXT, image_size=48, patch_size=16)
    processor = hf.ViTImageProcessorPil(size={"height": 48, "width": 48})
    return _save(folder, hf.ViTModel, config, processor)


def clip_processor() -> Any:
    crop = {"height": 32, "width": 32}
    return hf.CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=crop)


def save_tiny_clip_vision(folder: Path) -> Path:
    """The vision tower of CLIP alone, 32 px with 8 px patches: one class token and a 4x4 grid."""
    return _save(folder, hf.CLIPVisionModel, hf.CLIPVisionConfig(**CLIP), clip_processor())


def save_tiny_clip(folder: Path) -> Path:
    """A whole CLIP, text tower too: users name such folders as vision encoders."""
    text = {**TEXT, "num_hidden_layers": 1, "vocab_size": VOCABULARY, **SPECIAL_IDS}
    text |= {"max_position_embeddings": 32}
    config = hf.CLIPConfig(text_config=text, vision_config=CLIP, projection_dim=16)
    return _save(folder, hf.CLIPModel, config, clip_processor())


def save_tiny_siglip_vision(folder: Path) -> Path:
    """The vision tower of SigLIP, 32 px with 8 px patches: a 4x4 grid and no class token."""
    processor = hf.SiglipImageProcessorPil(size={"height": 32, "width": 32})
    return _save(folder, hf.SiglipVisionModel, hf.SiglipVisionConfig(**CLIP), processor)


def save_tiny_gguf(path: Path) -> Path:
    """A Llama and its tokenizer as one float32 GGUF file, as llama.cpp's converter writes it."""
    import gguf

    tokenizer = build_tokenizer()
    with seeded():
        model = hf.LlamaForCausalLM(_tiny_llama_config(len(tokenizer)))
    config, weights = model.config, model.state_dict()
    writer = gguf.GGUFWriter(path, "llama")
    ids = range(len(tokenizer))
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    values = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "head_count": config.num_attention_heads,
        "head_count_kv": config.num_key_value_heads,
        "rope_freq_base": config.rope_parameters["rope_theta"],
        "rope_dimension_count": config.hidden_size // config.num_attention_heads,
        "layer_norm_rms_eps": config.rms_norm_eps,
        "vocab_size": config.vocab_size,
        "tokenizer_model": "gpt2",
        "token_list": tokenizer.convert_ids_to_tokens(ids),
        "token_types": [3 if token in SPECIAL_IDS.values() else 1 for token in ids],
        "token_merges": [" ".join(pair) for pair in merges],
        "add_bos_token": False,
        **SPECIAL_IDS,
    }
    for name, value in values.items():
        getattr(writer, f"add_{name}")(value)

    def interleaved(weight: torch.Tensor, heads: int) -> torch.Tensor:
        """llama.cpp rotates neighboring rows of a head, transformers the two halves of it."""
        return weight.unflatten(0, (heads, 2, -1)).transpose(1, 2).reshape(weight.shape)

    names = {
        "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
        "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
    }  # fmt: skip
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    writer.add_tensor("token_embd.weight", weights["model.embed_tokens.weight"].numpy())
    writer.add_tensor("output_norm.weight", weights["model.norm.weight"].numpy())
    for layer in range(config.num_hidden_layers):
        for source, target in names.items():
            weight = weights[f"model.layers.{layer}.{source}.weight"]
            if target in heads:
                weight = interleaved(weight, heads[target])
            writer.add_tensor(f"blk.{layer}.{target}.weight", weight.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
