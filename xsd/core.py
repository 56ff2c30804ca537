"""The words every room shares: records, the decoder-handle protocol, the error tree; only the
standard library is imported. Letters in shapes: B batch, S positions of the answer, D hidden width
(D_d drafter, D_v verifier), V vocabulary, F event frames, H and W pixels. ``gamma``: draft tokens
per round; ``tau``: a cosine threshold."""

from __future__ import annotations

import contextlib
import hashlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
"""The checkout: notebooks, data and reports are resolved from here."""
PAIRS = ("embedded", "smollm2")
"""Pairs that ship, by name; any other is a folder."""
Mode = Literal["free_running", "teacher_forced"]
"""Whose tokens stood before each state: each model's own, or the verifier's for both."""
Tap = Literal["post_norm", "pre_norm"]
"""On which side of the decoder's final norm; only ``lm_head`` of post_norm is the logits."""


def as_used(device: str = "auto", dtype: str = "auto") -> tuple[str, str]:
    """What "auto" stands for on this machine: CUDA where torch sees a GPU, else the CPU; bfloat16
    on a GPU, float32 on a CPU. Anything else stays as it is."""
    if device == "auto":
        import torch  # seconds that only who computes should wait for

        device = "cuda" if torch.cuda.is_available() else "cpu"
    return device, ("float32" if device == "cpu" else "bfloat16") if dtype == "auto" else dtype


class XsdError(Exception):
    """Anything the user can mend. Its one sentence names the thing, what was expected and the way
    out; the command line prints it without a traceback."""


class EventError(XsdError):
    """An event stream is empty, unsorted, out of range or unreadable."""

class VideoError(XsdError):
    """A video or image has no frame or does not decode."""

class DatasetError(XsdError):
    """A dataset folder lacks a file or an entry is malformed; also a question of zero length."""

class CheckpointError(XsdError):
    """Model or adapter weights are missing, truncated, of the wrong type or shape."""

class PairError(XsdError):
    """Two models that cannot work together (tokenizers, vocabulary, heads)."""

class ShardError(XsdError):
    """Stored hidden states are missing, damaged or of another mode, tap or configuration."""

class MetricError(XsdError):
    """Metric input that has no meaning: other lengths, NaN, nothing unmasked."""

class ParameterError(XsdError):
    """An unknown or ill-typed notebook or command parameter."""

class StorageError(XsdError):
    """A file could not be written: disk full, no permission, another writer."""

class LosslessError(XsdError):
    """Output that claimed to be the verifier's own is not."""

class TrainingError(XsdError):
    """Training stopped: NaN, divergence, a refused split, out of memory."""


@contextlib.contextmanager
def reading(what: str, error: type[XsdError], way_out: str) -> Iterator[None]:
    """Reading what somebody may have harmed can fail in any way: where it does in this block, that
    is ``error``: "<what> (<reason>); <way_out>". Errors of ours pass as they are."""
    try:
        yield
    except XsdError:
        raise
    except Exception as problem:
        reason = (str(problem).strip().splitlines() or [type(problem).__name__])[0][:200]
        reason = f"no {reason}" if isinstance(problem, KeyError) else reason
        reason = "nested too deep" if isinstance(problem, RecursionError) else reason
        raise error(f"{what} ({reason}); {way_out}") from problem


def at_least_one(error: type[XsdError], **counts: int | None) -> None:
    """Raises: ``error`` naming the first count that is below 1."""
    for name, value in counts.items():
        if value is not None and value < 1:
            raise error(f"{name}={value}; expected at least 1")


_UNSEEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    """Text with control signs, marks of writing direction and surrogates as ``\\u001b``."""
    return _UNSEEN.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def not_finite(who: str) -> CheckpointError:
    """What to raise where a model's logits are no numbers."""
    return CheckpointError(f"the {who} gives NaN or infinity in place of logits; load it with "
                           "--dtype float32 or bfloat16")


@dataclass(frozen=True)
class Sample:
    """One clip with one question, as both sensors saw it. event_frames: F images uint8 [H, W, 3];
    sizes differ on the official slice canvas. video: uint8 [8, H, W, 3], what the verifier sees.
    t_us: start and end of the clip on the sensor clock, in µs. source: ``simulated`` |
    ``recorded`` | a folder's name."""

    sequence: str
    clip: str
    question: str
    event_frames: Sequence[np.ndarray]
    video: np.ndarray
    t_us: tuple[int, int] | None = None
    split: str | None = None
    source: str | None = None

    @property
    def key(self) -> str:
        """Stable name of the sample inside its dataset: sequence/clip/question-hash."""
        question = hashlib.sha256(self.question.encode()).hexdigest()[:8]
        return f"{self.sequence}/{self.clip}/{question}"


@dataclass(frozen=True)
class PairedStates:
    """Hidden states [S_d, D_d] and [S_v, D_v] of both decoders at the positions of one answer, and
    ids int64 [S_d] and [S_v].
    ``hidden[t]`` *predicts* token t (read one position before it): argmax(lm_head(hidden[t])) ==
    ids[t] for a model's own greedy tokens. In teacher_forced mode S_d == S_v, position t of both
    follows the verifier's tokens 0…t-1, and ids_by_drafter[t] is what the drafter's own head would
    have said there."""

    sequence: str
    clip: str
    question: str
    hidden_by_drafter: Tensor
    hidden_by_verifier: Tensor
    ids_by_drafter: Tensor
    ids_by_verifier: Tensor
    mode: Mode
    tap: Tap = "post_norm"
    text_by_drafter: str = ""
    text_by_verifier: str = ""
    split: str = ""
    extra: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Context:
    """What a block drafter reads of one model (docs/adapters.md, section 10): its states in some
    layers at every position of prompt and answer. states: [B, C, L · D], padded on the right.
    start: int64 [B], the positions of the prompt; token t of the answer is read at start + t."""

    states: Tensor
    start: Tensor

_TENSORS = ("drafter", "verifier", "ids_by_drafter", "ids_by_verifier", "mask")


@dataclass(frozen=True)
class Batch:
    """Padded on the right. drafter [B, S, D_d], verifier [B, S, D_v], ids_by_* int64 [B, S], mask
    [B, S] True on real positions. sequence: B names, the cluster of every statistic. index: B
    positions in the dataset. context: by role, for adapters that read it, else empty."""

    drafter: Tensor
    verifier: Tensor
    ids_by_drafter: Tensor
    ids_by_verifier: Tensor
    mask: Tensor
    sequence: Sequence[str]
    index: Sequence[int]
    mode: Mode
    context: Mapping[str, Context] = field(default_factory=dict)

    def to(self, device: Any) -> Batch:
        """The same batch, its tensors on ``device``."""
        if self.mask.device == device:
            return self
        return self._changed(lambda one: one.to(device, non_blocking=True), _TENSORS)

    def rows(self, cut: slice) -> Batch:
        """Some of its answers."""
        return self._changed(lambda one: one[cut], (*_TENSORS, "sequence", "index"))

    def _changed(self, change: Callable[[Any], Any], names: Sequence[str]) -> Batch:
        context = {role: Context(change(one.states), change(one.start))
                   for role, one in self.context.items()}
        return replace(self, context=context, **{one: change(getattr(self, one)) for one in names})


def depths(parents: Sequence[int]) -> list[int]:
    """How many rows of a tree lie on the way to each, itself counted. parents: the row before each,
    an earlier one, or -1."""
    found: list[int] = []
    for parent in parents:
        found.append(1 if parent < 0 else found[parent] + 1)
    return found


@dataclass(frozen=True)
class Round:
    """One draft-verify round. n_accepted: how many drafted tokens the verifier agreed with; bonus:
    its own next token, None when the request ended before it. Times: seconds since the request
    began. parents: of a draft tree (decode/trees.py), None of a chain; the accepted tokens come
    first in both."""

    drafted: tuple[int, ...]
    n_accepted: int
    bonus: int | None
    draft_start_s: float
    draft_end_s: float
    verify_start_s: float
    verify_end_s: float
    phase: Literal["prefill_hiding", "decode"] = "decode"
    parents: tuple[int, ...] | None = None

    @property
    def depth(self) -> int:
        """The most tokens that this round could have accepted."""
        return max(depths(self.parents or ()), default=len(self.drafted))


@dataclass(frozen=True)
class Span:
    """One bar of the timeline: what ran in which lane, seconds since the request began."""

    lane: Literal["drafter", "adapter", "verifier"]
    what: str
    start_s: float
    end_s: float


@dataclass(frozen=True)
class Generation:
    """What one request produced. ids: without the prompt, cut after the first EOS (EOS kept) or at
    the maximum length."""

    ids: tuple[int, ...]
    finish: Literal["eos", "length"]
    rounds: tuple[Round, ...] = ()
    spans: tuple[Span, ...] = ()
    first_token_s: float = 0.0
    total_s: float = 0.0


class State(Protocol):
    """A decoder's KV cache of ``length`` positions; hidden [D], logits [V]: of the last one."""

    length: int
    hidden: Tensor
    logits: Tensor


@runtime_checkable
class DecoderHandle(Protocol):
    """What the decoding engine needs of a model, and nothing more (no tokenizer, no file, no plot).
    ``[prompt | a b c] -> rollback(state, len(prompt) + 2) -> [prompt | a b] -> extend(state, [x])
    -> [prompt | a b x]``"""

    hidden_size: int
    vocab_size: int
    eos_token_ids: frozenset[int]

    def prefill(self, sample: Any) -> State:
        """Run the prompt; ``state.hidden``/``state.logits`` predict the first answer token."""

    def extend(self, state: State, ids: Tensor,
               parents: Sequence[int] | None = None) -> tuple[Tensor, Tensor]:
        """Append ids int64 [n] to the cache (in place). Returns hidden [n, D] and logits [n, V];
        row i predicts the token after ids[i]. parents: of a tree, the row before each (-1: what is
        cached); a row sees what is cached and the rows on its way, at their depth's position."""

    def rollback(self, state: State, length: int, path: Sequence[int] = ()) -> None:
        """Forget every cached position >= length (in place), but for those of ``path`` (ascending),
        which move together from there on; state.hidden/logits are stale until the next extend."""

    def lm_head(self, hidden: Tensor) -> Tensor:
        """[..., D] post-norm states to [..., V] logits."""
