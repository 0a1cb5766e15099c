"""Language models behind one small adapter: Hugging Face causal models, decoders that cross-attend, GGUF files."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import DynamicCache, EncoderDecoderCache

from vlm_bridge.errors import ModelError
from vlm_bridge.model_architecture.frozen_norms import quicken_norms
from vlm_bridge.model_architecture.loss import LinearHead
from vlm_bridge.model_architecture.prefix_attention import ATTENTION, KeyValuePrefix
from vlm_bridge.model_architecture.text_shape import TextShape

BLIP_TEXT = "blip_text_model"
"""transformers' name of BLIP's text decoder."""


@dataclass(frozen=True)
class LayerEntry:
    """What happens to the states [B, T, H] that are about to enter a layer, from 0.

    Attributes:
        edit: changes them.
        states: they themselves, computed before: the layers below do not run.
    """

    layer: int
    edit: Callable[[torch.Tensor], torch.Tensor]
    states: torch.Tensor | None = None

    def __call__(self, states_bth: torch.Tensor) -> torch.Tensor:
        states_bth = states_bth if self.states is None else self.states
        return self.edit(states_bth).to(states_bth.dtype)


class _Skipped(nn.Module):
    """In the place of a layer that does not run."""

    def forward(self, states_bth: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        return states_bth


class LanguageModel(nn.Module):
    """A transformers decoder, split where the captioner needs it: embed | body | head.

    Attributes:
        embed_dim: H, the width of its embeddings.
        start_id: first input token of every caption: BLIP's [DEC]; BOS, or BERT's [CLS]; EOS for models without
            either, as GPT-2 uses it.
        eos_id: the token that ends a caption (EOS, or BERT's [SEP]). Pads are never told from token ids: a pad is
            often EOS itself.
        fresh_parameters: names of parameters that no checkpoint held: they know nothing until they are trained.
    """

    def __init__(self, causal_lm: Any, tokenizer: Any, fresh_parameters: frozenset[str] = frozenset()):
        super().__init__()
        self.causal_lm = causal_lm
        self.tokenizer = tokenizer
        self.fresh_parameters = fresh_parameters
        self.embed_dim: int = causal_lm.get_input_embeddings().weight.shape[1]
        self.final_logit_softcap: float | None = getattr(causal_lm.config, "final_logit_softcapping", None)
        self.is_blip = causal_lm.config.model_type == BLIP_TEXT
        self.eos_id, self.start_id = self._ends(tokenizer) if tokenizer else (None, None)
        self._entry: LayerEntry | None = None
        self._open_layers: set[int] = set()
        self._bodies: dict[tuple[range, bool], Any] = {}
        self._compiles = False
        quicken_norms(causal_lm)

    def _ends(self, tokenizer: Any) -> tuple[int | None, int | None]:
        if self.is_blip:  # its tokenizer is BERT's, which does not know the decoder's start token
            return self.text_config.sep_token_id, self.text_config.bos_token_id
        eos = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.sep_token_id
        starts = (tokenizer.bos_token_id, tokenizer.cls_token_id, eos)
        return eos, next((start for start in starts if start is not None), None)

    @property
    def text_config(self) -> Any:
        return self.causal_lm.config.get_text_config(decoder=True)

    @property
    def shape(self) -> TextShape:
        return TextShape.of(self.text_config, self.embed_dim)

    @property
    def is_trained(self) -> bool:
        """Whether any of its own weights are."""
        return any(parameter.requires_grad for parameter in self.parameters())

    @property
    def head_module(self) -> nn.Module:
        """What makes logits of states: BERT's and BLIP's heads transform them first."""
        head = getattr(self.causal_lm, "cls", None)
        return head if head is not None else self.causal_lm.get_output_embeddings()

    @property
    def max_positions(self) -> int | None:
        """How many positions it knows, prompt and soft tokens included; None where its configuration does not say."""
        return getattr(self.text_config, "max_position_embeddings", None)

    @property
    def vocab_size(self) -> int:
        return self.causal_lm.get_input_embeddings().weight.shape[0]

    def embed(self, ids_bt: torch.Tensor) -> torch.Tensor:
        """Token embeddings [B, T, H]."""
        return self.causal_lm.get_input_embeddings()(ids_bt)

    def hidden_states(
        self,
        inputs_embeds: torch.Tensor,
        attention_mask: torch.Tensor | dict[str, torch.Tensor] | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool = False,
        prefix: KeyValuePrefix | None = None,
        encoder_hidden_states: torch.Tensor | None = None,
        entry: LayerEntry | None = None,
    ) -> torch.Tensor:
        """The body's last states [B, T, H] before the head. A given cache is extended in place.

        Args:
            attention_mask: None (plain causal) or what `packed_mask` makes.
            prefix: what the layers attend to beside the text; only after `accept_prefix`.
            encoder_hidden_states: [B, N, W] that a cross-attending decoder reads; W is ``shape.cross_attention_width``.
            entry: what happens to the states that enter a layer; only after `open_layer`. Where it has states, those of
                ``inputs_embeds`` are not read.
        """
        skipped = range(entry.layer if entry is not None and entry.states is not None else 0)
        of_image: dict[str, Any] = {}
        if prefix is not None:
            of_image["image_prefix"] = prefix
        if encoder_hidden_states is not None:
            of_image["encoder_hidden_states"] = encoder_hidden_states
            if isinstance(
                past_key_values, DynamicCache
            ):  # what `generate` makes unless it is given a `new_cache`
                past_key_values = EncoderDecoderCache(past_key_values, DynamicCache())
        if self.is_blip:
            of_image["is_decoder"] = True
        is_packed = attention_mask is not None and past_key_values is None
        self._entry = entry
        try:
            states = self._body(skipped, compiled=self._compiles and is_packed)(
                inputs_embeds=inputs_embeds,
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_values=past_key_values,
                use_cache=use_cache,
                **of_image,
            ).last_hidden_state
        finally:
            self._entry = None
        if prefix is not None and len(prefix.layers_that_read) + len(skipped) < self.shape.num_layers:
            raise ModelError(
                f"{type(self.causal_lm).__name__} does not hand a key-value prefix to its attention layers: choose "
                "bridge.kind=prefix or cross_attention"
            )
        return states

    def open_layer(self, layer: int) -> None:
        """Let `hidden_states` be given a `LayerEntry` at a layer.

        Raises:
            ModelError: the model does not say which of its modules are layers.
        """
        if layer in self._open_layers:
            return
        _, layers = self._named_layers()
        # A hook, and not a new `forward`: what `checkpoint_activations` computes again does not include it.
        layers[layer].register_forward_pre_hook(partial(self._enter, layer))
        self._open_layers.add(layer)

    def _enter(self, layer: int, _module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """The positional arguments of a layer, of which the states are the first, as the entry at hand has them."""
        if self._entry is None or self._entry.layer != layer:
            return None
        return self._entry(args[0]), *args[1:]

    @torch.no_grad()
    def states_entering(
        self,
        layer: int,
        inputs_embeds: torch.Tensor,
        attention_mask: torch.Tensor | dict[str, torch.Tensor] | None = None,
        position_ids: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The states [B, T, H] that enter a layer that was opened (`open_layer`); those above it do not run."""
        found: list[torch.Tensor] = []

        def look(states_bth: torch.Tensor) -> torch.Tensor:
            found.append(states_bth)
            return states_bth

        self._entry = LayerEntry(layer, look)
        try:
            self._body(range(layer + 1, self.shape.num_layers))(
                inputs_embeds=inputs_embeds,
                attention_mask=attention_mask,
                position_ids=position_ids,
                use_cache=False,
                **({"is_decoder": True} if self.is_blip else {}),
            )
        finally:
            self._entry = None
        return found[0]

    def _named_layers(self) -> tuple[str, nn.ModuleList]:
        """The layers, and their name within the body."""
        for name, module in self.causal_lm.base_model.named_modules():  # outer modules first
            if isinstance(module, nn.ModuleList) and len(module) == self.shape.num_layers:
                return name, module
        raise ModelError(
            f"{type(self.causal_lm).__name__} does not say which of its modules are layers: an image can enter it at "
            "layer 0 alone (bridge.enter_at_layer=0)"
        )

    def _body(self, skipped: range, *, compiled: bool = False) -> Any:
        """What runs the body without some of its layers: copies of the modules on the way to them that share all else.

        Layers keep their numbers, by which models choose masks, windows and the places of their caches.
        """
        if (skipped, compiled) not in self._bodies:
            body = self.causal_lm.base_model
            if skipped:
                name, layers = self._named_layers()
                kept = nn.ModuleList(_Skipped() if i in skipped else layer for i, layer in enumerate(layers))
                body = _with_module(body, name.split("."), kept)
            # Of the method: a compiled module would be a second owner of every weight.
            self._bodies[skipped, compiled] = torch.compile(body.forward, dynamic=True) if compiled else body
        return self._bodies[skipped, compiled]

    def new_cache(self) -> Any:
        """An empty KV cache; a cross-attending decoder's also keeps the image's keys and values, computed once."""
        cache = DynamicCache(config=self.text_config)
        if self.shape.cross_attention_width is None:
            return cache
        return EncoderDecoderCache(cache, DynamicCache(config=self.text_config))

    def accept_prefix(self) -> None:
        """Switch to the attention that reads a `KeyValuePrefix`, of the same kind as now (`eager` or `sdpa`)."""
        base = self.causal_lm.config._attn_implementation
        if base not in ("eager", "sdpa"):
            raise ModelError(
                f"bridge.kind=deep_prefix works with language_model.attention=eager or sdpa, not {base}"
            )
        self.causal_lm.set_attn_implementation(ATTENTION.format(base))

    def compile_body(self) -> None:
        """Compile the body for packed rows: those of training and validation; generation runs as before.

        Lengths are symbols of the compiled code, so that no batch compiles it anew. Weights keep their names.
        """
        self._compiles = True

    def checkpoint_activations(self) -> None:
        """Keep only the input of every layer for back-propagation, and compute the layer again when it is needed.

        About a third more time for a fraction of the memory (Chen et al. 2016); the same loss and gradients.
        transformers' own switch works in training mode alone, and frozen layers stay in evaluation mode.

        Raises:
            ModelError: the model does not say which of its modules are layers.
        """
        from transformers.modeling_layers import GradientCheckpointingLayer

        layers: list[Any] = [m for m in self.causal_lm.modules() if isinstance(m, GradientCheckpointingLayer)]
        if not layers:
            raise ModelError(
                f"{type(self.causal_lm).__name__} cannot be checkpointed: use gradient_checkpointing=false"
            )
        for layer in layers:
            # Frozen layers draw no random numbers (dropout): there is no state to keep.
            layer.forward = partial(
                checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=self.is_trained
            )

    def packed_mask(
        self, segments_bt: torch.Tensor, num_soft_tokens: int
    ) -> torch.Tensor | dict[str, torch.Tensor]:
        """The additive mask of packed rows (`causal_block_mask`), by kind of layer where a model mixes kinds.

        transformers applies no sliding window to a mask that it is given: packed rows must carry it, or a
        caption would see further back in training than in generation.

        Raises:
            ModelError: a kind of layer that no mask can keep from mixing the captions of a row.
        """
        dtype = next(self.parameters()).dtype
        window: int | None = getattr(self.text_config, "sliding_window", None)
        kinds = set(getattr(self.text_config, "layer_types", None) or ())
        if foreign := kinds - {"full_attention", "sliding_attention"}:
            raise ModelError(
                f"cannot train through {', '.join(sorted(foreign))} layers: choose a language model whose layers "
                "are all full or sliding attention"
            )
        if "sliding_attention" not in kinds:
            # Without layer kinds, a window holds for every layer (Mistral, Phi-3).
            return causal_block_mask(segments_bt, num_soft_tokens, dtype, window=None if kinds else window)
        windows = {"full_attention": None, "sliding_attention": window}
        return {
            kind: causal_block_mask(segments_bt, num_soft_tokens, dtype, window=windows[kind])
            for kind in kinds
        }

    @property
    def linear_head(self) -> LinearHead | None:
        """The head as a matrix, where it is no more than that, stored plainly and frozen."""
        module = self.head_module
        if type(module) is not nn.Linear or any(p.requires_grad for p in module.parameters()):
            return None
        return LinearHead(module.weight, module.bias, self.final_logit_softcap)

    def head(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits [..., vocabulary] of states [..., H], soft-capped where the model caps them (Gemma 2)."""
        logits = self.head_module(hidden)
        if self.final_logit_softcap is not None:
            logits = self.final_logit_softcap * torch.tanh(logits / self.final_logit_softcap)
        return logits

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, without any special token."""
        return self.encode_all([text])[0]

    def encode_all(self, texts: list[str]) -> list[list[int]]:
        """Token ids of each text, without any special token: many at once are many times faster than one by one."""
        return self.tokenizer(texts, add_special_tokens=False, return_attention_mask=False)["input_ids"]

    def decode(self, ids: list[int]) -> str:
        """The text of token ids, special tokens left out; word pieces are joined as English is written."""
        is_word_piece = self.tokenizer.mask_token is not None  # BERT's family puts a space before every mark
        return self.tokenizer.decode(
            ids, skip_special_tokens=True, clean_up_tokenization_spaces=is_word_piece
        ).strip()

    def embedding_std(self) -> float:
        """Standard deviation of the token embeddings: the size of input the frozen layers are used to."""
        return self.causal_lm.get_input_embeddings().weight.float().std().item()


def _with_module(module: nn.Module, path: list[str], replacement: nn.Module) -> nn.Module:
    """A shallow copy of a module in which ``replacement`` stands at the end of a path of names; it shares all else."""
    name, *rest = path
    copied = copy.copy(module)
    of_name = _with_module(module._modules[name], rest, replacement) if rest else replacement  # type: ignore[arg-type]
    copied._modules = {**module._modules, name: of_name}
    return copied


def causal_block_mask(
    segments_bt: torch.Tensor, num_soft_tokens: int, dtype: torch.dtype, window: int | None = None
) -> torch.Tensor:
    """Additive mask [B, 1, P+T, P+T] for rows that pack one image's soft tokens and several of its captions.

    Args:
        segments_bt: [B, T], 0 for pads, otherwise the number of the caption a token belongs to.
        num_soft_tokens: P soft tokens before the text; causal among themselves, seen by every caption.
        window: a token sees itself and ``window - 1`` positions before it, counted within its caption.

    A caption sees the soft tokens and its own past, never another caption. A pad sees itself alone, so that no
    softmax is over nothing.
    """
    batch, length = segments_bt.shape
    total = num_soft_tokens + length
    segments = segments_bt.new_full((batch, total), -1)
    segments[:, num_soft_tokens:] = segments_bt
    same = segments[:, :, None] == segments[:, None, :]
    is_soft = segments == -1
    is_text = segments > 0
    allowed = same | (is_text[:, :, None] & is_soft[:, None, :])
    allowed &= torch.ones(total, total, dtype=torch.bool, device=segments.device).tril()
    allowed &= (segments != 0)[:, None, :] | torch.eye(total, dtype=torch.bool, device=segments.device)
    if window is not None:
        positions = packed_positions(segments_bt, num_soft_tokens)
        allowed &= positions[:, :, None] - positions[:, None, :] < window
    mask = torch.full((batch, total, total), -math.inf, dtype=dtype, device=segments.device)
    mask.masked_fill_(allowed, 0.0)
    return mask[:, None]


def packed_positions(segments_bt: torch.Tensor, num_soft_tokens: int) -> torch.Tensor:
    """Position ids [B, P+T]: soft tokens count 0..P-1, and every caption goes on from P as if it were alone.

    Pads are all at P: counted on, many of them would run past the positions of a model that has a table of them.
    """
    batch, length = segments_bt.shape
    index = torch.arange(length, device=segments_bt.device).expand(batch, length)
    starts_here = torch.ones_like(segments_bt, dtype=torch.bool)
    starts_here[:, 1:] = segments_bt[:, 1:] != segments_bt[:, :-1]
    start = torch.where(starts_here, index, 0).cummax(dim=1).values
    in_caption = torch.where(segments_bt == 0, 0, index - start)
    soft = torch.arange(num_soft_tokens, device=segments_bt.device).expand(batch, num_soft_tokens)
    return torch.cat((soft, num_soft_tokens + in_caption), dim=1)
