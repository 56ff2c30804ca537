"""Spec-Bench's contract (Xia et al. 2024, hemingkx/Spec-Bench): ``forward_func`` for text models,
any causal language model of transformers with a ``model.model`` decoder as the verifier."""

import functools
from typing import Any

import torch
from torch import Tensor

from xsd.decode import proposers, rules, speculative
from xsd.models.handle import ModelHandle


class TextHandle(ModelHandle):
    """A decoder without pictures; its sample is the prompt's ids, int64 [n]."""

    def __init__(self, model: Any, tokenizer: Any, *, steps: str = "auto") -> None:
        super().__init__(model, tokenizer, "verifier", None, steps=steps,
                         draft_vocab_size=model.get_input_embeddings().weight.shape[0])

    def prompt_embeddings(self, sample: Tensor, *, reuse_vision: bool = True) -> Tensor:
        self.check_length(len(sample))
        return self._lookup(sample)


_handle = functools.lru_cache(maxsize=1)(TextHandle)
"""One model at a time: its steps are arranged once."""


def forward_func(inputs: Any, model: Any, tokenizer: Any, max_new_tokens: int, *,
                 proposer: proposers.Proposer | None = None, gamma: int = 5,
                 **_: Any) -> tuple[Tensor, int, int, list[int]]:
    """What Spec-Bench's ``run_eval`` calls for each turn: greedy, the model's own ids. inputs:
    ``input_ids`` int64 [1, n]. proposer: who drafts (default: prompt lookup). Returns: prompt and
    answer int64 [1, n + new], new tokens, passes of the model, tokens of each pass. Raises: as
    speculative.generate."""
    handle, prompt = _handle(model, tokenizer), inputs["input_ids"][0]
    if proposer is None:
        proposer = proposers.RuleProposer(lambda ids: rules.prompt_lookup(ids.tolist()),
                                          handle.eos_token_ids)
    found = speculative.generate(handle, proposer, prompt, gamma=gamma,
                                 max_new_tokens=max_new_tokens)
    whole = torch.cat([prompt, prompt.new_tensor(found.ids)])[None]
    lengths = [one.n_accepted + (one.bonus is not None) for one in found.rounds]
    return whole, len(found.ids), len(lengths), lengths
