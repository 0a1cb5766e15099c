"""Captions that spell control tokens are text, whatever the tokenizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AddedToken, AutoTokenizer, CTRLTokenizer, PreTrainedTokenizerFast

from tiny_models import build_tokenizer
from vlm_bridge.model_architecture.language_model import encode_as_text

TEXTS = [
    "A man </s> sits <s><pad>",
    "two [SEP] dogs [CLS][MASK] [PAD]",
    "<bos>y<eos> <|im_end|><|endoftext|>",
]


def control_ids(tokenizer: Any) -> set[int]:
    roles = ("eos", "bos", "pad", "sep")
    ends = {getattr(tokenizer, f"{role}_token_id") for role in roles}
    return (set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}) | (ends - {None})


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "bert", "blip"])
def test_a_language_model_reads_control_tokens_as_text(
    family: str, request: pytest.FixtureRequest
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(request.getfixturevalue(f"tiny_{family}_dir"))
    encoded = encode_as_text(tokenizer, TEXTS)
    assert all(ids and control_ids(tokenizer).isdisjoint(ids) for ids in encoded)
    if family in ("llama", "gemma2", "gpt2"):  # BERT's vocabulary of the tests lacks the signs
        assert [tokenizer.decode(ids) for ids in encoded] == TEXTS


def test_tokens_that_were_added_later_are_text_too() -> None:
    tokenizer = build_tokenizer()
    tokenizer.add_tokens([AddedToken("<|im_end|>", special=True)], special_tokens=True)
    (ids,) = encode_as_text(tokenizer, ["A dog <|im_end|> runs"])
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") not in ids
    assert tokenizer.decode(ids) == "A dog <|im_end|> runs"


def test_a_vocabulary_with_control_tokens_as_pieces_gives_none() -> None:
    pieces = [
        ("<unk>", 0.0),
        ("<s>", 0.0),
        ("</s>", 0.0),
        *((sign, -5.0) for sign in "Amansit<>/s\u2581"),
    ]
    unigram = Tokenizer(models.Unigram(pieces, 0, False))
    unigram.pre_tokenizer = pre_tokenizers.Metaspace()  # type: ignore[assignment]
    unigram.decoder = decoders.Metaspace()  # type: ignore[assignment]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=unigram, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    encoded = encode_as_text(tokenizer, ["A man </s> sits", "A man sits"])
    assert tokenizer.eos_token_id not in encoded[0]
    assert tokenizer.decode(encoded[0]).split() == tokenizer.decode(encoded[1]).split()


def test_a_tokenizer_in_python_reads_control_tokens_as_text(tmp_path: Path) -> None:
    signs = [*"amnsit<>/", *(f"{sign}@@" for sign in "amnsit<>/")]
    vocabulary = {token: index for index, token in enumerate(["<unk>", "</s>", *signs])}
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CTRLTokenizer(
        str(tmp_path / "vocab.json"),
        str(tmp_path / "merges.txt"),
        unk_token="<unk>",
        eos_token="</s>",
    )
    assert tokenizer.eos_token_id in tokenizer("man </s>", add_special_tokens=False)["input_ids"]
    (ids,) = encode_as_text(tokenizer, ["man </s> sits"])
    assert tokenizer.eos_token_id not in ids and ids


def test_no_text_gives_nothing() -> None:
    assert encode_as_text(build_tokenizer(), []) == []
    assert encode_as_text(build_tokenizer(), [""]) == [[]]
