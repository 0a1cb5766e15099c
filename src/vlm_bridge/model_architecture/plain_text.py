"""Encode captions so that their text never becomes a control token."""

from __future__ import annotations

import re
from typing import Any


def encode_as_text(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    """Return the token ids of each text; what spells a control token (``</s>``, ``[SEP]``) is encoded as text.

    Args:
        tokenizer: a tokenizer of transformers, fast or slow.
        texts: captions or prompts; many at once are many times faster than one by one.

    Returns:
        Token ids of each text, without any special token but the one for unknown characters.
    """
    if not texts:
        return []
    control_ids = _control_ids(tokenizer)
    encoded: list[list[int]] = _encode(tokenizer, texts)
    # Some vocabularies (Unigram) hold their control tokens as ordinary pieces: a space then keeps these apart.
    leaking = [index for index, ids in enumerate(encoded) if not control_ids.isdisjoint(ids)]
    if leaking:
        spelled = re.compile(
            "|".join(map(re.escape, tokenizer.convert_ids_to_tokens(sorted(control_ids))))
        )
        parted = [spelled.sub(lambda found: " ".join(found[0]), texts[index]) for index in leaking]
        for index, ids in zip(leaking, _encode(tokenizer, parted), strict=True):
            encoded[index] = [token for token in ids if token not in control_ids]
    return encoded


def _encode(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    return tokenizer(
        texts, add_special_tokens=False, return_attention_mask=False, split_special_tokens=True
    )["input_ids"]


def _control_ids(tokenizer: Any) -> set[int]:
    """Return the ids of all special tokens but the one for unknown characters, which text may need."""
    added = {
        token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.special
    }
    control = added | set(tokenizer.all_special_ids)
    # GPT-2 names one token for everything: the end of a text, its start and unknown characters.
    roles = {
        tokenizer.eos_token_id,
        tokenizer.bos_token_id,
        tokenizer.pad_token_id,
        tokenizer.sep_token_id,
    }
    return control if tokenizer.unk_token_id in roles else control - {tokenizer.unk_token_id}
