"""One held-out set: its stored pairs, the head they are judged with, and what intervals draw. Token
ids are read without the states, and states a batch at a time."""

import dataclasses
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from itertools import zip_longest
from typing import Any

import numpy as np
import pandas as pd
from torch import Tensor

from xsd.adapters import heads
from xsd.core import Batch, Sample
from xsd.shards.store import ShardDataset


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """name: short name of the data set. head: the verifier's LM head, float32 [V, D]. keys:
    core.Sample.key of each sample.
    What is known of the pair, where it is: texts, of every token id; prompt_ids, by question in the
    verifier's tokenizer; eos. load: gives the sample at an index with its pictures."""

    name: str
    dataset: ShardDataset
    head: Tensor
    keys: list[str]
    texts: Sequence[str] | None = None
    prompt_ids: Mapping[str, list[int]] | None = None
    eos: Sequence[int] = ()
    load: Callable[[int], Sample] | None = None

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def has_ids(self) -> bool:
        """False where the source kept no token ids (imported chunks)."""
        return getattr(self.dataset, "has_token_ids", True)

    @cached_property
    def answers(self) -> list[list[int]]:
        """The verifier's token ids of every sample, read without a state; where none were kept,
        what the head makes of the states, which is what a greedy answer is."""
        if self.has_ids:
            return [ids.tolist() for ids in self.dataset.ids("verifier")]
        return [ids[real].tolist() for batch in self.batches(64)
                for ids, real in zip(batch.ids_by_verifier, batch.mask, strict=True)]

    @cached_property
    def ids_by_drafter(self) -> list[list[int]]:
        """The drafter's token ids of every sample; no state is read."""
        return [ids.tolist() for ids in self.dataset.ids("drafter")]

    @property
    def samples(self) -> pd.DataFrame:
        """One row per sample: sequence, clip, question, … (the shards' own table)."""
        return self.dataset.table()

    @property
    def prompts(self) -> list[list[int]] | None:
        """The prompt of every sample, token ids; None where the prompts are not known."""
        if self.prompt_ids is None:
            return None
        return [self.prompt_ids[question] for question in self.samples["question"]]

    def batches(self, batch_size: int,
                contexts: Mapping[str, Sequence[int]] | None = None) -> Iterator[Batch]:
        """The pairs in their order, with the ids of :attr:`answers`. contexts: layers by role that
        block drafters read besides (Adapter.context_layers)."""
        for batch in self.dataset.batches(batch_size):
            if contexts:
                batch = self.dataset.with_context(batch, contexts)
            if not self.has_ids:
                ids = heads.top_tokens(self.head, batch.verifier)
                batch = dataclasses.replace(batch, ids_by_verifier=ids.where(batch.mask, 0))
            yield batch

    @cached_property
    def clusters(self) -> list[str]:
        """What intervals draw: the sequence of every sample."""
        return list(self.samples["sequence"])

    @cached_property
    def scenes(self) -> list[str]:
        """The sequence of every sample, or its clip where there is but one sequence: what another
        picture is taken from. Clips of a sequence overlap, so no interval draws them."""
        clips = [f"{one}/{clip}" for one, clip in zip(self.clusters, self.samples["clip"],
                                                      strict=True)]
        return clips if len(set(self.clusters)) == 1 else self.clusters

    def reference(self, index: int, max_new_tokens: int) -> tuple[int, ...] | None:
        """The verifier's answer cut at ``max_new_tokens``; None where it ends before that without
        an end-of-sequence token, so that nobody knows how it goes on."""
        ids = self.answers[index]
        whole = bool(ids) and (len(ids) >= max_new_tokens or ids[-1] in self.eos)
        return tuple(ids[:max_new_tokens]) if whole else None

    def choose(self, n: int, seed: int) -> list[int]:
        """The indices of ``n`` samples from as many scenes as possible, drawn by ``seed``;
        ascending."""
        draw, groups = random.Random(seed), {}
        for index, scene in enumerate(self.scenes):
            groups.setdefault(scene, []).append(index)
        turns = list(groups.values())
        for members in [*turns, turns]:
            draw.shuffle(members)
        order = [one for turn in zip_longest(*turns) for one in turn if one is not None]
        return sorted(order[:n])


def of(name: str, dataset: ShardDataset, head: Tensor | None = None, **known: Any) -> HeldOut:
    """A held-out set of stored pairs. head: by default the one stored with them. known: texts,
    prompt_ids, eos, load."""
    table = dataset.table()
    names, nothing = table[["sequence", "clip", "question"]], np.zeros(0)
    keys = [Sample(*one, (), nothing).key for one in names.itertuples(index=False)]
    head = dataset.head("verifier") if head is None else head
    return HeldOut(name, dataset, head, keys, **known)
