"""What every adapter is: a module from hidden states to the verifier's, with its shift and its mask
applied in one place. With shift 1 the target is one position later than the last input, so that no
adapter sees the state that it is to predict (docs/adapters.md, section 2)."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xsd.core import Batch, MetricError, ParameterError

Reads = Literal["drafter", "verifier", "both"]


class Aligned(NamedTuple):
    """Predicted beside true. aligned, target: [B, S', D_v]; ids: int64 [B, S'] the verifier's
    tokens there; mask: bool [B, S']. S' = S for shift 0, S - 1 for shift 1 (index i is position
    i + 1)."""

    aligned: Tensor
    target: Tensor
    ids: Tensor
    mask: Tensor


def default_sizes(hidden_size: int) -> dict[str, int]:
    """Inner widths for a hidden width: the reference's 256 / 1024 / 2048 at 4096; below 1024 ratios
    of 1/2, 1 and 2, since 12 of 192 is no width."""
    if hidden_size >= 1024:
        return {"bottleneck": 256, "wide": hidden_size // 4, "ffn": hidden_size // 2}
    return {"bottleneck": max(1, hidden_size // 2), "wide": hidden_size, "ffn": 2 * hidden_size}


def eye_linear(inputs: int, outputs: int) -> nn.Linear:
    """A linear map that starts as the identity, as far as the widths allow."""
    made = nn.Linear(inputs, outputs)
    nn.init.eye_(made.weight)
    nn.init.zeros_(made.bias)
    return made


def alignment_loss(aligned: Tensor, target: Tensor, mask: Tensor | None = None, *,
                   cosine_weight: float = 0.5) -> dict[str, Tensor]:
    """The reference's loss, MSE + 0.5 (1 - cos), each a mean over the real positions: total_loss,
    mse_loss, cos_loss, cos_sim (scalars). aligned, target: [B, S, D]. mask: bool [B, S], True on
    real positions; None means all.

    Raises: MetricError when the shapes differ or nothing is unmasked.
    """
    if aligned.shape != target.shape:
        raise MetricError(
            f"aligned states {tuple(aligned.shape)} and targets {tuple(target.shape)} must have "
            "one shape; check the adapter's shift and width")
    if mask is not None:
        aligned, target = aligned[mask.bool()], target[mask.bool()]
    if aligned.numel() == 0:
        raise MetricError("the alignment loss has no position left: the mask leaves none; drop "
                          "empty answers before training")
    mse = F.mse_loss(aligned, target)
    cosine = F.cosine_similarity(aligned, target, dim=-1).mean()
    total = mse + cosine_weight * (1 - cosine)
    return {"total_loss": total, "mse_loss": mse, "cos_loss": 1 - cosine, "cos_sim": cosine}


class Adapter(nn.Module):
    """Base of all adapters.

    hidden_size: D_v. drafter_size: D_d; where it differs (or ``input_map=True``) a linear map
    D_d → D_v comes first, the identity at initialisation as far as the widths allow. ``options``:
    the constructor's arguments as saved beside the weights.
    """

    level: str = ""
    reads: Reads = "drafter"
    shift: int = 0
    causal: bool = True
    pointwise: bool = False  # position t of the output depends on position t of the input alone
    drafter_lead: int = 0
    verified_only: bool = False  # reads no drafter state that follows a draft token
    fuses_tokens: bool = False
    context_layers: Mapping[str, Sequence[int]]  # by role: what it reads of a Batch's context
    made_from: Any = None  # the researcher's own class it was made from, else None
    draft_ids: Tensor | None  # int64 [k], ascending: the only tokens it drafts; None: all

    def __init__(self, hidden_size: int, *, drafter_size: int | None = None,
                 input_map: bool = False) -> None:
        super().__init__()
        self.hidden_size, self.drafter_size = hidden_size, drafter_size or hidden_size
        if min(self.hidden_size, self.drafter_size) < 1:
            raise ParameterError(f"hidden sizes must be positive, not verifier {hidden_size} and "
                                 f"drafter {drafter_size}")
        self.options: dict[str, Any] = {"input_map": input_map}
        self.context_layers = {}
        self.register_buffer("draft_ids", None)
        self.input_map: nn.Module = nn.Identity()
        if self.reads != "verifier" and (input_map or self.drafter_size != hidden_size):
            self.input_map = eye_linear(self.drafter_size, hidden_size)

    def config(self) -> dict[str, Any]:
        """Level, widths and options: what create_adapter needs to build this adapter again."""
        return {"level": self.level, "hidden_size": self.hidden_size,
                "drafter_size": self.drafter_size, "options": dict(self.options)}

    def set_draft_vocabulary(self, ids: Tensor) -> None:
        """Draft only the tokens ``ids``, int64 [k]; saved with the weights. Raises: ParameterError
        for none, or one twice."""
        if ids.numel() == 0 or len(ids.unique()) != ids.numel():
            raise ParameterError(f"a draft vocabulary is at least one id and none twice, not "
                                 f"{ids.numel()}, {len(ids.unique())} different")
        self.options["draft_vocabulary"] = ids.numel()
        self.register_buffer("draft_ids", ids.detach().to(torch.int64).flatten())

    def forward(self, *inputs: Tensor, mask: Tensor | None = None) -> Tensor:
        """[B, S, D] (or drafter [B, S, D_d] and verifier [B, S, D_v] for reads == "both") → [B, S,
        D_v]."""
        raise NotImplementedError(f"{type(self).__name__} defines no forward")

    # --- the shift, once

    def inputs_of(self, batch: Batch) -> tuple[tuple[Tensor, ...], Tensor, Tensor, Tensor, Tensor]:
        """What :meth:`forward` reads of a batch and what it is to predict: (inputs, input mask,
        target, ids, target mask). Raises: ParameterError for states of other widths."""
        sizes = batch.drafter.shape[-1], batch.verifier.shape[-1]
        if sizes[1] != self.hidden_size or (self.reads != "verifier"
                                            and sizes[0] != self.drafter_size):
            raise ParameterError(
                f"{self.level} maps states {self.drafter_size} wide to {self.hidden_size} and "
                f"these pairs are {sizes[0]} and {sizes[1]} wide; give an adapter trained on the "
                "same two models")
        if self.shift == 0:
            return (batch.drafter,), batch.mask, batch.verifier, batch.ids_by_verifier, batch.mask
        inputs: tuple[Tensor, ...] = (batch.verifier[:, :-1],)
        if self.reads == "both":
            drafter = batch.drafter[:, 1:] if self.drafter_lead else batch.drafter[:, :-1]
            inputs = (drafter, *inputs)
        known, predicted = batch.mask[:, :-1], batch.mask[:, 1:]
        return (inputs, known, batch.verifier[:, 1:], batch.ids_by_verifier[:, 1:],
                known & predicted)

    def align(self, batch: Batch) -> Aligned:
        """Predictions beside their targets, shifted once for training and evaluation alike, from
        what exists while drafting: in eval mode a bidirectional adapter (L4 with causal=False)
        computes position t from the prefix 0…t."""
        inputs, input_mask, target, ids, mask = self.inputs_of(batch)
        keywords = {} if self.training else self._as_drafting()
        if self.fuses_tokens:  # the token before each predicted position, -1 where there is none
            before = batch.ids_by_verifier[:, :-1]
            keywords["tokens"] = before if self.shift else F.pad(before, (1, 0), value=-1)
        return Aligned(self(*inputs, mask=input_mask, **keywords), target, ids, mask)

    def _as_drafting(self) -> dict[str, Any]:
        return {} if self.causal else {"causal": True}

    # --- position by position

    @torch.no_grad()
    def step(self, drafter_states: Tensor | None, verifier_states: Tensor | None,
             tokens: Tensor | None = None) -> Tensor:
        """The next verifier state while drafting, from everything known of this answer so far; in
        eval mode.

        Args: drafter_states: [n, D_d], positions 0…n-1. verifier_states: [m, D_v], positions
        0…m-1, known or predicted (the caller appends what this returns). None where not read.
        tokens: int64, the answer's tokens so far, for adapters that fuse them (n - 1 of them for
        shift 0, m for shift 1).
        Returns: [D_v]: verifier state n - 1 when shift == 0, m when shift == 1. Raises:
        ParameterError when a needed sequence is missing, empty or too short.
        """
        states, said = self._known(drafter_states, verifier_states, tokens)
        if self.pointwise:
            return self(*(one[None, -1:] for one in states))[0, -1]
        keywords = self._as_drafting() | ({} if said is None else {"tokens": said[None]})
        return self(*(one[None] for one in states), **keywords)[0, -1]

    def _known(self, drafter: Tensor | None, verifier: Tensor | None,
               tokens: Tensor | None) -> tuple[list[Tensor], Tensor | None]:
        """What :meth:`forward` reads at the positions known so far: states, each [n, D], and the
        tokens before the predicted positions, int64 [n] (None for an adapter that fuses none)."""
        if self.shift == 0:
            states = self._need(drafter, "drafter", 1)
            if not self.fuses_tokens:
                return [states], None
            said = self._need(tokens, "token", len(states) - 1)[:len(states) - 1]
            return [states], F.pad(said, (1, 0), value=-1)
        known, said = self._need(verifier, "verifier", 1), None
        if self.fuses_tokens:
            said = self._need(self.tokens_said(known) if tokens is None else tokens, "token",
                              len(known))[:len(known)]
        if self.reads != "both":
            return [known], said
        lead = self.drafter_lead
        least = lead + (1 if self.verified_only else len(known))
        return [self._need(drafter, "drafter", least)[lead:][:len(known)], known], said

    def _need(self, states: Tensor | None, whose: str, at_least: int) -> Tensor:
        have = 0 if states is None else len(states)
        if states is None or have < at_least:
            raise ParameterError(f"{self.level} needs at least {at_least} {whose} states or tokens "
                                 f"for this step and got {have}; extend the {whose} first")
        return states

    def set_token_embedding(self, table: Tensor) -> None:
        """Fill the frozen embedding from ``table`` [V, D_v] (the LM head's rows), scaled to unit
        mean square so that it meets the LayerNormed state."""
        want = tuple(self.token_embedding.shape) if self.fuses_tokens else None
        if tuple(table.shape) != want:
            raise ParameterError(f"a token table of shape {tuple(table.shape)} does not fit this "
                                 f"{self.level} (expects {want}); create it with vocab_size")
        table = table.detach().float()
        self.token_embedding.copy_(table / table.pow(2).mean().sqrt().clamp_min(1e-12))

    def tokens_said(self, states: Tensor) -> Tensor:
        """Token after each verifier state, for adapters that fuse tokens: [..., D_v] → int64
        [...]."""
        raise ParameterError(f"{self.level} holds no token table; create it with vocab_size and "
                             "fill it from the LM head")

    def unroll(self, drafter: Tensor | None, verifier: Tensor, steps: int,
               tokens: Tensor | None = None) -> list[Tensor]:
        """Draft ``steps`` states from every position, each step feeding on the last one's
        prediction.

        Row s of result k (k = 1…steps) predicts verifier[s + k] from the true verifier[0…s], the
        own predictions of s+1…s+k-1, and where the drafter is read too, its states up to s + k - 1
        + drafter_lead (true as long as every draft before was accepted); it means something only
        where s + k is a real position. This is the plain way, one sequence for each start; eagle.py
        has a faster one.

        Args: drafter: [B, S, D_d], None where not read. verifier: [B, S, D_v]. tokens: int64
        [B, S] the verifier's, for adapters that fuse them. Returns: ``steps`` tensors
        [B, S, D_v]. Raises: ParameterError for shift 0.
        """
        self._refuse_unroll(drafter)
        size = verifier.shape[1]
        places = torch.arange(size + steps, device=verifier.device)
        if self.pointwise:
            state, results = verifier, []
            for k in range(steps):
                ahead = (places[:size] + k + self.drafter_lead).clamp_max(size - 1)
                states = [drafter[:, ahead], state] if self.reads == "both" else [state]
                results.append(state := self(*states))
            return results
        rows, found = places[:size], []
        for answer in range(len(verifier)):  # one at a time: a line for each start is much already
            lines = F.pad(verifier[answer], (0, 0, 0, steps)).expand(size, -1, -1)
            states, keywords = [], self._as_drafting()
            for k in range(steps):
                inputs, here = [lines[:, :size + k]], places[:size + k]
                if self.reads == "both":
                    ahead = (here + self.drafter_lead).clamp_max(size - 1)
                    inputs.insert(0, drafter[answer, ahead].expand(size, -1, -1))
                if self.fuses_tokens:
                    said = tokens[answer, here.clamp_max(size - 1)]
                    keywords["tokens"] = said.expand(size, -1)
                states.append(self(*inputs, **keywords)[rows, rows + k])
                lines = lines.index_put((rows, rows + k + 1), states[-1])
            found.append(torch.stack(states))
        return list(torch.stack(found, dim=1))

    def rolled(self, batch: Batch, steps: int) -> list[Tensor]:
        """:meth:`unroll` over a batch; a block drafter gives no more than its block."""
        tokens = batch.ids_by_verifier if self.fuses_tokens else None
        return self.unroll(batch.drafter, batch.verifier, steps, tokens)

    def _refuse_unroll(self, drafter: Tensor | None) -> None:
        if self.shift != 1:
            raise ParameterError(f"{self.level} reads no verifier state, so there is nothing to "
                                 "unroll; its draft is forward() over the drafter's states")
        if self.reads == "both" and drafter is None:
            raise ParameterError(f"{self.level} reads both models' states; pass the drafter's too")


def causal_mask(size: int, device: torch.device | None = None) -> Tensor:
    """bool [S, S], True where query i may look at key j: j <= i."""
    return torch.ones(size, size, dtype=torch.bool, device=device).tril()
