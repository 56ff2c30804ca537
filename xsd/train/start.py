"""Where a training starts: the head of its token terms, and the new adapter with its closed-form
maps (docs/adapters.md, section 5)."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from xsd import files
from xsd.adapters import checks, heads, linear, registry
from xsd.adapters.base import Adapter
from xsd.adapters.heads import Head
from xsd.core import ParameterError, TrainingError
from xsd.train import objectives, source
from xsd.train.recipes import FitConfig

FUSING = ("L5", "B1", "L5F")
"""Levels that can read the token before."""


def choose_heads(level: str, config: FitConfig, objective: objectives.Objective,
                 states: source.States, indices: Tensor, head: Head | None,
                 device: torch.device) -> tuple[Head | None, Tensor | None]:
    """(what token terms go through, the whole weight [V, D] where one was given), on ``device``.

    indices: of the training answers, whose frequent tokens make a draft vocabulary. Raises:
    TrainingError when something needs token ids or the head's rows and they are not there.
    """
    by_tokens = objective.needs_head or config.select_by == "token_acceptance"
    by_rows = "fused tokens" if config.token_fusion or "vocab_size" in config.adapter_options else (
        "a draft vocabulary" if config.draft_vocabulary else None)
    if not states.has_token_ids:
        if by_tokens or by_rows:
            raise TrainingError(
                f"objective {config.objective!r} needs token ids and this dataset has none; use "
                "profile 'reference' or extract again")
        return None, None
    if not isinstance(head, Tensor):
        if by_rows:
            raise TrainingError(
                f"{level} with {by_rows} needs the rows of the LM head; pass head= as a weight "
                "[V, D]")
        return head, None
    whole = head.detach().float().to(device)
    if config.draft_vocabulary is None:
        return whole, whole
    answers = (batch.ids_by_verifier[batch.mask] for batch in states.batches(indices, 256))
    ids = heads.most_frequent(answers, config.draft_vocabulary)
    return heads.draft_head(whole, ids.to(device)), whole


def new_adapter(spec: Any, config: FitConfig, states: source.States, indices: Tensor,
                head: Head | None, full_head: Tensor | None) -> Adapter:
    """An adapter of a level as its recipe starts it; draws from torch's global generator. head,
    full_head: as :func:`choose_heads` gives them. A level of one's own is checked first; an
    nn.Linear of it that is called input_map (D_d → D_v) starts as the closed form, too.

    Raises: ParameterError for an option that the level does not have, and as checks.check_adapter.
    """
    level = files.name_of(spec)
    options = dict(config.adapter_options)
    if config.alpha is not None and level in ("L4", *FUSING):
        options.setdefault("alpha", config.alpha)
    if config.prediction_weight is not None and level in FUSING:
        options.setdefault("prediction_weight", config.prediction_weight)
    if config.token_fusion:
        if level not in FUSING:
            raise ParameterError(
                f"{level} fuses no tokens; token_fusion is for {', '.join(FUSING)}")
        options.setdefault("vocab_size", len(full_head))
    ridge, ours = config.warm_start == "ridge", level in registry.LEVELS
    if ridge and ours and level != "B1":
        options.setdefault("input_map", True)
    if ridge and level in ("B1", "L5F"):
        options.setdefault("residual_map", True)
    adapter = registry.create_adapter(copy.deepcopy(spec), states.hidden_size,
                               drafter_size=states.drafter_size, **options)
    if not ours:
        checks.check_adapter(adapter)
    if ridge and not isinstance(spec, torch.nn.Module):  # an object starts as it is
        inside = getattr(adapter, "module", adapter)  # one's own stands inside an OwnAdapter
        for name, reads in (("input_map", "drafter"), ("residual_map", adapter.reads)):
            module = getattr(inside, name, None)
            if isinstance(module, torch.nn.Linear):
                closed = linear.fit_linear("ridge", states.batches(indices, config.batch_size),
                                           reads=reads)
                module.load_state_dict(closed.map.state_dict())
    if ours and adapter.fuses_tokens:
        adapter.set_token_embedding(full_head.cpu())
    if isinstance(head, heads.DraftHead):
        adapter.set_draft_vocabulary(head.ids.cpu())
    return adapter
