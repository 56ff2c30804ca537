"""Step 11: P0, the oldest idea: turn event pictures into camera pictures and compare pixels. Before
and after, beside a picture that never changes.

Each clip gives ``n_event_frames`` pairs: an event frame paints one stretch of the clip, and stands
beside the video frame nearest to the
stretch's middle::

    event frames      0      |      1      |      2      |      3      |      4
    video frames    0    1      2      3      4      5      6      7              frame 4 is nearest to the middle of stretch 2
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from PIL import Image
from torch import Tensor

from studies import parameters
from studies import pixel_training as pixels
from xsd.adapters import registry
from xsd.core import ParameterError
from xsd.evaluate import statistics
from xsd.files import provenance, write_json
from xsd.runs import folder
from xsd.sensors import folder as dataset_folder
from xsd.steps import data as datasets
from xsd.train import guards

FULL_SIZE, FULL_WIDTH = 224, 512
PERCENTILES = (10, 25, 50, 75, 90, 95, 99)
ARMS = ("before: the event picture", "floor: the mean camera picture", "after: P0")


def square(image: np.ndarray, size: int) -> Tensor:
    """uint8 [H, W, 3] → its centre square at ``size`` pixels, float32 [3, size, size] in 0…1."""
    height, width = image.shape[:2]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    cut = Image.fromarray(image[top:top + side, left:left + side]).resize((size, size),
                                                                          Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(cut)).permute(2, 0, 1).float() / 255


def middles(n_events: int, n_video: int) -> list[int]:
    """The video frame nearest to the middle of each event frame's stretch of the clip."""
    return [min(n_video - 1, int((i + 0.5) / n_events * n_video)) for i in range(n_events)]


def read_pairs(given: parameters.PixelParameters, split: str) -> pixels.PixelPairs:
    """The pairs of a split; simulated drives are made when the run has none. Raises: ParameterError
    when the data set has no such split."""
    root = datasets.root_of(given.run_dir, given.data, split)
    if not (root / dataset_folder.INDEX).is_file():
        n = given.n_train_sequences if split == "train" else given.n_test_sequences
        datasets.prepare(given.run_dir, given.data, split, n_sequences=n, seed=given.seed,
                         workers=given.workers)
    records = dataset_folder.open_folder(root, split)
    if not records:
        raise ParameterError(
            f"{root} holds no clip of split {split!r}; give a data set with both splits, or "
            f"{datasets.SIMULATED!r}"
        )
    events, video, sequence = [], [], []
    for record in records:
        sample = dataset_folder.load_sample(
            record, "what is there?",
            n_event_frames=given.n_event_frames)  # the question plays no part
        for frame, place in zip(sample.event_frames,
                                middles(len(sample.event_frames), len(sample.video)), strict=True):
            events.append(square(np.asarray(frame), given.image_size))
            video.append(square(np.asarray(sample.video[place]), given.image_size))
            sequence.append(record.sequence)
    return pixels.PixelPairs(torch.stack(events), torch.stack(video), sequence,
                             [split] * len(sequence))


@dataclass(frozen=True)
class PixelBaseline:
    """What step 11 found. cosines: arm → [N] numbers on held-out pairs. aligned: [N, 3, s, s].
    held_out: the pairs. results: as written."""

    results: dict[str, Any]
    cosines: Mapping[str, np.ndarray]
    aligned: Tensor
    held_out: pixels.PixelPairs

    def table(self) -> pd.DataFrame:
        """Before, floor and after: mean cosine with its interval, and the share of pairs above each
        threshold."""
        rows = []
        for arm in ARMS:
            found = self.results["arms"][arm]
            one = found["cosine"]
            line = {
                "arm": arm, "cosine": one["value"], "cosine low": one["low"],
                "cosine high": one["high"]
            }
            rows.append(
                line | {f"> {threshold}": share for threshold, share in found["accept_at"].items()})
        return pd.DataFrame(rows)

    def percentiles(self) -> pd.DataFrame:
        """Cosine percentiles P10 … P99, an arm a row."""
        return pd.DataFrame([{"arm": arm} | self.results["arms"][arm]["percentiles"]
                             for arm in ARMS])

    def orderly(self) -> dict[str, bool]:
        """What must hold whatever was trained: higher thresholds accept no more, percentiles rise,
        cosines lie in [-1, 1]."""
        def sorted_up(values: list[float]) -> bool:
            return all(a <= b for a, b in itertools.pairwise(values))

        arms = self.results["arms"].values()
        return {
            "a higher threshold accepts no more": all(
                sorted_up([-share for share in one["accept_at"].values()]) for one in arms),
            "percentiles rise": all(sorted_up(list(one["percentiles"].values())) for one in arms),
            "cosines lie in [-1, 1]": all(
                bool((abs(values) <= 1 + 1e-9).all()) for values in self.cosines.values()),
        }

    def histogram(self, bins: int = 30) -> pd.DataFrame:
        """Share of pairs in each cosine bin, as ``views.figures.cosine_histogram`` reads it."""
        low = np.floor(10 * min(values.min() for values in self.cosines.values())) / 10
        edges, pieces = np.linspace(low, 1.0, bins + 1), []
        for arm, values in self.cosines.items():
            counts, _ = np.histogram(np.clip(values, edges[0], edges[-1]), edges)
            share = counts / counts.sum()
            pieces.append(
                pd.DataFrame({
                    "level": arm, "cosine_low": edges[:-1], "cosine_high": edges[1:], "n": counts,
                    "share": share
                }))
        return pd.concat(pieces, ignore_index=True)

    def pictures(self, n: int = 6) -> dict[str, list[np.ndarray]]:
        """Event picture, P0's, and the camera's of n held-out pairs spread over the set, uint8 [s,
        s, 3]."""
        chosen = np.linspace(0, len(self.aligned) - 1, min(n, len(self.aligned))).astype(int)
        stacks = {
            "event picture": self.held_out.events, "P0's picture": self.aligned,
            "camera picture": self.held_out.video
        }
        return {
            name: [(255 * stack[i]).round().byte().permute(1, 2, 0).contiguous().numpy()
                   for i in chosen] for name, stack in stacks.items()
        }


def run(given: parameters.PixelParameters, *,
        progress: Callable[[dict[str, Any]], None] | None = None) -> PixelBaseline:
    """Train P0 unless the run holds it, judge it on held-out sequences, write
    ``results/pixels.json``.

    Raises: ParameterError when the run holds a P0 of other parameters; MetricError when a held-out
    sequence is among the training ones.
    """
    train, test = read_pairs(given, "train"), read_pairs(given, "test")
    statistics.check_disjoint(train.sequence, test.sequence)
    place = folder.resolve(given.run_dir) / "adapters" / "P0"
    used = given.model_dump(exclude={"run_dir", "thresholds", "resamples", "workers"})
    used |= {
        "pairs": guards.answer_digest(torch.tensor([len(train.sequence)]),
                                      train.events + train.video)
    }
    adapter, history, best_epoch, mean = _trained(given, train, place, used, progress)
    aligned = pixels.align(adapter, test.events)
    pictures = dict(zip(ARMS, (test.events, mean, aligned), strict=True))
    cosines = {
        arm: pixels.cosines(picture, test.video).double().numpy()
        for arm, picture in pictures.items()
    }
    arms = {arm: _judge(values, test.sequence, given) for arm, values in cosines.items()}
    gain, over_floor = (statistics.bootstrap_difference(cosines[ARMS[2]], cosines[arm],
                                                        test.sequence, n_resamples=given.resamples,
                                                        seed=given.seed) for arm in ARMS[:2])
    with torch.device("meta"):
        full = registry.count_parameters(
            registry.create_adapter("P0", image_size=FULL_SIZE, width=FULL_WIDTH))
    results = {
        "image_size": given.image_size, "parameters": registry.count_parameters(adapter),
        "parameters_full_size": full,
        "pairs": {"train": len(train.sequence), "test": len(test.sequence)},
        "sequences": {"train": len(set(train.sequence)), "test": len(set(test.sequence))},
        "epochs": len(history), "best_epoch": best_epoch, "arms": arms, "gain": asdict(gain),
        "over_floor": asdict(over_floor), "provenance": provenance(seed=given.seed,
                                                                   data_hash=used["pairs"],
                                                                   parameters=given.model_dump()),
    }  # fmt: skip
    folder.save_results(given.run_dir, "pixels", results)
    return PixelBaseline(results, cosines, aligned, test)


def _trained(given, train, place, used, progress) -> tuple[Any, list[dict[str, Any]], int, Tensor]:
    record = place / "history.json"
    if record.is_file():
        stored = json.loads(record.read_text(encoding="utf-8"))
        if stored["used"] != used:
            raise ParameterError(
                f"{place} holds a P0 of other data or parameters; choose another run_dir or delete "
                "that folder"
            )
        return registry.load_any_adapter(
            place), stored["history"], stored["best_epoch"], pixels.mean_picture(train, given.seed)
    found = pixels.fit(train, width=given.width, epochs=given.epochs, batch_size=given.batch_size,
                       learning_rate=given.learning_rate, seed=given.seed, progress=progress,
                       )  # fmt: skip
    registry.save_adapter(found.adapter, place / "best.safetensors", epoch=found.best_epoch,
                          seed=given.seed)
    write_json(record, {"used": used, "history": found.history, "best_epoch": found.best_epoch})
    return found.adapter, found.history, found.best_epoch, pixels.mean_picture(train, given.seed)


def _judge(values: np.ndarray, sequence: list[str],
           given: parameters.PixelParameters) -> dict[str, Any]:
    mean = statistics.bootstrap_mean(values, sequence, n_resamples=given.resamples, seed=given.seed)
    return {
        "cosine": asdict(mean), "accept_at": {
            f"{threshold:g}": float((values > threshold).mean()) for threshold in given.thresholds
        }, "percentiles": {f"P{p}": float(np.percentile(values, p)) for p in PERCENTILES},
    }
