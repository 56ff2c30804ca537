"""What a reduced draft vocabulary costs (docs/adapters.md, section 4): a token outside it is never
drafted, so it ends a round."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor

from xsd.adapters.base import Adapter
from xsd.core import Batch, ParameterError
from xsd.evaluate import table


def cost(adapter: Adapter, batches: Sequence[Batch], head: Tensor, ids: Tensor, *,
         gamma: int = 5) -> dict[str, float]:
    """Let an adapter draft with the whole head [V, D] and with its rows ``ids`` int64 [k]; the
    adapter itself stays as it is.

    Returns size: k; coverage: share of the answers' tokens that can be drafted at all; full and
    reduced: accepted drafts per round with all tokens and with these; kept: their ratio (NaN where
    all tokens accept none); head_share: k / V, of the head's rows that a draft step reads.
    Raises: ParameterError when the adapter has a draft vocabulary already (there is no whole one to
    compare with), or ids are not the head's.
    """
    if adapter.draft_ids is not None:
        raise ParameterError(f"this {adapter.level} drafts {len(adapter.draft_ids)} tokens only; "
                             "give one of the whole vocabulary")
    if not 0 <= int(ids.min()) <= int(ids.max()) < len(head):
        raise ParameterError(f"a draft vocabulary is ids below {len(head)}")
    fewer = copy.deepcopy(adapter)
    fewer.set_draft_vocabulary(ids)
    tokens = table.of_batches({"full": adapter, "reduced": fewer}, batches, head, gamma=gamma)
    sums = table.counts(tokens, gamma).groupby("level", observed=True)[["accepted", "rounds"]].sum()
    full, reduced = (sums["accepted"] / sums["rounds"])[["full", "reduced"]].tolist()
    answers = torch.cat([batch.ids_by_verifier[batch.mask] for batch in batches])
    return {
        "size": len(ids), "coverage": float(torch.isin(answers, ids).float().mean()),
        "full": full, "reduced": reduced, "kept": reduced / full if full else float("nan"),
        "head_share": len(ids) / len(head),
    }
