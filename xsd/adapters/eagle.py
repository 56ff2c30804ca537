"""L5, B1, L5F and X1: EAGLE-style causal adapters (docs/adapters.md; 102 819 841, 169 936 897 and
102 828 033 parameters at 4096).

L5 reads the drafter. B1 is the same module fed with verifier states and asked for the next one: the
upper bound without the modality gap. L5F fuses both sensors' states, in X1 the drafter's look at
the verifier's. B1, L5F and X1 draft several tokens by feeding on their own predictions:
:meth:`EagleAdapter.unroll`.
"""

from typing import Any

import torch
from torch import Tensor, nn

from xsd.adapters.attention import LayerAdapter, allowed_keys
from xsd.adapters.base import causal_mask, eye_linear
from xsd.core import ParameterError


class EagleAdapter(LayerAdapter):
    """LayerNorm, + learned position, causal layer, LayerNorm, projection, out = x + α (projection -
    x).

    vocab_size: fuses the embedding of the token before each predicted position, Linear₂D→D([state;
    embedding]) in front; the embedding is a frozen table (:meth:`set_token_embedding`).
    residual_map: a linear map of everything that is read stands where the residual is (B1: from
    verifier[t], L5F: from both), so that a closed form of the next state can be the start; begins
    as the plain residual. prediction_weight: of L5's loss against the next state (train/parts.py).
    """

    def __init__(self, hidden_size: int = 4096, *, level: str = "L5",
                 drafter_size: int | None = None, input_map: bool = False, layers: int = 1,
                 n_heads: int | None = None, ffn: int | None = None, dropout: float = 0.1,
                 alpha: float = 0.1, max_positions: int = 512,
                 prediction_weight: float | None = None, vocab_size: int | None = None,
                 residual_map: bool = False) -> None:
        if level == "B1":
            self.reads, self.shift = "verifier", 1
        super().__init__(hidden_size, drafter_size=drafter_size, input_map=input_map)
        self.level, self.max_positions = level, max_positions
        if prediction_weight is None:
            prediction_weight = 0.5 if level == "L5" else 0.0
        self.prediction_weight = prediction_weight
        self.input_norm = nn.LayerNorm(hidden_size)
        self.positions = nn.Parameter(torch.empty(1, max_positions, hidden_size))
        nn.init.trunc_normal_(self.positions, std=0.02)
        self._make_layers(layers, n_heads, ffn, dropout, alpha)
        self.options |= {"max_positions": max_positions, "prediction_weight": prediction_weight,
                         "vocab_size": vocab_size, "residual_map": residual_map}
        self.residual_map: nn.Linear | None = None
        if residual_map:
            if self.shift == 0:
                raise ParameterError(f"{level} has its linear map in front (input_map=True); "
                                     "residual_map is for B1 and L5F")
            front = self.drafter_size if self.reads == "both" else 0
            self.residual_map = eye_linear(front + hidden_size, hidden_size)
            with torch.no_grad():  # starts as the verifier's state, which comes last
                self.residual_map.weight.copy_(self.residual_map.weight.roll(front, dims=1))
        self.fuses_tokens = vocab_size is not None
        if vocab_size is not None:
            self.register_buffer("token_embedding", torch.zeros(vocab_size, hidden_size))
            self.token_map = eye_linear(2 * hidden_size, hidden_size)  # starts as the state alone

    def tokens_said(self, states: Tensor) -> Tensor:
        """argmax of the LM head, [..., D_v] → int64 [...]; the table is the head's rows up to a
        positive factor, which no argmax sees."""
        if not self.fuses_tokens:
            return super().tokens_said(states)
        return (states.to(self.token_embedding.dtype) @ self.token_embedding.T).argmax(-1)

    # --- pieces shared by forward and unroll

    def _base(self, states: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        """(normalised layer input, residual source), each [B, S, D_v], from the states that forward
        takes."""
        x = self.input_map(states[0])
        return self.input_norm(x), x if self.residual_map is None else self.residual_map(x)

    def _memory(self, states: tuple[Tensor, ...], places: slice) -> Tensor | None:
        """What the layers look at, [B, S, D_v]; None: at their own input."""
        return None

    def _embed(self, states: tuple[Tensor, ...], first: int,
               tokens: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """(layer input, residual source, memory), each [B, S, D_v]."""
        base, residual = self._base(states)
        end = first + base.shape[1]
        if end > self.max_positions:
            raise ParameterError(f"{self.level} knows {self.max_positions} positions and was asked "
                                 f"for {end}; create it with max_positions={end} or more")
        if self.fuses_tokens:
            if tokens is None:
                raise ParameterError(f"{self.level} fuses tokens: pass the int64 tokens [B, S] "
                                     "that stand before the predicted positions")
            embedded = self.token_embedding[tokens.clamp_min(0)] * (tokens >= 0).unsqueeze(-1)
            base = self.token_map(torch.cat([base, embedded.to(base.dtype)], dim=-1))
        places = slice(first, end)
        return base + self.positions[:, places], residual, self._memory(states, places)

    def forward(self, *states: Tensor, mask: Tensor | None = None,
                tokens: Tensor | None = None) -> Tensor:
        """states: [B, S, D] (L5, B1), or drafter [B, S, D_d] and verifier [B, S, D_v] (L5F) → [B,
        S, D_v]. mask: bool [B, S]. tokens: int64 [B, S]."""
        if len(states) == (2 if self.reads != "both" else 3):  # mask given by position
            *states, mask = states
        x, residual, memory = self._embed(tuple(states), 0, tokens)
        allowed = allowed_keys(x.shape[1], mask, causal=True, device=x.device)
        for layer in self.layers:
            x = layer(x, allowed, memory)
        return self._leave(x, residual)

    def unroll(self, drafter: Tensor | None, verifier: Tensor, steps: int,
               tokens: Tensor | None = None) -> list[Tensor]:
        """As Adapter.unroll, from every position at once (EAGLE-3's training-time test): true keys
        and values are computed once, and each start carries its own further ones."""
        self._refuse_unroll(drafter)
        size = verifier.shape[1]
        rows = torch.arange(size, device=verifier.device)
        allowed = causal_mask(size, verifier.device)
        # of each layer keys and values: the true ones, then each start's own
        seen: list[list[tuple[Tensor, ...]]] = [[] for _ in self.layers]
        results: list[Tensor] = []
        state = verifier
        for k in range(steps):
            states: tuple[Tensor, ...] = (state,)
            if self.reads == "both":
                ahead = (rows + k + self.drafter_lead).clamp_max(size - 1)
                states = (drafter[:, ahead[:0] if k and self.verified_only else ahead], state)
            said = None if tokens is None else tokens[:, (rows + k).clamp_max(size - 1)]
            first = min(k, self.max_positions - size)
            x, residual, memory = self._embed(states, first, said)
            for layer, known in zip(self.layers, seen, strict=True):
                queries, *new = layer.look(x, memory)
                known.append(tuple(new))
                x = layer.finish(x, layer.attend_with(queries, *known[0], allowed, known[1:]))
            state = self._leave(x, residual)
            results.append(state)
        return results


class FusedEagleAdapter(EagleAdapter):
    """L5F: gate = σ(Linear([h_d; h_v])), x = LayerNorm(gate·h_d + (1-gate)·h_v + Linear([h_d;
    h_v])), then as L5; residual from h_v.

    drafter_lead=1 (default): beside verifier[t] stands drafter[t+1], which follows the verifier's
    token t and exists while drafting. 0: the reference's alignment, drafter[t] beside verifier[t].
    verified_only: the drafter steps once a round in place of once a draft; beside an own prediction
    stands a linear map of it (to be trained with rollout_steps of 2 and more).
    """

    reads = "both"
    shift = 1

    def __init__(self, hidden_size: int = 4096, *, level: str = "L5F", drafter_lead: int = 1,
                 verified_only: bool = False, **options: Any) -> None:
        if drafter_lead not in (0, 1):
            raise ParameterError(f"drafter_lead must be 0 (the reference's) or 1, not "
                                 f"{drafter_lead!r}: further drafter states do not exist while "
                                 "drafting")
        super().__init__(hidden_size, level=level, **options)
        self.drafter_lead = self.options["drafter_lead"] = drafter_lead
        self.gate = nn.Linear(2 * hidden_size, hidden_size)
        self.fusion = nn.Linear(2 * hidden_size, hidden_size)
        self.verified_only = self.options["verified_only"] = verified_only
        if verified_only:
            self.stand_in = eye_linear(hidden_size, self.drafter_size)

    def _base(self, states: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        verifier, missing = states[1], states[1].shape[1] - states[0].shape[1]
        if missing:
            own = self.stand_in(verifier[:, -missing:])
            states = (torch.cat([states[0], own], dim=1), verifier)
        drafter = self.input_map(states[0])
        together = torch.cat([drafter, verifier], dim=-1)
        gate = torch.sigmoid(self.gate(together))
        residual = verifier
        if self.residual_map is not None:
            residual = self.residual_map(torch.cat(states, dim=-1))
        mixed = gate * drafter + (1 - gate) * verifier + self.fusion(together)
        return self.input_norm(mixed), residual


class CrossAdapter(EagleAdapter):
    """X1, cross-modal attention: queries are the drafter's states (drafter[t+1], see L5F), keys and
    values the verifier's known ones, verifier[0…t]; residual from the drafter's."""

    reads = "both"
    shift = 1
    drafter_lead = 1

    def __init__(self, hidden_size: int = 4096, *, level: str = "X1", **options: Any) -> None:
        refused = {"vocab_size", "residual_map", "prediction_weight"} & {
            name for name, value in options.items() if value}
        if refused:
            raise ParameterError(f"{level} takes no {', '.join(sorted(refused))}: its drafter has "
                                 "read the token before; see docs/adapters.md, section 1")
        super().__init__(hidden_size, level=level, **options)
        self.memory_norm = nn.LayerNorm(hidden_size)

    def _memory(self, states: tuple[Tensor, ...], places: slice) -> Tensor:
        return self.memory_norm(states[1]) + self.positions[:, places]
