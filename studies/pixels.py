"""Notebook 11: P0, the oldest idea: turn event pictures into camera pictures and compare pixels.
Before and after, beside a picture that never changes.

Each clip gives ``n_event_frames`` pairs: an event frame paints one stretch of the clip, and stands
beside the video frame nearest to the stretch's middle::

    event frames      0      |      1      |      2      |      3      |      4
    video frames    0    1      2      3      4      5      6      7
                                           └ nearest to the middle of stretch 2
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pandas as pd
import torch
from PIL import Image
from torch import Tensor

from studies import pixel_training
from studies.parameters import PixelParameters
from studies.pixel_training import PixelPairs
from xsd.adapters import registry
from xsd.adapters.bottleneck import PixelAlignment
from xsd.core import ParameterError
from xsd.evaluate import statistics
from xsd.evaluate.tables import sides
from xsd.files import provenance, write_json
from xsd.runs import folder
from xsd.sensors import folder as dataset_folder
from xsd.steps import data as datasets
from xsd.train import guards

FULL_SIZE, FULL_WIDTH = 224, 512
PERCENTILES = (10, 25, 50, 75, 90, 95, 99)
BEFORE, FLOOR, AFTER = ARMS = ("before: the event picture", "floor: the mean camera picture",
                               "after: P0")


def square(image: np.ndarray, size: int) -> Tensor:
    """uint8 [H, W, 3] → its centre square at ``size`` pixels, float32 [3, size, size] in 0…1."""
    height, width = image.shape[:2]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    cut = Image.fromarray(image[top:top + side, left:left + side])
    small = cut.resize((size, size), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(small)).permute(2, 0, 1).float() / 255


def middles(n_events: int, n_video: int) -> list[int]:
    """The video frame nearest to the middle of each event frame's stretch of the clip."""
    return [min(n_video - 1, int((i + 0.5) / n_events * n_video)) for i in range(n_events)]


def read_pairs(P: PixelParameters, split: str) -> PixelPairs:
    """The pairs of a split; simulated drives are made when the run has none. Raises: ParameterError
    when the data set has no such split."""
    root = datasets.root_of(P.run_dir, P.data, split)
    if not (root / dataset_folder.INDEX).is_file():
        n = P.n_train_sequences if split == "train" else P.n_test_sequences
        datasets.prepare(P.run_dir, P.data, split, n_sequences=n, seed=P.seed, workers=P.workers)
    records = dataset_folder.open_folder(root, split)
    if not records:
        raise ParameterError(f"{root} holds no clip of split {split!r}; give a data set with both "
                             f"splits, or {datasets.SIMULATED!r}")
    events, video, sequence = [], [], []
    for record in records:
        # the question plays no part
        sample = dataset_folder.load_sample(record, "what is there?",
                                            n_event_frames=P.n_event_frames)
        places = middles(len(sample.event_frames), len(sample.video))
        for frame, place in zip(sample.event_frames, places, strict=True):
            events.append(square(np.asarray(frame), P.image_size))
            video.append(square(np.asarray(sample.video[place]), P.image_size))
            sequence.append(record.sequence)
    return PixelPairs(torch.stack(events), torch.stack(video), sequence, [split] * len(sequence))


def digest(pairs: PixelPairs) -> str:
    """A hash of the pairs, so that a finished training is known to be of these."""
    return guards.answer_digest(torch.tensor([len(pairs.sequence)]), pairs.events + pairs.video)


def train(P: PixelParameters, pairs: PixelPairs, *,
          progress: Callable[[dict[str, Any]], None] | None = None
          ) -> tuple[PixelAlignment, list[dict[str, Any]], int]:  # fmt: skip
    """P0, a row per epoch and the kept epoch; trained into ``<run_dir>/adapters/P0``, or found
    there. Raises: ParameterError when that folder holds a P0 of other data or parameters."""
    place = folder.resolve(P.run_dir) / "adapters" / "P0"
    used = P.model_dump(exclude={"run_dir", "thresholds", "resamples", "workers"})
    used |= {"pairs": digest(pairs)}
    record = place / "history.json"
    if record.is_file():
        stored = json.loads(record.read_text(encoding="utf-8"))
        if stored["used"] != used:
            raise ParameterError(f"{place} holds a P0 of other data or parameters; choose another "
                                 "run_dir or delete that folder")
        return registry.load_any_adapter(place), stored["history"], stored["best_epoch"]
    adapter, history, best_epoch = pixel_training.fit(
        pairs, width=P.width, epochs=P.epochs, batch_size=P.batch_size,
        learning_rate=P.learning_rate, seed=P.seed, progress=progress)
    registry.save_adapter(adapter, place / "best.safetensors", epoch=best_epoch, seed=P.seed)
    write_json(record, {"used": used, "history": history, "best_epoch": best_epoch})
    return adapter, history, best_epoch


def cosines(pictures: Mapping[str, Tensor], video: Tensor) -> dict[str, np.ndarray]:
    """Arm → cosine of each of its pictures ([N, 3, s, s], or one for all) to the camera's, [N]."""
    return {
        arm: pixel_training.cosines(picture, video).double().numpy()
        for arm, picture in pictures.items()
    }


def judge(P: PixelParameters, near: Mapping[str, np.ndarray], pairs: Mapping[str, PixelPairs],
          adapter: PixelAlignment, history: list[dict[str, Any]],
          best_epoch: int) -> dict[str, Any]:
    """What it writes to ``results/pixels.json``: every arm, and what P0 has beyond the other two.

    near: arm → cosines on the held-out pairs. pairs: by split. Raises: MetricError when a held-out
    sequence is among the training ones.
    """
    sequence = pairs["test"].sequence
    statistics.check_disjoint(pairs["train"].sequence, sequence)
    options = {"n_resamples": P.resamples, "seed": P.seed}

    def beyond(arm: str) -> dict[str, Any]:
        return vars(statistics.bootstrap_difference(near[AFTER], near[arm], sequence, **options))

    with torch.device("meta"):
        full = registry.create_adapter("P0", image_size=FULL_SIZE, width=FULL_WIDTH)
    arms = {
        arm: {
            "cosine": vars(statistics.bootstrap_mean(values, sequence, **options)),
            "accept_at": {f"{least:g}": float((values > least).mean()) for least in P.thresholds},
            "percentiles": {f"P{p}": float(np.percentile(values, p)) for p in PERCENTILES},
        } for arm, values in near.items()
    }
    results = {
        "image_size": P.image_size,
        "parameters": registry.count_parameters(adapter),
        "parameters_full_size": registry.count_parameters(full),
        "pairs": {split: len(some.sequence) for split, some in pairs.items()},
        "sequences": {split: len(set(some.sequence)) for split, some in pairs.items()},
        "epochs": len(history), "best_epoch": best_epoch, "arms": arms,
        "gain": beyond(BEFORE), "over_floor": beyond(FLOOR),
        "provenance": provenance(seed=P.seed, data_hash=digest(pairs["train"]),
                                 parameters=P.model_dump()),
    }  # fmt: skip
    folder.save_results(P.run_dir, "pixels", results)
    return results


# --- for the reader


def table(results: Mapping[str, Any]) -> pd.DataFrame:
    """Before, floor and after: mean cosine with its interval, and the share of pairs above each
    threshold."""
    return pd.DataFrame([{
        "arm": arm, **sides("cosine", found["cosine"]),
        **{f"> {least}": share for least, share in found["accept_at"].items()}
    } for arm, found in results["arms"].items()])


def percentiles(results: Mapping[str, Any]) -> pd.DataFrame:
    """Cosine percentiles P10 … P99, one row per arm."""
    return pd.DataFrame([{"arm": arm} | found["percentiles"]
                         for arm, found in results["arms"].items()])


def histogram(near: Mapping[str, np.ndarray], bins: int = 30) -> pd.DataFrame:
    """Share of pairs in each cosine bin, as ``views.figures.cosine_histogram`` reads it."""
    low = np.floor(10 * min(values.min() for values in near.values())) / 10
    edges = np.linspace(low, 1.0, bins + 1)
    pieces = []
    for arm, values in near.items():
        counts, _ = np.histogram(np.clip(values, edges[0], edges[-1]), edges)
        pieces.append(pd.DataFrame({"level": arm, "cosine_low": edges[:-1],
                                    "cosine_high": edges[1:], "n": counts,
                                    "share": counts / counts.sum()}))
    return pd.concat(pieces, ignore_index=True)


def some(pictures: Tensor, n: int = 6) -> list[np.ndarray]:
    """``n`` of the pictures [N, 3, s, s], spread over the set, as uint8 [s, s, 3]."""
    chosen = np.linspace(0, len(pictures) - 1, min(n, len(pictures))).astype(int)
    shown = (255 * pictures[chosen]).round().byte().permute(0, 2, 3, 1)
    return list(shown.contiguous().numpy())
