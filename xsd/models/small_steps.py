"""The decoder stack for a few rows a call: what transformers' LlamaModel computes, without the
memory traffic and bookkeeping that dominate small models on a CPU. Projections that read one input
are one matrix; keys and values stand in a buffer that grows in place; query heads that share keys
are rows of one product with them."""

import itertools
import time
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaModel

from xsd.core import depths

_ROOM = 64
_TURNED = 4096
"""Positions whose rotation is known from the start; more as they come."""
_WIDEST = 1024
"""Wider, a step is bound by its weights, and copies of them would cost memory for nothing."""
_WIDTHS = (1, 2, 3, 4, 5, 6, 8, 16)
"""Rows of a pass whose products are timed against each other, of a decoder with layers as wide as
``_TIMED``: two rows can cost more than four (a kernel for one row at a time)."""
_TIMED, _CHEAPER, _BLOCKED = 512, 0.85, 8
"""Width; what a wider pass, or packed weights, must cost, as a share, to be taken instead: below it
noise would choose; rows that weights are packed for."""


def fits(decoder: nn.Module) -> bool:
    """True for an unquantised float32 or bfloat16 Llama on the CPU, at most 1024 wide."""
    if not isinstance(decoder, LlamaModel):
        return False
    config, heads = decoder.config, decoder.config.num_attention_heads
    linears = [one for one in decoder.layers.modules() if isinstance(one, nn.Linear)]
    dtype = decoder.norm.weight.dtype
    return (heads % config.num_key_value_heads == 0
            and heads * decoder.layers[0].self_attn.head_dim == config.hidden_size <= _WIDEST
            and config.rope_parameters.get("rope_type") == "default"
            and config.hidden_act == "silu"
            and all(type(one) is nn.Linear and one.bias is None for one in linears)
            and all(type(weight.data) is Tensor  # torchao's are not
                    and weight.dtype == dtype in (torch.float32, torch.bfloat16)
                    and weight.device.type == "cpu"
                    for weight in (*decoder.layers.parameters(), decoder.norm.weight)))


def tree_rows(parents: Sequence[int], start: int, room: int = 0, *,
              device: torch.device | None = None) -> tuple[Tensor, Tensor]:
    """Where the n rows of a draft tree stand, int64 [n], and what each sees, bool [n, max(start +
    n, room)]: the ``start`` cached positions and the rows on its way. parents: the row before each,
    -1 for what is cached. room: of a cache of fixed size."""
    n = len(parents)
    mask = torch.zeros(n, max(start + n, room), dtype=torch.bool)
    mask[:, :start] = True
    for row, parent in enumerate(parents):
        if parent >= 0:
            mask[row] |= mask[parent]
        mask[row, start + row] = True
    places = torch.tensor(depths(parents), dtype=torch.long) + (start - 1)
    return places.to(device), mask.to(device)


class GrowingCache:
    """Keys and values of one sequence, a buffer [heads, room, head_dim] for each layer, free from
    ``length`` on. empty: one layer's, without a position [heads, 0, head_dim]."""

    def __init__(self, empty: Tensor, n_layers: int) -> None:
        self.length = 0
        self.keys = [self._roomy(empty) for _ in range(n_layers)]
        self.values = [self._roomy(empty) for _ in range(n_layers)]

    def _roomy(self, rows: Tensor, wanted: int = 0) -> Tensor:
        buffer = rows.new_empty(rows.shape[0], max(self.length + _ROOM, wanted), rows.shape[2])
        buffer[:, :self.length] = rows[:, :self.length]
        return buffer

    def reserve(self, length: int) -> None:
        """Make room for positions below ``length``; what is cached stays."""
        if length > self.keys[0].shape[1]:
            self.keys = [self._roomy(rows, 2 * length) for rows in self.keys]
            self.values = [self._roomy(rows, 2 * length) for rows in self.values]

    def get_seq_length(self) -> int:
        """Cached positions (transformers' name)."""
        return self.length

    def move(self, rows: Tensor, start: int) -> None:
        """Positions ``rows`` [k] come to stand at start … start + k - 1."""
        for buffer in (*self.keys, *self.values):
            buffer[:, start:start + len(rows)] = buffer[:, rows]

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last positions; a negative count, as transformers' caches take it."""
        self.length += tokens_to_remove


class Steps:
    """Copies of the weights of a decoder that :func:`fits`, arranged for small calls."""

    def __init__(self, decoder: LlamaModel) -> None:
        config = decoder.config
        self._decoder = decoder
        self._version = self._versions()
        self.heads, self.width = config.num_attention_heads, config.hidden_size
        self.shared = config.num_key_value_heads
        self.eps, self.norm = config.rms_norm_eps, decoder.norm.weight.detach()
        self.layers: list[tuple[Tensor, ...]] = []
        for layer in decoder.layers:
            mix, mlp = layer.self_attn, layer.mlp
            qkv = torch.cat([mix.q_proj.weight, mix.k_proj.weight, mix.v_proj.weight])
            gate_up = torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight])
            weights = (layer.input_layernorm.weight, qkv, mix.o_proj.weight,
                       layer.post_attention_layernorm.weight, gate_up, mlp.down_proj.weight)
            self.layers.append(tuple(self._arranged(weight.detach()) for weight in weights))
        self._turn(min(config.max_position_embeddings, _TURNED))
        self._packed = self._pack() if self.width >= _TIMED else []
        self._wide: set[int] = set()
        self._fed = _cheapest(self._timed()) if self.width >= _TIMED else {}

    def _arranged(self, weight: Tensor) -> Tensor:
        """As its product reads it fastest: float32 by columns, bfloat16 by rows."""
        return weight if weight.dtype == torch.bfloat16 else weight.t().contiguous()

    def _times(self, x: Tensor, weight: Tensor) -> Tensor:
        """x [n, D] through an arranged or packed weight."""
        if weight.layout == torch._mkldnn:
            return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
        return F.linear(x, weight) if weight.dtype == torch.bfloat16 else x @ weight

    @torch.no_grad()
    def _pack(self) -> list[tuple[Tensor, ...]]:
        """Once more, in oneDNN's blocks for passes of several rows; [] where it has none."""
        by_rows = self.norm.dtype == torch.bfloat16
        try:
            return [tuple(one if one.dim() == 1 else torch.ops.mkldnn._reorder_linear_weight(
                one if by_rows else one.t().contiguous(), _BLOCKED) for one in weights)
                    for weights in self.layers]
        except (RuntimeError, AttributeError):  # this build, or bfloat16 on this processor
            return []

    @torch.no_grad()
    def _timed(self) -> dict[int, float]:
        """Rows → seconds of one product in every third layer, the best of three; for ``_wide`` rows
        with the packed weights. Of this thread alone: other processes may hold the cores."""
        kinds = [layers for layers in (self.layers, self._packed) if layers]
        seconds = {rows: [float("inf")] * len(kinds) for rows in _WIDTHS}
        for _, rows, kind in itertools.product(range(3), _WIDTHS, range(len(kinds))):
            x, start = self.norm.new_ones(rows, self.width), time.thread_time()
            for weights in kinds[kind][::3]:
                self._times(x, weights[4])
            seconds[rows][kind] = min(seconds[rows][kind], time.thread_time() - start)
        self._wide = {rows for rows, one in seconds.items() if one[-1] < _CHEAPER * one[0]}
        return {rows: one[-1] if rows in self._wide else one[0] for rows, one in seconds.items()}

    def _turn(self, positions: int) -> None:
        cos, sin = self._decoder.rotary_emb(self.norm, torch.arange(positions)[None])
        first, second = sin[0].chunk(2, -1)
        self._cos = cos[0, :, None]
        # With the sign of rotate_half, so that a roll suffices.
        self._sin = torch.cat([-first, second], -1)[:, None]

    def _versions(self) -> list[tuple[int, int]]:
        return [(weight.data_ptr(), weight._version) for weight in self._decoder.parameters()]

    def current(self) -> bool:
        """False once a weight of the model has changed (training, loading)."""
        return self._version == self._versions()

    def prefill(self, embeds: Tensor,
                record: dict[int, Tensor] | None = None) -> tuple[Tensor, GrowingCache]:
        """Of a prompt [n, D]: its last post-norm state [D] and its cache. record: as in a call."""
        empty = self.norm.new_empty(self.shared, 0, self.width // self.heads)
        cache = GrowingCache(empty, len(self.layers))
        return self(embeds, cache, record=record)[-1], cache

    def __call__(self, embeds: Tensor, cache: GrowingCache, parents: Sequence[int] | None = None,
                 record: dict[int, Tensor] | None = None) -> Tensor:
        """Append embeds [n, D] to the cache; returns post-norm states [n, D], of a prompt (nothing
        cached yet) the last one, [1, D]. parents: as :func:`tree_rows` takes them. record: filled
        with what enters the layers that it names."""
        asked, start = embeds.shape[0], cache.length
        n = self._fed.get(asked, asked) if start else asked
        if n > asked:  # rows too many hang on the last one: nobody sees them
            embeds = F.pad(embeds, (0, 0, 0, n - asked))
            parents = parents and [*parents, *range(asked - 1, n - 1)]
        end, heads, width, shared = start + n, self.heads, self.width, self.shared
        cache.reserve(end)
        if end > len(self._cos):
            self._turn(2 * end)
        if parents is None:
            places, mask = slice(start, end), None
            if n > 1 and (start or shared < heads):
                mask = torch.ones(n, end, dtype=torch.bool).tril_(start)
        else:
            places, mask = tree_rows(parents, start)
        if mask is not None and shared < heads:
            mask = mask.repeat(heads // shared, 1)
        cos, sin = self._cos[places], self._sin[places]
        half = cos.shape[-1] // 2
        x, measured = embeds, next((rows for rows in _WIDTHS if rows >= n), _WIDTHS[-1])
        layers = self._packed if measured in self._wide else self.layers
        for number, (weights, keys, values) in enumerate(zip(layers, cache.keys, cache.values,
                                                             strict=True)):
            if record is not None and number in record:
                record[number] = x[:asked]
            before, to_qkv, out, after, to_gate_up, down = weights
            qkv = self._times(F.rms_norm(x, (width,), before, self.eps), to_qkv)
            qkv = qkv.view(n, heads + 2 * shared, -1)
            query_key = qkv[:, :heads + shared]
            query_key = torch.addcmul(query_key * cos, query_key.roll(half, -1), sin)
            keys[:, start:end] = query_key[:, heads:].transpose(0, 1)
            values[:, start:end] = qkv[:, heads + shared:].transpose(0, 1)
            if not start and number == len(self.layers) - 1:  # of a prompt one row is read
                query_key, x, mask, n = query_key[-1:], x[-1:], None, 1
            # [heads that share keys · n, head_dim] for each of those keys' heads
            query = query_key[:, :heads].transpose(0, 1).reshape(shared, -1, 2 * half)
            mixed = F.scaled_dot_product_attention(
                query[None], keys[None, :, :end], values[None, :, :end], attn_mask=mask,
                is_causal=mask is None and n > 1)[0]
            mixed = mixed.reshape(heads, n, -1).transpose(0, 1).reshape(n, width)
            x = x + self._times(mixed, out)
            both = self._times(F.rms_norm(x, (width,), after, self.eps), to_gate_up)
            gate, up = both.chunk(2, -1)
            x = x + self._times(F.silu(gate).mul_(up), down)
        cache.length = start + asked
        return F.rms_norm(x[:asked], (width,), self.norm, self.eps)


def _cheapest(seconds: dict[int, float]) -> dict[int, int]:
    """Rows → the wider pass to feed instead, where that is cheaper by more than noise."""
    fed = {}
    for rows in range(1, max(seconds)):
        wider = {wide: price for wide, price in seconds.items() if wide >= rows}
        best = min(wider, key=wider.__getitem__)
        if wider[best] < _CHEAPER * wider[min(wider)]:
            fed[rows] = best
    return fed
