"""MuSe attention inside transformers: `from_pretrained(..., attn_implementation="muse")` after one call.

transformers asks a registered attention for a mask once per forward pass, then hands that mask to every layer. Here the
mask is None for plain causal rows, or says where documents begin, which is all that MuSe has to know of padding and of
packed sequences: an int32 tensor [1, 1, 1 or 2, S + 1], of four dimensions because transformers passes such a mask on
untouched. Its first row is `cu_seqlens` over the flattened batch; runs of padding are documents of their own, which the
second row, there if anything is padded, marks with ones. Layers, which alone are given positions, add the documents
that these begin. Where queries continue a cache, mask and attention are those of "sdpa".

User's page: docs/transformers.md.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from muse_lightning.attention import AttentionStrategy, Dense, Muse, SlidingWindow, layer_numbers
from muse_lightning.attention.partly_exact import attend_partly_exactly
from muse_lightning.errors import UserError, suggestion

FEWEST_DOCUMENTS = 64
"""The number of documents is rounded up to a power of two, at least this: few shapes for torch.compile."""

UNSUPPORTED = ("softcap", "s_aux", "position_bias", "head_mask")
"""What some models give to an attention function beside q, k and v, and MuSe has no place for."""

_DOCUMENTS_OF_POSITIONS = WeakTensorKeyDictionary()
"""A mask, or position_ids where there is none: what `_documents_of_positions` found for the layers that share it."""


class _Found(NamedTuple):
    position_ids: Tensor | None
    """None where they are the key themselves."""
    version: int
    cu_seqlens: Tensor | None


class _Registered(NamedTuple):
    name: str
    muse: AttentionStrategy
    exact: AttentionStrategy
    exact_layers: tuple[int, ...]
    exact_heads: Mapping[int, tuple[int, ...]]
    sdpa: Callable[..., tuple[Tensor, None]]
    """transformers' attention function of this name; `sdpa_mask` makes its masks."""
    sdpa_mask: Callable[..., Tensor | None]
    causal: Callable[..., Any]
    """The function that stands for a causal mask and nothing else."""


def register_with_transformers(
    name: str = "muse",
    *,
    exact_layers: Sequence[int] = (),
    exact_heads: Mapping[int, Sequence[int]] | None = None,
    **options: Any,
) -> None:
    """Make MuSe attention available to transformers under a name, for models loaded or already loaded.

    Args:
        name: what `attn_implementation` will be called. The same name again replaces the options.
        exact_layers: numbers of layers that attend exactly instead, from 0; negative ones count from the last, -1. A
            layer that a model does not have is a ValueError when it is called.
        exact_heads: key-value heads that attend exactly instead, each with the query heads that share it, by the number
            of their layer. A head or a layer that a model does not have is a ValueError when it is called.
        options: those of `muse_lightning.attention.Muse`: chunk, top_k, exact_below, ...
    Raises:
        ValueError: an option does not exist or its value is not accepted, or the name cannot be used.
        ImportError: transformers is not installed.
    """
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import AttentionMaskInterface, causal_mask_function, sdpa_mask

    taken = AttentionInterface().get(name)
    is_ours = isinstance(taken, partial) and taken.func is _attend
    # transformers reads more than a name out of "flash", "|", "/" and the like.
    if not name.isidentifier() or "flash" in name or name == "eager" or (taken is not None and not is_ours):
        raise ValueError(f"name must be an identifier that transformers has no attention for, got {name!r}")
    if not _are_numbers(exact_layers):
        raise ValueError(f"exact_layers must be numbers of layers, such as (0, -1), got {exact_layers!r}")
    heads = {} if exact_heads is None else exact_heads
    if not isinstance(heads, Mapping) or not all(map(_are_numbers, [[*heads], *heads.values()])):
        raise ValueError(
            f"exact_heads must be key-value heads by the number of a layer, such as {{4: [0, 1]}}, got {exact_heads!r}"
        )
    accepted = set(inspect.signature(Muse).parameters) - {"layer_idx"}
    for option in options:
        if option not in accepted:
            known = {*accepted, "exact_layers", "exact_heads"}
            raise ValueError(f"{option} is no option of MuSe attention{suggestion(option, known)}")
    try:
        muse = Muse(0, **options)
    except UserError as error:
        raise ValueError(str(error)) from None
    registered = _Registered(
        name,
        muse,
        Dense(0),
        tuple(exact_layers),
        {layer: tuple(each) for layer, each in heads.items()},
        sdpa_attention_forward,
        sdpa_mask,
        causal_mask_function,
    )
    AttentionInterface.register(name, partial(_attend, registered))
    AttentionMaskInterface.register(name, partial(_mask, registered))


def _are_numbers(values: Any) -> bool:
    return isinstance(values, Sequence) and all(isinstance(x, int) and not isinstance(x, bool) for x in values)


# ----------------------------------------------------------------------------------------------------------- mask


def _mask(
    registered: _Registered,
    *,
    batch_size: int,
    kv_length: int,
    mask_function: Callable[..., Tensor],
    kv_offset: int = 0,
    q_length: int = 0,
    q_offset: int | Tensor = 0,
    cache_position: Tensor | None = None,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    **others: Any,
) -> Tensor | None:
    """The mask of a forward pass, as the module's docstring describes it.

    Args: as transformers passes them. `attention_mask` is bool [B, tokens so far]; `cache_position` holds the positions
    of the queries in transformers 4, in place of `q_length` and `q_offset`.
    """
    places: dict[str, Any] = {"q_length": q_length, "q_offset": q_offset}
    if cache_position is not None:
        places = {"cache_position": cache_position}
        q_length, q_offset = cache_position.shape[0], cache_position[0]
    if not _is_from_the_start(q_length, kv_length, kv_offset, q_offset):
        return registered.sdpa_mask(
            batch_size=batch_size,
            kv_length=kv_length,
            mask_function=mask_function,
            kv_offset=kv_offset,
            attention_mask=attention_mask,
            local_size=local_size,
            **places,
            **others,
        )
    if others.get("use_vmap"):
        raise ValueError(f"{_shown(registered)} is causal self-attention, the model asks for another mask")
    is_plain = mask_function is registered.causal
    if is_plain and attention_mask is None:
        return None
    device = next((x.device for x in (cache_position, attention_mask) if x is not None), others.get("device"))
    token = torch.arange(q_length, device=device)[None]
    starts, is_supported = (token == 0).expand(batch_size, -1), None
    if not is_plain:
        starts, is_supported = _documents_of_mask_function(mask_function, batch_size, token, local_size)
    if attention_mask is not None:
        attention_mask = F.pad(attention_mask, (0, max(0, q_length - attention_mask.shape[1])))[:, :q_length]
    return _documents(registered, starts, attention_mask, is_supported)


def _is_from_the_start(q_length: int, kv_length: int, kv_offset: int | Tensor, q_offset: int | Tensor) -> bool:
    """Whether the queries are the first tokens of their rows: training, or a prefill, of a static cache too."""
    if q_length == 1 or (isinstance(kv_offset, int) and kv_offset > 0):
        return False
    if q_length == kv_length:
        return True
    # Of a static cache the place is a tensor, which a compiled pass cannot look at.
    if isinstance(q_offset, Tensor) and torch.compiler.is_compiling():
        return False
    return int(q_offset) == 0


def _documents_of_mask_function(
    mask_function: Callable[..., Tensor], batch_size: int, token: Tensor, local_size: int | None
) -> tuple[Tensor, Tensor]:
    """Where documents begin, bool [B, N], and whether the mask function means causal attention within them, bool [].

    A token that does not see the one before it begins a document. That covers packed sequences and chunked attention;
    a window of `local_size` tokens, which the layer itself is told of, is told from other masks at each first token.
    """
    batch = torch.arange(batch_size, device=token.device)[:, None]
    last = token.shape[1] - 1

    def sees(key: Tensor) -> Tensor:
        return mask_function(batch, torch.zeros_like(batch), token, key).expand(batch_size, -1)

    starts = (token == 0) | ~sees((token - 1).clamp_min(0))
    first = torch.where(starts, token, 0).cummax(dim=1).values
    is_in_window = token - first < (last + 1 if local_size is None else local_size)
    sees_ahead = sees((token + 1).clamp_max(last)) & (token < last)
    return starts, (sees(first) == is_in_window).all() & ~sees_ahead.any()


# Values are read on the host, once per forward pass.
@torch.compiler.disable
def _documents(
    registered: _Registered, starts: Tensor, is_text: Tensor | None, is_supported: Tensor | None
) -> Tensor | None:
    """The mask of these documents; None if every row is one.

    Args:
        starts: bool [B, N], where documents begin.
        is_text: bool [B, N], False for padding; None if there is none.
        is_supported: bool [], whether documents are all there is to the mask; None if known to be true.
    Raises:
        ValueError: they are not, or there is padding between the tokens of a row.
    """
    if is_supported is not None and not is_supported:
        raise ValueError(f"{_shown(registered)} is causal self-attention, the model asks for another mask")
    if is_text is not None and bool(is_text.all()):
        is_text = None
    if is_text is not None:
        before = F.pad(is_text[:, :-1], (1, 0))
        if bool(((is_text & ~before).sum(dim=1) > 1).any()):
            raise ValueError(
                f"{_shown(registered)} accepts an attention_mask with padding on the left, the right or both, "
                "got padding between the tokens of a row"
            )
        starts = starts | F.pad(is_text[:, 1:] != is_text[:, :-1], (1, 0))
    elif not bool(starts[:, 1:].any()):
        return None
    return _mask_of_documents(starts, is_text)


def _mask_of_documents(starts: Tensor, is_text: Tensor | None) -> Tensor:
    """int32 [1, 1, 1 or 2, S + 1]: `cu_seqlens`, and which documents are padding. Reads their number on the host."""
    first = starts.flatten().nonzero().squeeze(1)
    unused = max(FEWEST_DOCUMENTS, 1 << (len(first) - 1).bit_length()) + 1 - len(first)
    rows = [F.pad(first, (0, unused), value=starts.numel())]
    if is_text is not None:
        rows.append(F.pad((~is_text).flatten()[first].to(first.dtype), (0, unused)))
    return torch.stack(rows)[None, None].to(torch.int32)


# ------------------------------------------------------------------------------------------------------ attention


def _attend(
    registered: _Registered,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    is_causal: bool | None = None,
    position_ids: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """MuSe attention of a layer, or exact attention where its queries continue a cache.

    Args: as transformers passes them. query: [B, H, N, D]; key, value: [B, H_kv, N or what the cache holds, D];
        attention_mask: made by `_mask`.
    Returns:
        [B, N, H, D], zero for padding, and None for attention weights.
    Raises:
        ValueError: the model or the call asks for what MuSe attention has no place for.
    """
    is_causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    _check(registered, module, dropout, is_causal, others)
    num_tokens = query.shape[2]
    has_documents = attention_mask is not None and attention_mask.dtype == torch.int32
    if num_tokens == 1 or (attention_mask is not None and not has_documents):
        if num_tokens > 1 and num_tokens == key.shape[2]:
            raise ValueError(
                f"{_shown(registered)} accepts an attention_mask of two dimensions, which says what is padding, "
                "got a mask for pairs of tokens"
            )
        return registered.sdpa(module, query, key, value, attention_mask, scaling=scaling)
    # A static cache holds places for later tokens, too.
    key, value = key[:, :, :num_tokens], value[:, :, :num_tokens]
    cu_seqlens, is_hidden = None, None
    if attention_mask is not None:
        cu_seqlens, is_hidden = attention_mask[0, 0, 0], _padding(attention_mask, query.shape[0], num_tokens)
    if cu_seq_lens_q is not None:
        if is_hidden is not None:
            raise ValueError(f"{_shown(registered)} accepts cu_seq_lens_q without padding, got both")
        given = cu_seq_lens_q.to(torch.int32)
        # An offset that is there twice is an empty document.
        cu_seqlens = given if cu_seqlens is None else torch.cat([cu_seqlens, given]).sort().values
    elif position_ids is not None and torch.compiler.is_compiling():
        no_token = _no_documents_of_positions(position_ids, attention_mask, query.shape[0], num_tokens, registered.name)
        is_hidden = no_token if is_hidden is None else is_hidden | no_token
    elif position_ids is not None:
        found = _documents_of_positions(position_ids, attention_mask, query.shape[0], num_tokens)
        cu_seqlens = cu_seqlens if found is None else found
    # A window that reaches over the whole row is none.
    has_window = sliding_window is not None and sliding_window < num_tokens
    strategy: Callable[..., Tensor]
    if has_window:
        strategy = SlidingWindow(0, cast(int, sliding_window))
    else:
        strategy = _strategy(registered, module, key.shape[1])
    softmax_scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    out = strategy(query, key, value, softmax_scale=softmax_scale, cu_seqlens=cu_seqlens)
    if is_hidden is not None:
        out = out.masked_fill(is_hidden[:, None, :, None], 0)
    return out.transpose(1, 2).contiguous(), None


def _strategy(registered: _Registered, module: nn.Module, num_kv_heads: int) -> Callable[..., Tensor]:
    if not registered.exact_layers and not registered.exact_heads:
        return registered.muse
    layer, config = getattr(module, "layer_idx", None), getattr(module, "config", None)
    num_layers = getattr(config, "num_hidden_layers", None)
    if layer is None or num_layers is None:
        raise ValueError(
            f"{_shown(registered)}: {type(module).__name__} does not say which layer it is; accepted: no exact_layers, "
            "no exact_heads"
        )
    try:
        is_exact = layer in layer_numbers(registered.exact_layers, num_layers, "exact_layers")
        layer_numbers([*registered.exact_heads], num_layers, "exact_heads")
    except UserError as error:
        raise ValueError(f"{_shown(registered)}: {error}") from None
    heads = sorted({head for named in (layer, layer - num_layers) for head in registered.exact_heads.get(named, ())})
    if is_exact or not heads:
        return registered.exact if is_exact else registered.muse
    for head in heads:
        if not 0 <= head < num_kv_heads:
            raise ValueError(
                f"{_shown(registered)}: exact_heads names key-value head {head} of layer {layer}; accepted: 0 to "
                f"{num_kv_heads - 1}"
            )
    return partial(attend_partly_exactly, heads, registered.exact, registered.muse)


def _check(registered: _Registered, module: nn.Module, dropout: float, is_causal: bool, others: dict[str, Any]) -> None:
    asked = [argument for argument in UNSUPPORTED if others.get(argument) is not None]
    asked += ["output_attentions=True"] if others.get("output_attentions") else []
    asked += [f"dropout {dropout} of attention weights"] if dropout else []
    asked += [] if is_causal else ["attention to later tokens (is_causal=False)"]
    if asked:
        raise ValueError(
            f"{_shown(registered)} is causal self-attention without {asked[0]}, which {type(module).__name__} asks for"
        )


def _shown(registered: _Registered) -> str:
    return f'attn_implementation="{registered.name}"'


def _padding(mask: Tensor, batch_size: int, num_tokens: int) -> Tensor | None:
    """bool [B, N], which tokens a mask says are padding; None if there is none."""
    if mask.shape[2] == 1:
        return None
    # Its row of flags has one to spare.
    size = batch_size * num_tokens
    return (
        torch.repeat_interleave(mask[0, 0, 1, :-1], mask[0, 0, 0].diff(), output_size=size).bool().view(batch_size, -1)
    )


def _documents_of_positions(
    position_ids: Tensor, mask: Tensor | None, batch_size: int, num_tokens: int
) -> Tensor | None:
    """`cu_seqlens` of a mask and of positions that start again within its documents; None if none does.

    transformers looks at positions only without a mask and without a cache, and models make a cache in training, too,
    unless they are told otherwise. Read on the host, by the first layer for all that share a mask.
    """
    if position_ids.shape not in ((1, num_tokens), (batch_size, num_tokens)):
        return None
    key, others = (position_ids, None) if mask is None else (mask, position_ids)
    # Somebody may write other positions into the same tensor, which in inference mode nobody counts.
    version = None if position_ids.is_inference() else position_ids._version
    known = _DOCUMENTS_OF_POSITIONS.get(key)
    if known is not None and known.position_ids is others and known.version == version:
        return known.cu_seqlens
    steps, is_first = position_ids.diff(dim=1), position_ids[:, 1:] == position_ids[:, :1]
    # A position that repeats is no start: models of images give one position to many tokens.
    starts = F.pad((steps < 0) | ((steps == 0) & is_first), (1, 0), value=True).expand(batch_size, -1)
    in_mask = torch.zeros(batch_size * num_tokens + 1, dtype=torch.bool, device=starts.device)
    if mask is not None:
        in_mask[mask[0, 0, 0].long()] = True
    in_mask = in_mask[:-1].view(batch_size, num_tokens)
    in_mask[:, 0] = True
    is_padding = None if mask is None else _padding(mask, batch_size, num_tokens)
    if is_padding is not None:
        starts = starts & ~is_padding
    cu_seqlens = _mask_of_documents(starts | in_mask, None)[0, 0, 0] if bool((starts & ~in_mask).any()) else None
    if version is not None:
        _DOCUMENTS_OF_POSITIONS[key] = _Found(others, version, cu_seqlens)
    return cu_seqlens


# A graph cannot depend on values; that they are of no consequence is seen to while it runs, without breaking it.
@torch.library.custom_op(
    "muse_lightning::no_documents_of_positions", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,)
)
def _no_documents_of_positions(
    position_ids: Tensor, mask: Tensor | None, batch_size: int, num_tokens: int, name: str
) -> Tensor:
    """False, bool [1, 1], where `_documents_of_positions` finds None.

    Raises:
        ValueError: it finds documents.
    """
    if _documents_of_positions(position_ids, mask, batch_size, num_tokens) is not None:
        raise ValueError(
            f'attn_implementation="{name}" under torch.compile accepts position_ids that start again only with '
            "use_cache=False and without attention_mask"
        )
    return torch.zeros(1, 1, dtype=torch.bool, device=position_ids.device)


@_no_documents_of_positions.register_fake
def _(position_ids: Tensor, mask: Tensor | None, batch_size: int, num_tokens: int, name: str) -> Tensor:
    return position_ids.new_empty((1, 1), dtype=torch.bool)
