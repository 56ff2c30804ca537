"""D1, D2 and D5F: a whole block of drafts in one pass (DFlash, arXiv:2602.06036; docs/adapters.md,
section 10).

Queries are the token verified last and K - 1 masks, which look at each other in both directions and
at a *context*: states of some layers at every position of prompt and verified answer, fused by one
matrix and injected as keys and values into every layer. D1 reads the verifier's, D2 the drafter's,
D5F both. Row k predicts the verifier's state k + 1 positions after the token; its LM head says the
draft. Rejections cost nothing: the context holds verified positions alone.
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xsd.adapters.attention import Kept
from xsd.adapters.base import Adapter, Aligned, Reads, eye_linear
from xsd.core import Batch, Context, ParameterError

LAYERS = (4, 7, 10)
"""What is read of a decoder of 12 layers (extract.contexts.default_layers)."""

Turn = tuple[Tensor, Tensor]
"""Cosines and sines of some places, [B or 1, 1, n, d]."""


def turn_of(places: Tensor, width: int, dtype: torch.dtype) -> Turn:
    """For rotary embedding (Su et al. 2021) of heads ``width`` wide at places [B or 1, n], counted
    from the answer's token 0 on; the prompt's are negative."""
    half = width // 2
    speed = 10000.0 ** (-torch.arange(half, device=places.device, dtype=torch.float32) / half)
    angle = (places[..., None].float() * speed)[:, None]
    cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
    return torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)


def rotate(x: Tensor, turn: Turn) -> Tensor:
    """x: [B, heads, n, d] at the places of ``turn``."""
    return torch.addcmul(x * turn[0], x.roll(x.shape[-1] // 2, -1), turn[1])


class BlockLayer(nn.Module):
    """Pre-norm layer as in Llama (RMSNorm, rotary, SwiGLU, no biases); context and block share the
    matrix of keys and values."""

    def __init__(self, hidden_size: int, n_heads: int, ffn: int, dropout: float) -> None:
        super().__init__()
        self.n_heads, self.dropout = n_heads, dropout
        self.attention_norm, self.ffn_norm = nn.RMSNorm(hidden_size), nn.RMSNorm(hidden_size)
        self.query = nn.Linear(hidden_size, hidden_size, bias=False)
        self.key_value = nn.Linear(hidden_size, 2 * hidden_size, bias=False)
        self.out = nn.Linear(hidden_size, hidden_size, bias=False)
        self.gate_up = nn.Linear(hidden_size, 2 * ffn, bias=False)
        self.down = nn.Linear(ffn, hidden_size, bias=False)

    def heads(self, x: Tensor) -> Tensor:
        """[B, n, D] → [B, heads, n, d]."""
        return x.unflatten(-1, (self.n_heads, -1)).transpose(1, 2)

    def keys_values(self, x: Tensor, turn: Turn) -> tuple[Tensor, Tensor]:
        """Of context or normed block rows [B, n, D] at the places of ``turn``: each [B, heads, n,
        d]."""
        keys, values = self.key_value(x).chunk(2, dim=-1)
        return rotate(self.heads(keys), turn), self.heads(values)

    def forward(self, x: Tensor, turn: Turn, block: int, context: tuple[Tensor, Tensor],
                allowed: Tensor) -> Tensor:
        """x: [B, A · block, D] rows of A blocks at the places of ``turn``. context: keys and values
        [B, heads, C, d]. allowed: bool [B, A, C], what each block may see of it."""
        normed = self.attention_norm(x)
        queries = rotate(self.heads(self.query(normed)), turn)
        keys, values = self.keys_values(normed, turn)
        shape = (*queries.shape[:2], -1, block, queries.shape[-1])  # [B, heads, A, block, d]
        scale = queries.shape[-1] ** -0.5
        far = (queries @ context[0].transpose(-1, -2)).unflatten(2, (-1, block)) * scale
        far = far.masked_fill(~allowed[:, None, :, None], float("-inf"))
        near = queries.view(shape) @ keys.view(shape).transpose(-1, -2) * scale
        weights = torch.cat([far, near], dim=-1).softmax(-1)
        n_far = far.shape[-1]
        mixed = (weights[..., :n_far].flatten(2, 3) @ context[1] +
                 (weights[..., n_far:] @ values.view(shape)).flatten(2, 3))
        x = x + self._drop(self.out(mixed.transpose(1, 2).flatten(2)))
        gate, up = self.gate_up(self.ffn_norm(x)).chunk(2, dim=-1)
        return x + self._drop(self.down(F.silu(gate) * up))

    def _drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout, self.training)


class BlockAdapter(Adapter):
    """block: drafts of one pass, K. layers: of the block drafter. context_layers: the layers of
    each model that it reads, as models/batched.py counts them; by role where they differ.
    vocab_size: rows of the frozen table that tells it the token verified last
    (:meth:`set_token_embedding`)."""

    shift = 1
    fuses_tokens = True

    def __init__(self, hidden_size: int = 4096, *, level: str = "D1",
                 drafter_size: int | None = None, vocab_size: int = 32000, block: int = 9,
                 layers: int = 3, n_heads: int | None = None, ffn: int | None = None,
                 dropout: float = 0.0,
                 context_layers: Mapping[str, list[int]] | list[int] | None = None) -> None:
        reads: Reads = {"D1": "verifier", "D2": "drafter"}.get(level, "both")
        self.reads = reads
        super().__init__(hidden_size, drafter_size=drafter_size)
        self.input_map = nn.Identity()
        self.level, self.block = level, block
        self.context_roles = tuple(role for role in ("verifier", "drafter")
                                   if reads in (role, "both"))
        given = LAYERS if context_layers is None else context_layers
        chosen = given if isinstance(given, Mapping) else dict.fromkeys(self.context_roles, given)
        self.context_layers = {role: list(chosen[role]) for role in self.context_roles
                               if role in chosen}
        n_heads = n_heads or max(1, hidden_size // 64)
        ffn = ffn or -(-hidden_size * 8 // 3 // 64) * 64
        if (min(block, layers, vocab_size, ffn) < 1 or hidden_size % n_heads
                or hidden_size // n_heads % 2 or not all(self.context_layers.values())
                or len(self.context_layers) < len(self.context_roles)):
            raise ParameterError(
                f"{level} needs block, layers, vocab_size and ffn of at least 1, n_heads that "
                f"divide {hidden_size} into even widths, and at least one context layer of each "
                f"model it reads; not {block}, {layers}, {vocab_size}, {ffn}, {n_heads}, {given}")
        widths = {"verifier": hidden_size, "drafter": self.drafter_size}
        self.fuse = nn.ModuleDict({role: nn.Linear(len(some) * widths[role], hidden_size)
                                   for role, some in self.context_layers.items()})
        self.context_norm = nn.ModuleDict({role: nn.RMSNorm(hidden_size)
                                           for role in self.context_roles})
        self.register_buffer("token_embedding", torch.zeros(vocab_size, hidden_size))
        self.token_map = eye_linear(hidden_size, hidden_size)
        self.no_token = nn.Parameter(torch.randn(hidden_size) * 0.5)
        self.mask = nn.Parameter(torch.randn(hidden_size) * 0.5)
        self.offsets = nn.Parameter(torch.zeros(block, hidden_size))
        self.layers = nn.ModuleList(BlockLayer(hidden_size, n_heads, ffn, dropout)
                                    for _ in range(layers))
        self.final_norm = nn.RMSNorm(hidden_size)
        self._copied: list[tuple[int, int]] | None = None
        self.options = {"vocab_size": vocab_size, "block": block, "layers": layers,
                        "n_heads": n_heads, "ffn": ffn, "dropout": dropout,
                        "context_layers": self.context_layers}

    # --- the context

    def keys_values(self, role: str, states: Tensor,
                    places: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Of each layer, [B, heads, C, d], from states of ``context_layers[role]`` [B, C, L · D] at
        places [B or 1, C] from the answer's token 0 on. Raises: ParameterError for another
        width."""
        fused, turn = self._fused(role, states), self._turn(places)
        return [layer.keys_values(fused, turn) for layer in self.layers]

    def _fused(self, role: str, states: Tensor) -> Tensor:
        if states.shape[-1] != self.fuse[role].in_features:
            raise ParameterError(
                f"{self.level} reads layers {self.context_layers[role]} of the {role}, "
                f"{self.fuse[role].in_features} numbers a position, and these contexts have "
                f"{states.shape[-1]}; extract the layers that it was made for")
        return self.context_norm[role](self.fuse[role](states))

    def _turn(self, places: Tensor) -> Turn:
        return turn_of(places, self.hidden_size // self.layers[0].n_heads, self.mask.dtype)

    def _rows(self, tokens: Tensor) -> Tensor:
        """What enters the first layer, [B, A, block, D], of tokens int64 [B, A]."""
        known = self.token_map(self.token_embedding[tokens.clamp_min(0)])
        first = torch.where((tokens >= 0)[..., None], known, self.no_token)
        masks = self.mask.expand(*tokens.shape, self.block - 1, -1)
        return torch.cat([first[:, :, None], masks], dim=2) + self.offsets

    def draft(self, context: list[tuple[Tensor, Tensor]], tokens: Tensor, places: Tensor,
              allowed: Tensor) -> Tensor:
        """States [B, A, block, D_v] after tokens int64 [B, A] at places [B, A]; row k predicts the
        verifier's state k + 1 positions on. context: keys and values of each layer. allowed: bool
        [B, A, C]."""
        x = self._rows(tokens).flatten(1, 2)
        steps = torch.arange(self.block, device=tokens.device)
        turn = self._turn((places[..., None] + steps).flatten(1))
        for layer, known in zip(self.layers, context, strict=True):
            x = layer(x, turn, self.block, known, allowed)
        return self.final_norm(x).unflatten(1, (-1, self.block))

    # --- one request: a few rows a call, where the number of products counts, not their size

    def keep(self) -> Kept:
        """An empty cache of the context's keys and values, one for each answer."""
        weights = [(one.data_ptr(), 0 if one.is_inference() else one._version)
                   for one in self.parameters()]
        if weights != self._copied:
            self._copied, self._products = weights, self._arranged()
        return Kept(len(self.layers))

    @torch.no_grad()
    def _arranged(self) -> tuple[Tensor, list[tuple[Tensor, Tensor, Tensor, Tensor]]]:
        """One matrix for the context's keys, then values, of all layers; of each layer one for
        queries, keys and values of the block, and its other three."""
        def product(*weights: Tensor) -> Tensor:
            whole = (torch.cat(weights) if len(weights) > 1 else weights[0]).t()
            # a CPU is faster by columns; copies of wide ones would cost memory for nothing
            return whole.contiguous() if self.hidden_size <= 1024 else whole

        size = self.hidden_size
        return (product(*(one.key_value.weight[:size] for one in self.layers),
                        *(one.key_value.weight[size:] for one in self.layers)),
                [(product(one.query.weight, one.key_value.weight), product(one.out.weight),
                  product(one.gate_up.weight), product(one.down.weight)) for one in self.layers])

    def read(self, kept: Kept, role: str, states: Tensor, first: int) -> None:
        """Add to what is kept of an answer the context of the next positions, states [n, L · D]
        from place ``first`` on; the models' in any order: keys carry their places."""
        heads, n = self.layers[0].n_heads, len(states)
        turn = self._turn(torch.arange(first, first + n, device=states.device)[None])
        both = self._fused(role, states) @ self._products[0]
        keys, values = both.view(n, 2, len(self.layers) * heads, -1).permute(1, 2, 0, 3)[:, None]
        keys = rotate(keys, turn)
        for number in range(len(self.layers)):
            mine = slice(number * heads, (number + 1) * heads)
            kept.add(number, keys[:, mine], values[:, mine])
        kept.length += n

    def step_block(self, kept: Kept, token: int, place: int) -> Tensor:
        """:meth:`draft` after one token over all that is kept, [block, D_v]; in eval mode. The
        block's own keys and values stand behind the kept ones until the next ones do."""
        device, heads, size = self.mask.device, self.layers[0].n_heads, self.hidden_size
        x = self._rows(torch.tensor([[token]], device=device))[0, 0]
        turn = self._turn(torch.arange(place, place + self.block, device=device)[None])
        for number, (layer, (qkv, out, gate_up, down)) in enumerate(
                zip(self.layers, self._products[1], strict=True)):
            own = (layer.attention_norm(x) @ qkv).view(1, self.block, 3 * heads, -1).transpose(1, 2)
            queries, keys = rotate(own[:, :2 * heads], turn).chunk(2, dim=1)
            seen = kept.add(number, keys, own[:, 2 * heads:])
            mixed = F.scaled_dot_product_attention(queries, *seen)[0]
            x = x + mixed.transpose(0, 1).reshape(-1, size) @ out
            gate, up = (layer.ffn_norm(x) @ gate_up).chunk(2, dim=-1)
            x = x + (F.silu(gate) * up) @ down
        return self.final_norm(x)

    # --- whole answers

    def rolled(self, batch: Batch, steps: int, starts: Tensor | None = None) -> list[Tensor]:
        """As Adapter.rolled: of every verified position s, in one pass; at most ``block``.
        starts: bool [B, S], the positions to draft from; other rows mean nothing."""
        count, size = batch.mask.shape
        places = torch.arange(size, device=batch.mask.device).expand(count, -1)
        if starts is not None:  # those first, and as many columns as the answer with most has
            order = starts.int().argsort(dim=1, descending=True, stable=True)
            places = order[:, :max(1, int(starts.sum(1).max()))]
        context, allowed = self._known(batch.context, places)
        states = self.draft(context, batch.ids_by_verifier.gather(1, places), places,
                            allowed)[:, :, :steps]
        if starts is not None:
            index = places[..., None, None].expand_as(states)
            states = states.new_zeros(count, size, *states.shape[2:]).scatter(1, index, states)
        return list(states.unbind(2))

    def _known(self, given: Mapping[str, Context],
               places: Tensor) -> tuple[list[tuple[Tensor, Tensor]], Tensor]:
        """Keys and values of all contexts, and what each place may see: the verifier's states
        before it reads the token there (it reads that in its next pass), the drafter's after it
        has."""
        pieces, allowed = [], []
        for role in self.context_roles:
            if role not in given:
                raise ParameterError(
                    f"{self.level} reads the {role}'s context and these pairs came without; open "
                    "them with contexts (notebook 01 with contexts="
                    f"{','.join(self.context_roles)})")
            states, start = given[role].states, given[role].start
            at = torch.arange(states.shape[1], device=states.device)[None] - start[:, None]
            pieces.append(self.keys_values(role, states, at))
            last = places[..., None] + (role == "drafter")
            allowed.append(at[:, None] < last)
        joined = [tuple(torch.cat(side, dim=2) for side in zip(*layer, strict=True))
                  for layer in zip(*pieces, strict=True)]
        return joined, torch.cat(allowed, dim=-1)

    def align(self, batch: Batch) -> Aligned:
        """The first draft after every verified position."""
        known, predicted = batch.mask[:, :-1], batch.mask[:, 1:]
        return Aligned(self.rolled(batch, 1)[0][:, :-1], batch.verifier[:, 1:],
                       batch.ids_by_verifier[:, 1:], known & predicted)
