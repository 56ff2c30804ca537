"""Token tables made by hand."""

import numpy as np
import pandas as pd
import torch


def random_states(seed, n=7, s=6, d=8, dtype=torch.float32):
    """aligned, target [N, S, D], mask [N, S] and the clusters of n answers."""
    g = torch.Generator().manual_seed(seed)
    target = torch.randn(n, s, d, generator=g)
    noise = torch.rand(n, s, 1, generator=g) * 1.5
    aligned = target + noise * torch.randn(n, s, d, generator=g)
    lengths = torch.randint(1, s + 1, (n,), generator=g)
    mask = torch.arange(s) < lengths[:, None]
    clusters = [f"seq{int(i)}" for i in torch.randint(0, 3, (n,), generator=g)]
    return aligned.to(dtype), target.to(dtype), mask, clusters


def as_table(mask, clusters, level="L1", first_sample=0, **columns):
    """A token table of arrays [N, S]: one row per real position."""
    mask = np.asarray(mask)
    row, at = mask.nonzero()
    return pd.DataFrame({
        "level": level, "sample": row + first_sample, "sequence": np.asarray(clusters)[row],
        "position": at, **{name: np.asarray(values)[mask] for name, values in columns.items()}
    })


def pick(figures, metric, threshold=None, position=None):
    """The one row of a long table of figures."""
    rows = figures[figures["metric"] == metric]
    for name, wanted in (("threshold", threshold), ("position", position)):
        if name in rows:
            rows = rows[rows[name].isna() if wanted is None else rows[name] == wanted]
    assert len(rows) == 1, (metric, threshold, position)
    return rows.iloc[0]
