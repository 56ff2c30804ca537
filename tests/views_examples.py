"""Made-up but shapely inputs for the tests of views and runs: a token table, a live run with its
baseline, and one sample's pictures."""

import numpy as np
import pandas as pd

from xsd.core import Generation, Round, Sample, Span

WORDS = [
    *("▁" + word for word in ("the", "car", "is", "red", "and", "moves", "left", "past", "a",
                              "cyclist", "near", "two", "trees", "at", "night"))
]
WORDS += ["<b>", "\n", "."]
LEVELS = {"L1": 0.62, "L4": 0.68, "L5F": 0.85, "B1": 0.9, "drafter_tokens": 0.35}


def token_table(seed=0, levels=tuple(LEVELS), n_sequences=6, samples_per_sequence=4, run="demo"):
    """One row a token, with harder late positions and cosines that go with the matches."""
    draw, rows = np.random.default_rng(seed), []
    for level in levels:
        for sequence in range(n_sequences):
            for index in range(samples_per_sequence):
                for position in range(int(draw.integers(6, 14))):
                    match = bool(draw.random() < LEVELS[level] - 0.02 * position)
                    cosine = float(np.clip(draw.normal(0.93 if match else 0.8, 0.05), -1, 1))
                    said = WORDS[int(draw.integers(len(WORDS)))]
                    rows.append({
                        "run": run, "level": level, "sample": f"s{sequence}/{index}",
                        "sequence": f"s{sequence}", "clip": str(index),
                        "question": "What is moving?", "position": position, "cosine": cosine,
                        "match": match,
                        "draft_token": said if match else WORDS[int(draw.integers(len(WORDS)))],
                        "verifier_token": said, "draft_probability": float(draw.random()),
                    })
    return pd.DataFrame(rows)


def live_runs():
    """A baseline of 12 tokens and a speculative run of the same ids: a hidden first draft, then two
    rounds."""
    ids = tuple(range(12))
    baseline = Generation(
        ids=ids, finish="length", total_s=0.3 + 12 * 0.04, first_token_s=0.3,
        spans=(Span("verifier", "prefill", 0.0,
                    0.3), *(Span("verifier", "decode", 0.3 + i * 0.04, 0.34 + i * 0.04)
                            for i in range(12))),
    )
    rounds = (Round((0, 1, 2, 3, 9), 4, 4, 0.1, 0.28, 0.3, 0.36,
                    "prefill_hiding"), Round((5, 6, 7, 8, 1), 4, 9, 0.36, 0.42, 0.42,
                                             0.48), Round((10, 11), 2, None, 0.48, 0.51, 0.51,
                                                          0.55),
              )
    spans = [Span("verifier", "prefill", 0.0, 0.3), Span("drafter", "prefill", 0.0, 0.1)]
    for one in rounds:
        spans += [
            Span("drafter", "draft", one.draft_start_s, one.draft_end_s - 0.01),
            Span("adapter", "translate", one.draft_end_s - 0.01, one.draft_end_s),
            Span("verifier", "verify", one.verify_start_s, one.verify_end_s),
        ]
    return {
        "speculative": Generation(ids, "length", rounds, tuple(spans), 0.36, 0.55),
        "baseline": baseline
    }


def sample():
    """One clip: 5 event frames with a moving edge and 8 video frames."""
    draw = np.random.default_rng(1)
    events, video = [], []
    for step in range(8):
        frame = np.full((48, 64, 3), 120, np.uint8)
        frame[20:32, 6 * step:6 * step + 14] = (200, 40, 40)
        video.append(frame)
        edge = np.full((48, 64, 3), 255, np.uint8)
        edge[20:32, 6 * step] = (0, 0, 255)
        edge[20:32, min(6 * step + 14, 63)] = (255, 0, 0)
        edge[draw.random((48, 64)) < 0.01] = (0, 0, 255)
        events.append(edge)
    return Sample("s0", "0", "What is moving?", events[:5], np.stack(video), source="simulated")


def history():
    """Two levels of falling losses, the second overfitting after epoch 12."""
    rows = []
    for level, floor in (("L1", 0.9), ("L4", 0.8)):
        for epoch in range(1, 21):
            train = floor + 0.5 / epoch
            held = train + 0.05 + (0.01 * max(0, epoch - 12) if level == "L4" else 0)
            for split, loss in (("train", train), ("validation", held)):
                rows.append({"level": level, "epoch": epoch, "split": split, "loss": loss})
    return pd.DataFrame(rows)


def speedups():
    """One measured, one predicted, one quoted bar."""
    return pd.DataFrame({
        "name": [
            "L4, prefill hiding", "L5F, γ = 5", "model of L5F at γ = 8", "reference, 30 tokens"
        ], "value": [1.07, 1.42, 1.6, 1.03], "low": [1.02, 1.3,
                                                     float("nan"),
                                                     float("nan")],
        "high": [1.12, 1.55, float("nan"),
                 float("nan")], "kind": ["measured", "measured", "predicted", "quoted"],
    })


def lengths_table():
    """Accepted lengths of levels and floors for the dot picture."""
    return pd.DataFrame({
        "name": [
            "L1", "L4", "L5F", "B1 (reads the verifier)", "drafter tokens", "position mode",
            "4-gram", "prompt lookup"
        ],
        "kind": ["adapter", "adapter", "adapter", "ceiling", "drafter", "floor", "floor",
                 "floor"], "value": [1.8, 2.2, 4.1, 5.0, 0.6, 1.1, 1.5,
                                     0.3], "low": [1.6, 1.9, 3.7, 4.6, 0.5, 0.9, 1.3, 0.2],
        "high": [2.0, 2.5, 4.5, 5.4, 0.8, 1.3, 1.8, 0.4], "n": [24] * 8,
    })
