"""The transformer layer of L4, L5, L5F and B1, and L4 itself (docs/adapters.md; 100 714 497
parameters at 4096)."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xsd.adapters.base import Adapter, causal_mask, default_sizes, eye_linear
from xsd.core import ParameterError


class TransformerLayer(nn.Module):
    """Pre-norm layer: x + attention(LayerNorm(x)), then x + down(dropout(GELU(up(LayerNorm(x))))),
    dropout 0.1, biases everywhere: ``torch.nn.TransformerEncoderLayer(norm_first=True)`` (a test
    holds them together), written out because eagle.py's rollout needs keys and values one by one.
    """

    def __init__(self, hidden_size: int, *, n_heads: int, ffn: int, dropout: float) -> None:
        super().__init__()
        if hidden_size % n_heads:
            raise ParameterError(f"{n_heads} attention heads do not divide the hidden size "
                                 f"{hidden_size}; choose n_heads among its divisors")
        self.n_heads, self.dropout = n_heads, dropout
        self.attention_norm = nn.LayerNorm(hidden_size)
        self.query_key_value = nn.Linear(hidden_size, 3 * hidden_size)
        self.attention_out = nn.Linear(hidden_size, hidden_size)
        self.ffn_norm = nn.LayerNorm(hidden_size)
        self.ffn_up = nn.Linear(hidden_size, ffn)
        self.ffn_down = nn.Linear(ffn, hidden_size)
        nn.init.xavier_uniform_(self.query_key_value.weight)
        nn.init.zeros_(self.query_key_value.bias)
        nn.init.zeros_(self.attention_out.bias)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[B, S, D] → queries, keys, values, each [B, heads, S, D / heads]."""
        packed = self.query_key_value(self.attention_norm(x))
        queries, keys, values = packed.unflatten(-1, (3, self.n_heads, -1)).permute(2, 0, 3, 1, 4)
        return queries, keys, values

    def finish(self, x: Tensor, attended: Tensor) -> Tensor:
        """x: [B, S, D]; attended: [B, heads, S, D / heads] → the layer's output [B, S, D]."""
        attended = self.attention_out(attended.transpose(1, 2).reshape(x.shape))
        x = x + self._drop(attended)
        return x + self._drop(self.ffn_down(self._drop(F.gelu(self.ffn_up(self.ffn_norm(x))))))

    def look(self, x: Tensor, memory: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries of x, keys and values of ``memory`` [B, S, D] (None: of x, too)."""
        queries, *own = self.project(x)
        return queries, *(own if memory is None else self.project(memory)[1:])

    def forward(self, x: Tensor, allowed: Tensor | None, memory: Tensor | None = None) -> Tensor:
        """x: [B, S, D]. allowed: bool, broadcastable to [B, heads, S, S], True where a query may
        look at a key. memory: what it looks at, None: at x."""
        attended = F.scaled_dot_product_attention(*self.look(x, memory), attn_mask=allowed,
                                                  dropout_p=self.dropout if self.training else 0.0)
        return self.finish(x, attended)

    def attend_with(self, queries: Tensor, keys: Tensor, values: Tensor, allowed: Tensor,
                    own: list[tuple[Tensor, Tensor]]) -> Tensor:
        """Attention over shared keys, and for each query over further keys of its own (eagle.py's
        rollout) → [B, H, S, d].

        queries, keys, values: [B, H, S, d]; allowed: bool [S, S]; own: (key, value) pairs, each [B,
        H, S, d]: row s is for query s alone.
        """
        scale = 1 / math.sqrt(queries.shape[-1])
        shared = (queries @ keys.transpose(-1, -2) * scale).masked_fill(~allowed, float("-inf"))
        further = [(queries * key).sum(-1, keepdim=True) * scale for key, _ in own]
        weights = self._drop(torch.cat([shared, *further], dim=-1).softmax(-1))
        result = weights[..., :keys.shape[2]] @ values
        for column, (_, value) in enumerate(own, start=keys.shape[2]):
            result = result + weights[..., column:column + 1] * value
        return result

    def _drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout, self.training)


def allowed_keys(size: int, mask: Tensor | None, *, causal: bool,
                 device: torch.device) -> Tensor | None:
    """Which keys each query may see, bool broadcastable to [B, 1, S, S]. mask: bool [B, S], True on
    real positions. A padded query still sees itself: an empty row would be NaN and spread through
    the gradient."""
    if mask is None:
        return causal_mask(size, device) if causal else None
    allowed = mask.bool()[:, None, None, :]
    if causal:
        allowed = allowed & causal_mask(size, device)
    return allowed | torch.eye(size, dtype=torch.bool, device=device)


class Kept:
    """Keys and values of an answer's first ``length`` positions, [heads, length, d] of each layer,
    in buffers that grow by doubling: what makes one more step cost the same at every length."""

    def __init__(self, n_layers: int) -> None:
        self.length = 0
        self._buffers: list[Tensor | None] = [None] * n_layers

    def forget(self, length: int) -> None:
        """What was read at positions from ``length`` on is no longer so."""
        self.length = min(self.length, length)

    def add(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Those of the next n positions, each [1, heads, n, d]; returns all, [1, heads, length + n,
        d]. ``length`` itself is moved by who has filled every layer."""
        end, buffer = self.length + keys.shape[2], self._buffers[layer]
        if buffer is None or end > buffer.shape[3]:
            grown = keys.new_empty(2, *keys.shape[:2], max(64, 2 * end), keys.shape[3])
            if buffer is not None:
                grown[:, :, :, :self.length] = buffer[:, :, :, :self.length]
            self._buffers[layer] = buffer = grown
        for kept, new in zip(buffer, (keys, values), strict=True):
            kept[:, :, self.length:end] = new
        return buffer[0, :, :, :end], buffer[1, :, :, :end]


class LayerAdapter(Adapter):
    """What L4, L5, B1, L5F and X1 share: transformer layers, LayerNorm, eye-initialised projection,
    out = x + α (projection - x)."""

    def _make_layers(self, layers: int, n_heads: int | None, ffn: int | None, dropout: float,
                     alpha: float) -> None:
        size = self.hidden_size
        if layers < 1:
            raise ParameterError(f"layers must be at least 1, not {layers}")
        n_heads, ffn = n_heads or math.gcd(8, size), ffn or default_sizes(size)["ffn"]
        self.options |= {"layers": layers, "n_heads": n_heads, "ffn": ffn, "dropout": dropout,
                         "alpha": alpha}
        made = [TransformerLayer(size, n_heads=n_heads, ffn=ffn, dropout=dropout)
                for _ in range(layers)]
        self.layer, self.further = made[0], nn.ModuleList(made[1:])
        self.final_norm = nn.LayerNorm(size)
        self.projection = eye_linear(size, size)
        self.alpha = nn.Parameter(torch.tensor(float(alpha)))

    @property
    def layers(self) -> list[TransformerLayer]:
        """All layers, the first one first."""
        return [self.layer, *self.further]

    def _embed(self, states: tuple[Tensor, ...], first: int,
               tokens: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """(layer input, residual source, memory or None), each [B, S, D_v], of the states that
        stand at positions from ``first`` on."""
        x = self.input_map(states[0])
        return x, x, None

    def keep(self) -> Kept:
        """An empty cache for :meth:`step`, one for each answer."""
        return Kept(len(self.layers))

    @torch.no_grad()
    def step(self, drafter_states: Tensor | None, verifier_states: Tensor | None,
             tokens: Tensor | None = None, kept: Kept | None = None) -> Tensor:
        """As Adapter.step; only what ``kept`` does not hold is computed. The caller says what of it
        has changed since (``kept.forget``)."""
        known, said = self._known(drafter_states, verifier_states, tokens)
        kept, n = kept or self.keep(), len(known[-1])
        kept.forget(n - 1)
        first = kept.length
        x, residual, memory = self._embed(tuple(one[None, first:] for one in known), first,
                                          None if said is None else said[None, first:])
        allowed = causal_mask(n, x.device)[first:] if n - first > 1 else None
        for number, layer in enumerate(self.layers):
            queries, *new = layer.look(x, memory)
            seen = kept.add(number, *new)
            if number == len(self.layers) - 1:  # one row from here on
                x, queries, allowed = x[:, -1:], queries[:, :, -1:], None
            attended = F.scaled_dot_product_attention(queries, *seen, attn_mask=allowed)
            x = layer.finish(x, attended)
        kept.length = n
        return self._leave(x, residual[:, -1:])[0, 0]

    def _leave(self, x: Tensor, residual: Tensor) -> Tensor:
        return residual + self.alpha * (self.projection(self.final_norm(x)) - residual)


class AttentionAdapter(LayerAdapter):
    """L4. ``causal=True`` is this project's default: position t uses drafter states 0…t, all that
    exist while drafting. ``causal=False`` is the reference's: trained on whole answers; evaluated
    here on prefixes all the same (with its one layer a prefix's last position is exactly what the
    causal mask gives, because keys and values come from the inputs alone)."""

    def __init__(self, hidden_size: int = 4096, *, level: str = "L4",
                 drafter_size: int | None = None, input_map: bool = False, causal: bool = True,
                 layers: int = 1, n_heads: int | None = None, ffn: int | None = None,
                 dropout: float = 0.1, alpha: float = 0.1) -> None:
        super().__init__(hidden_size, drafter_size=drafter_size, input_map=input_map)
        if layers > 1 and not causal:
            raise ParameterError(f"{level} of {layers} layers must be causal: what it says of a "
                                 "prefix is not what whole answers taught it")
        self.level, self.causal = level, causal
        self._make_layers(layers, n_heads, ffn, dropout, alpha)
        self.options["causal"] = causal

    def forward(self, x: Tensor, mask: Tensor | None = None, *,
                causal: bool | None = None) -> Tensor:
        """x: [B, S, D_d] → [B, S, D_v]. mask: bool [B, S], True on real positions. causal:
        overrides the adapter's own."""
        residual = x = self.input_map(x)
        causal = self.causal if causal is None else causal
        allowed = allowed_keys(x.shape[1], mask, causal=causal, device=x.device)
        for layer in self.layers:
            x = layer(x, allowed)
        return self._leave(x, residual)
