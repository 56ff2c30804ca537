"""A decoder in a few lines: its next token is a function of the whole prefix, its state is that
prefix, its LM head the identity."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from xsd.core import depths
from xsd.decode import proposers

WIDTH = 16  # ids 0..15; hidden width and vocabulary alike
EOS = 0
PROMPT = 3
NOISE = 2e-4
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
        state.hidden = state.logits = self.row([])
        return state

    def row(self, text):
        """Hidden state and logits after this text."""
        return _ROWS[self.next(text)]

    def extend(self, state, ids, parents=None):
        base, texts = list(state.ids), []
        for row, token in enumerate(ids.tolist()):
            before = row - 1 if parents is None else parents[row]
            texts.append([*(texts[before] if before >= 0 else base), token])
            state.ids.append(token)
        self.rows_fed.append(len(texts))
        rows = torch.stack([self.row(text) for text in texts])
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


class RoundingDecoder(ToyDecoder):
    """Logits 5 for its token; passes over many rows are off by ``defect``, so that the runner-up,
    which stands ``margin`` below at position ``tie_at``, wins there where that is less."""

    def __init__(self, tie_at=None, margin=1e-4, defect=NOISE):
        super().__init__()
        self.tie_at, self.margin, self.defect = tie_at, margin, defect

    def plain(self):
        return self  # its rounding is honest

    def extend(self, state, ids, parents=None):
        start = len(state.ids)
        hidden, _ = super().extend(state, ids, parents)
        logits = 5 * hidden
        deep = depths(range(-1, len(ids) - 1) if parents is None else parents)
        for i in range(len(ids)):
            token = int(hidden[i].argmax())
            if start + deep[i] == self.tie_at:
                logits[i, (token + 1) % WIDTH] = 5 - self.margin
            if len(ids) > 1:
                logits[i, token] -= self.defect
        state.hidden = state.logits = logits[-1]
        return logits, logits


class SoftDecoder(ToyDecoder):
    """Logits over five ids that are drawn once for every text; another ``salt``, another model."""

    hidden_size = vocab_size = draft_vocab_size = 5

    def __init__(self, salt=0):
        super().__init__()
        self.salt, self._known = salt, {}

    def row(self, text):
        text = tuple(text)
        if text not in self._known:
            seed = torch.Generator().manual_seed(hash((self.salt, *text)) % 2**31)
            self._known[text] = 1.5 * torch.randn(5, generator=seed)
        return self._known[text]


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
