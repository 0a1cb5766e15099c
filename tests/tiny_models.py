"""Tiny random models with real tokenizers and image processors, saved as `from_pretrained` expects them.

They stand in for published checkpoints: each `save_*` function writes one folder and returns it. Weights are
random but the same on every run and in any order, because each builder seeds a random state of its own and
leaves the caller's alone. Building one takes milliseconds.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    BertConfig,
    BertLMHeadModel,
    BitImageProcessorPil,
    BlipConfig,
    BlipForConditionalGeneration,
    BlipImageProcessorPil,
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    PvtConfig,
    PvtImageProcessorPil,
    PvtModel,
    PvtV2Config,
    PvtV2Model,
    SiglipImageProcessorPil,
    SiglipVisionConfig,
    SiglipVisionModel,
    ViTConfig,
    ViTImageProcessorPil,
    ViTModel,
)

from vlm_bridge.model_architecture.new_decoder import word_piece_tokenizer
from vlm_bridge.model_architecture.pvt_cbam import PvtCbam, PvtCbamConfig, image_processor

HIDDEN = 32
VOCABULARY = 320

CLIP_VISION_SIZES = {
    "hidden_size": HIDDEN,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
}

# The order in which the tokenizer's trainer is given them.
SPECIAL_IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}

# 256 bytes and three special tokens leave room for some sixty merges: the words of the drawn captions.
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


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE over ``CORPUS``: any text round-trips, and no special token is added unasked."""
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
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        clean_up_tokenization_spaces=False,
        model_max_length=128,
    )


def _tiny_llama_config(vocab_size: int) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=HIDDEN,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        **SPECIAL_IDS,
    )


def save_tiny_llama(folder: Path) -> Path:
    """Llama: rotary positions, grouped-query attention (4 heads, 2 key-value heads), tied embeddings."""
    tokenizer = build_tokenizer()
    config = _tiny_llama_config(len(tokenizer))
    with seeded():
        LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def save_tiny_gemma2(folder: Path) -> Path:
    """Gemma 2: scaled embeddings, softcapped attention and logits, a sliding window shorter than a caption.

    Softcaps are small and weights large, so that code which forgets a softcap is visibly wrong.
    """
    tokenizer = build_tokenizer()
    config = Gemma2Config(
        vocab_size=len(tokenizer),
        hidden_size=HIDDEN,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        query_pre_attn_scalar=8,
        sliding_window=8,
        attn_logit_softcapping=5.0,
        final_logit_softcapping=2.0,
        max_position_embeddings=128,
        initializer_range=0.3,
        **SPECIAL_IDS,
    )
    with seeded():
        Gemma2ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def save_tiny_gpt2(folder: Path) -> Path:
    """GPT-2: learned absolute positions (so position ids matter), Conv1D weights, tied embeddings."""
    tokenizer = build_tokenizer()
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_embd=HIDDEN,
        n_layer=2,
        n_head=4,
        n_positions=128,
        **SPECIAL_IDS,
    )
    with seeded():
        GPT2LMHeadModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def save_tiny_bert(folder: Path, *, cross_attention: bool = True) -> Path:
    """A BERT that reads from left to right and cross-attends; post-norm, learned positions, a head with a transform."""
    tokenizer = word_piece_tokenizer(CORPUS, VOCABULARY)
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=128,
        initializer_range=0.2,
        is_decoder=cross_attention,
        add_cross_attention=cross_attention,
    )
    with seeded():
        BertLMHeadModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def save_tiny_cross_gpt2(folder: Path) -> Path:
    """GPT-2 with cross-attention, as a decoder of transformers' VisionEncoderDecoder has it."""
    tokenizer = build_tokenizer()
    config = GPT2Config(
        vocab_size=len(tokenizer), n_embd=HIDDEN, n_layer=2, n_head=4, n_positions=128, initializer_range=0.2,
        add_cross_attention=True, **SPECIAL_IDS,
    )  # fmt: skip
    with seeded():
        GPT2LMHeadModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def save_tiny_blip(folder: Path) -> Path:
    """A whole BLIP captioner as published: BERT's tokenizer, and `[DEC]` and `[ENC]` as ids beyond its words.

    Its vision tower is 24 wide, and so are the states that its text decoder's cross-attention reads. Weights are
    large, so that captions differ between pictures and code that mixes up rows is visibly wrong.
    """
    tokenizer = word_piece_tokenizer(CORPUS, VOCABULARY)
    text = {
        "vocab_size": VOCABULARY + 2, "hidden_size": HIDDEN, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "max_position_embeddings": 64, "initializer_range": 0.3,
        "bos_token_id": VOCABULARY, "sep_token_id": tokenizer.sep_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }  # fmt: skip
    vision = {
        "hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "image_size": 32, "patch_size": 8, "initializer_range": 0.3,
    }  # fmt: skip
    config = BlipConfig(text_config=text, vision_config=vision, projection_dim=16)
    with seeded(3):
        BlipForConditionalGeneration(config).save_pretrained(folder)
    BlipImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def save_tiny_pvt_v2(folder: Path) -> Path:
    """PVTv2 at 64 px: a pyramid that ends in a 2x2 grid of width 32."""
    config = PvtV2Config(
        image_size=64,
        hidden_sizes=[8, 16, 24, HIDDEN],
        depths=[1, 1, 1, 1],
        num_attention_heads=[1, 2, 2, 4],
    )
    with seeded():
        PvtV2Model(config).save_pretrained(folder)
    PvtImageProcessorPil(size={"height": 64, "width": 64}).save_pretrained(folder)
    return folder


def save_tiny_pvt(folder: Path) -> Path:
    """PVT (the first) at 64 px: the same pyramid, with a class token in its last stage."""
    config = PvtConfig(
        image_size=64,
        hidden_sizes=[8, 16, 24, HIDDEN],
        depths=[1, 1, 1, 1],
        num_attention_heads=[1, 2, 2, 4],
    )
    with seeded():
        PvtModel(config).save_pretrained(folder)
    PvtImageProcessorPil(size={"height": 64, "width": 64}).save_pretrained(folder)
    return folder


def save_tiny_pvt_cbam(folder: Path) -> Path:
    """PVT-Tiny with CBAM at 64 px: a pyramid that ends in a 2x2 grid of width 64, in the published proportions."""
    with seeded():
        PvtCbam(PvtCbamConfig((8, 16, 40, 64), cbam="sequence", image_size=64)).save_pretrained(
            folder
        )
    image_processor().save_pretrained(folder)
    return folder


def save_tiny_dinov2(folder: Path) -> Path:
    """DINOv2 at 56 px with 14 px patches: one class token and a 4x4 grid."""
    config = Dinov2Config(
        hidden_size=HIDDEN,
        num_hidden_layers=2,
        num_attention_heads=4,
        mlp_ratio=2,
        image_size=56,
        patch_size=14,
    )
    with seeded():
        Dinov2Model(config).save_pretrained(folder)
    # As published: shorter side to a bit more than the crop, then the centre of it.
    BitImageProcessorPil(
        size={"shortest_edge": 64}, crop_size={"height": 56, "width": 56}
    ).save_pretrained(folder)
    return folder


def save_tiny_vit(folder: Path) -> Path:
    """ViT at 48 px with 16 px patches: one class token and a 3x3 grid."""
    config = ViTConfig(
        hidden_size=HIDDEN,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        image_size=48,
        patch_size=16,
    )
    with seeded():
        ViTModel(config).save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 48, "width": 48}).save_pretrained(folder)
    return folder


def _save_clip_processor(folder: Path) -> None:
    CLIPImageProcessorPil(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}
    ).save_pretrained(folder)


def save_tiny_clip_vision(folder: Path) -> Path:
    """The vision tower of CLIP alone, 32 px with 8 px patches: one class token and a 4x4 grid."""
    with seeded():
        CLIPVisionModel(CLIPVisionConfig(**CLIP_VISION_SIZES)).save_pretrained(folder)
    _save_clip_processor(folder)
    return folder


def save_tiny_clip(folder: Path) -> Path:
    """A whole CLIP as it is published (text tower too): users name such folders as vision encoders."""
    config = CLIPConfig(
        text_config={
            "vocab_size": VOCABULARY,
            "hidden_size": HIDDEN,
            "intermediate_size": 64,
            "num_hidden_layers": 1,
            "num_attention_heads": 4,
            "max_position_embeddings": 32,
            **SPECIAL_IDS,
        },
        vision_config=CLIP_VISION_SIZES,
        projection_dim=16,
    )
    with seeded():
        CLIPModel(config).save_pretrained(folder)
    _save_clip_processor(folder)
    return folder


def save_tiny_siglip_vision(folder: Path) -> Path:
    """The vision tower of SigLIP, 32 px with 8 px patches: a 4x4 grid and no class token."""
    config = SiglipVisionConfig(**CLIP_VISION_SIZES)
    with seeded():
        SiglipVisionModel(config).save_pretrained(folder)
    SiglipImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


def save_tiny_gguf(path: Path) -> Path:
    """A Llama and its tokenizer as one float32 GGUF file, laid out as llama.cpp's converter does. Needs `gguf`."""
    import gguf

    tokenizer = build_tokenizer()
    with seeded():
        model = LlamaForCausalLM(_tiny_llama_config(len(tokenizer)))
    config, weights = model.config, model.state_dict()
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)

    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokenizer.convert_ids_to_tokens(range(len(tokenizer))))
    writer.add_token_types(
        [3 if token in SPECIAL_IDS.values() else 1 for token in range(len(tokenizer))]
    )
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    writer.add_token_merges([" ".join(pair) for pair in merges])
    writer.add_bos_token_id(SPECIAL_IDS["bos_token_id"])
    writer.add_eos_token_id(SPECIAL_IDS["eos_token_id"])
    writer.add_pad_token_id(SPECIAL_IDS["pad_token_id"])
    writer.add_add_bos_token(False)

    def interleaved(weight: torch.Tensor, heads: int) -> torch.Tensor:
        """llama.cpp rotates neighbouring rows of a head, transformers the two halves of it."""
        return weight.unflatten(0, (heads, 2, -1)).transpose(1, 2).reshape(weight.shape)

    names = {
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
    }
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
