"""A new small decoder that cross-attends: BERT's architecture, random weights, own word pieces.

For learning to caption without a pretrained decoder. All of it has to be trained.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from vlm_bridge.errors import ConfigurationError

_NAMES = ("pad", "unk", "cls", "sep", "mask")
SPECIAL_TOKENS = {f"{name}_token": f"[{name.upper()}]" for name in _NAMES}
MAX_POSITIONS = 128  # of prompt and caption together


class DecoderSize(NamedTuple):
    """Sizes of a BERT-style decoder; feed-forward layers are four times as wide (Devlin 2019)."""

    layers: int = 6
    width: int = 256
    heads: int = 4
    vocabulary: int = 6000
    dropout: float = 0.1


def write_new_decoder(
    captions: Iterable[str], folder: Path, size: DecoderSize, *, seed: int = 0
) -> tuple[int, int]:
    """Write a decoder and its tokenizer to a folder that `language_model.name` can name.

    Returns:
        The number of word pieces (at most ``size.vocabulary``) and of parameters.

    Raises:
        ConfigurationError: a size is impossible.
    """
    from transformers import BertConfig, BertLMHeadModel

    if size.width % size.heads:
        raise ConfigurationError(f"heads={size.heads} does not divide width={size.width}")
    tokenizer = word_piece_tokenizer(captions, size.vocabulary)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=size.width,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        intermediate_size=4 * size.width,
        hidden_dropout_prob=size.dropout,
        attention_probs_dropout_prob=size.dropout,
        max_position_embeddings=MAX_POSITIONS,
        pad_token_id=tokenizer.pad_token_id,
        is_decoder=True,
        add_cross_attention=True,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        decoder = BertLMHeadModel(config)
    decoder.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return len(tokenizer), decoder.num_parameters()


def word_piece_tokenizer(captions: Iterable[str], vocabulary: int) -> Any:
    """Learn BERT's lower-case word pieces from captions."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    model: Any = models.WordPiece
    tokenizer = Tokenizer(model(unk_token=SPECIAL_TOKENS["unk_token"]))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)  # type: ignore[assignment]
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()  # type: ignore[assignment]
    tokenizer.decoder = decoders.WordPiece()  # type: ignore[assignment]
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocabulary,
        special_tokens=list(SPECIAL_TOKENS.values()),
        # Characters come twice, at the start of words and within; rare ones must leave room for
        # words.
        limit_alphabet=vocabulary // 4,
        show_progress=False,
    )
    tokenizer.train_from_iterator(captions, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_max_length=MAX_POSITIONS, **SPECIAL_TOKENS
    )
