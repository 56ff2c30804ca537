"""Small paired states for the shards' tests: sample i of a dataset of three sequences, the same at
every call."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from xsd.core import PairedStates


def example(i: int, **changes: Any) -> PairedStates:
    """3–6 positions, D_d = 6, D_v = 8; free-running pairs (``mode``) have a shorter verifier
    answer."""
    generator = torch.Generator().manual_seed(i)
    n_drafter = 3 + i % 4
    n_verifier = n_drafter if changes.get("mode", "teacher_forced") == "teacher_forced" else 3
    values: dict[str, Any] = {
        "sequence": f"seq{i % 3}", "clip": f"{i // 3:03d}", "question": f"Question {i}?",
        "hidden_by_drafter": torch.randn(n_drafter, 6, generator=generator),
        "hidden_by_verifier": torch.randn(n_verifier, 8, generator=generator),
        "ids_by_drafter": torch.randint(0, 100, (n_drafter,), generator=generator),
        "ids_by_verifier": torch.randint(0, 100, (n_verifier,),
                                         generator=generator), "mode": "teacher_forced",
        "text_by_drafter": f"drafter {i}", "text_by_verifier": f"vérifieur {i}", "split": "test",
        "extra": {"source": "example", "number": i},
    }
    return PairedStates(**{**values, **changes})


def folder_bytes(folder: Path) -> dict[str, bytes]:
    """Every file of a run except its manifest (which carries provenance) and its times."""
    return {
        path.name: path.read_bytes() for path in folder.iterdir()
        if path.name not in ("manifest.json", "times.jsonl")
    }
