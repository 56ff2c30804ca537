"""transformers' own ``generate`` with one of our proposers, in a script that keeps its processors,
stopping criteria and outputs (docs/decoding.md, "In a script of your own")."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.generation.candidate_generator import CandidateGenerator

from xsd.core import ParameterError
from xsd.decode.proposers import Proposer
from xsd.decode.trees import Tree


def drafted_by(proposer: Proposer, sample: Any = None, *, gamma: int = 5) -> Callable[..., Any]:
    """For ``model.generate(..., custom_generate=drafted_by(proposer, sample))``: assisted decoding
    in which ``proposer`` drafts at most ``gamma`` tokens a round. sample: what its ``begin`` is
    given. The ids are those of a plain ``generate``, of which the settings stay in force; nothing
    is drafted behind the prefill. Raises: ParameterError for gamma below 1, or a draft tree, which
    transformers cannot verify."""
    if gamma < 1:
        raise ParameterError(f"gamma is {gamma}; draft at least 1 token")

    def decode(model: Any, input_ids: Tensor, *, generation_config: Any, **kwargs: Any) -> Any:
        candidates = ProposerCandidates(proposer, sample, gamma, generation_config.max_length)
        model._get_candidate_generator = lambda **_: candidates  # transformers has no argument
        try:
            return type(model)._assisted_decoding(model, input_ids,
                                                  generation_config=generation_config, **kwargs)
        finally:
            del model._get_candidate_generator

    return decode


class ProposerCandidates(CandidateGenerator):
    """What transformers asks in each round: the verified ids and the proposer's drafts."""

    requires_model_outputs = True

    def __init__(self, proposer: Proposer, sample: Any, gamma: int, max_length: int) -> None:
        self.proposer, self.sample, self.gamma = proposer, sample, gamma
        self.max_length, self.context_layers = max_length, getattr(proposer, "context_layers", ())
        self.model_kwargs_overrides = {"output_hidden_states": True}

    @torch.inference_mode()
    def get_candidates(self, input_ids: Tensor, *, model_outputs: Any = None,
                       is_first_iteration: bool, n_last_matches: int = 0,
                       **_: Any) -> tuple[Tensor, None]:
        """input_ids: int64 [1, n], all verified. model_outputs: of the round before, with the
        states of its rows, of which those of rejected drafts come last."""
        if is_first_iteration:  # nothing is known of the verifier yet: its prefill comes first
            self.proposer.begin(self.sample)
            self._kept = None
            return input_ids, None
        n_tokens = int(n_last_matches) + 1
        states, prefill = model_outputs.hidden_states, self._kept is None
        n_rows = states[-1].shape[1] if prefill else n_tokens  # a prefill's rows are all verified
        if self.context_layers:
            layers = torch.cat([states[one][0, :n_rows] for one in self.context_layers], dim=-1)
            self._kept = layers if prefill else torch.cat([self._kept, layers])
            self.proposer.read_context(self, len(self._kept))
        else:
            self._kept = ()
        self.proposer.observe(input_ids[0, -n_tokens:].tolist(),
                              states[-1][0, n_rows - n_tokens:n_rows])
        room = min(self.gamma, self.max_length - input_ids.shape[1] - 1)
        drafts = self.proposer.propose(room) if room > 0 else []
        if isinstance(drafts, Tree):
            raise ParameterError("transformers verifies chains, not draft trees; decode with "
                                 "xsd.decode.speculative, or draft with a proposer of chains")
        return torch.cat([input_ids, input_ids.new_tensor([drafts])], dim=1), None

    def rows(self, start: int, end: int) -> Tensor:
        """Of the recorded layers, [end - start, L · D]: what a block drafter reads."""
        return self._kept[start:end]
