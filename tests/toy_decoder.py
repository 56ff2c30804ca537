"""A decoder in a few lines: its next token is a function of the whole prefix, its state is that
prefix, its LM head the identity."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from xsd.decode import proposers

WIDTH = 16  # ids 0..15; hidden width and vocabulary alike
EOS = 0
PROMPT = 3
_ROWS = torch.eye(WIDTH)


@dataclass
class ToyState:
    ids: list[int] = field(default_factory=list)
    hidden: torch.Tensor = None
    logits: torch.Tensor = None

    @property
    def length(self):
        return PROMPT + len(self.ids)


class ToyDecoder:
    """Says ``sample`` (a tuple of ids) as long as the prefix follows it, something that depends on
    the whole prefix otherwise.

    ``slips``: positions at which this one says another token (never EOS), as a drafter that sees
    less would.
    """

    hidden_size = vocab_size = draft_vocab_size = WIDTH
    eos_token_ids = frozenset({EOS})

    def __init__(self, slips=()):
        self.slips, self.rows_fed, self.script = frozenset(slips), [], ()

    def next(self, prefix):
        n = len(prefix)
        right = self.script[n] if n < len(self.script) and tuple(
            prefix) == self.script[:n] else 1 + (7 * sum(prefix) + n) % (WIDTH - 1)
        return 1 + right % (WIDTH - 1) if n in self.slips else right

    def prefill(self, sample):
        self.script = tuple(sample)
        state = ToyState()
        state.hidden = state.logits = _ROWS[self.next(())]
        return state

    def extend(self, state, ids, parents=None):
        base, texts = list(state.ids), []
        for row, token in enumerate(ids.tolist()):
            before = row - 1 if parents is None else parents[row]
            texts.append([*(texts[before] if before >= 0 else base), token])
            state.ids.append(token)
        said = [self.next(text) for text in texts]
        self.rows_fed.append(len(said))
        rows = _ROWS[said]
        state.hidden = state.logits = rows[-1]
        return rows, rows

    def rollback(self, state, length, path=()):
        assert PROMPT <= length < state.length
        assert list(path) == sorted(set(path)) and all(length <= at < state.length for at in path)
        state.ids[length - PROMPT:] = [state.ids[at - PROMPT] for at in path]
        state.hidden = state.logits = torch.full((WIDTH,),
                                                 float("nan"))  # stale until the next extend

    def lm_head(self, hidden):
        return hidden


class CopyAdapter:
    """The identity, checking that exactly the positions that exist are offered. Reads
    "verifier"/"both" from the verifier's last state."""
    def __init__(self, reads="drafter"):
        self.reads, self.seen = reads, []

    def step(self, drafter_states, verifier_states):
        n = None if drafter_states is None else drafter_states.shape[0]
        m = None if verifier_states is None else verifier_states.shape[0]
        self.seen.append((n, m))
        if self.reads == "both":
            assert n == m + 1
        return (verifier_states if self.reads == "verifier" else drafter_states)[-1]


class OracleProposer(proposers.TokenByToken):
    """Drafts by a script, ``script(known ids, gamma) -> draft ids``: right and wrong as a test
    wants them."""
    def __init__(self, script):
        self.script = script

    def propose(self, gamma, stop=proposers.never):
        return list(self.script(tuple(self.known), gamma))[:gamma]
