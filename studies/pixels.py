"""Notebook 11: P0, the oldest idea: turn event pictures into camera pictures and compare pixels.

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
from studies.pixel_training import PixelAlignment, PixelPairs
from xsd.adapters import registry
from xsd.core import ParameterError
from xsd.evaluate import statistics
from xsd.evaluate.tables import sides
from xsd.files import provenance, write_json
from xsd.runs import folder
from xsd.sensors import folder as dataset_folder
from xsd.steps import data as datasets
from xsd.steps import extraction
from xsd.train import guards

FULL_SIZE, FULL_WIDTH = 224, 512
PERCENTILES = (10, 25, 50, 75, 90, 95, 99)
BEFORE, FLOOR, AFTER, CUT = ARMS = (
    "before: the event picture", "floor: the mean camera picture", "after: P0",
    "after: P0, cut to 0…1")
"""The headline is P0's output as it comes, as the reference has it; pictures themselves lie in 0…1,
so that cutting changes nothing before."""


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
    """The pairs of a split, from a data set or from the clips that pairs by path were extracted
    from; simulated drives are made when the run has none. Raises: ParameterError when the data set
    has no such split."""
    data = P.data if split == "train" else P.test_data or P.data
    if extraction.stored(data, split) is not None:
        records = extraction.clips_of(P.run_dir, split, data,
                                      extraction.open_pairs(P.run_dir, split, data))
    else:
        root = datasets.root_of(P.run_dir, data, split)
        if not (root / dataset_folder.INDEX).is_file():
            n = P.n_train_sequences if split == "train" else P.n_test_sequences
            datasets.prepare(P.run_dir, data, split, n_sequences=n, seed=P.seed, workers=P.workers)
        records = dataset_folder.open_folder(root, split)
    if not records:
        raise ParameterError(f"{data} holds no clip of split {split!r}; give a data set with both "
                             f"splits, or {datasets.SIMULATED!r}")
    events, video, about = [], [], []
    for record in records:
        # the question plays no part
        sample = dataset_folder.load_sample(record, "what is there?",
                                            n_event_frames=P.n_event_frames)
        places = middles(len(sample.event_frames), len(sample.video))
        start_us, end_us = record.t_us or (0, 0)
        length_ms = 50 * round((end_us - start_us) / 5e4)  # a clip ends with a video frame
        for frame, place in zip(sample.event_frames, places, strict=True):
            events.append(square(np.asarray(frame), P.image_size))
            video.append(square(np.asarray(sample.video[place]), P.image_size))
            about.append((record.sequence, split, length_ms))
    return PixelPairs(torch.stack(events), torch.stack(video), *zip(*about, strict=True))


def digest(pairs: PixelPairs) -> str:
    """A hash of the pairs, so that a finished training is known to be of these."""
    return guards.answer_digest(torch.tensor([len(pairs.sequence)]), pairs.events + pairs.video)


def train(P: PixelParameters, pairs: PixelPairs, *, name: str = "P0",
          progress: Callable[[dict[str, Any]], None] | None = None
          ) -> tuple[PixelAlignment, list[dict[str, Any]], int]:
    """P0, a row per epoch and the kept epoch; trained into ``<run_dir>/adapters/<name>``, or found
    there. Raises: ParameterError when that folder holds a P0 of other data or parameters."""
    place = folder.resolve(P.run_dir) / "adapters" / name
    used = P.model_dump(exclude={"run_dir", "thresholds", "resamples", "workers"})
    used |= {"pairs": digest(pairs)}
    record = place / "history.json"
    if record.is_file():
        stored = json.loads(record.read_text(encoding="utf-8"))
        if stored["used"] != used:
            raise ParameterError(f"{place} holds a P0 of other data or parameters; choose another "
                                 "run_dir or delete that folder")
        adapter = pixel_training.load(place / "best.safetensors")
        return adapter, stored["history"], stored["best_epoch"]
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


def shape(values: np.ndarray) -> dict[str, float]:
    """Standard deviation, least and largest."""
    return {"std": float(values.std()), "min": float(values.min()), "max": float(values.max())}


def random_split(P: PixelParameters, pairs: PixelPairs) -> dict[str, Any]:
    """The reference's way: pictures drawn at random, 80 % to train on and 20 % held out, so that
    neighbours of one drive are in both; another P0, kept in ``adapters/P0_random``. Returns: pairs,
    cosine (by arm, with std, min, max); no interval, as the pictures are not independent."""
    order = torch.randperm(len(pairs.sequence),
                           generator=torch.Generator().manual_seed(P.seed)).tolist()
    n_train = round(0.8 * len(order))
    kept, held = pairs.subset(order[:n_train]), pairs.subset(order[n_train:])
    adapter, *_ = train(P, kept, name="P0_random")
    near = cosines(pictures(adapter, held, pixel_training.mean_picture(kept, P.seed)), held.video)
    return {"pairs": {"train": n_train, "test": len(order) - n_train},
            "cosine": {arm: {"value": float(values.mean()), **shape(values)}
                       for arm, values in near.items()}}


def pictures(adapter: PixelAlignment, pairs: PixelPairs, mean: Tensor) -> dict[str, Tensor]:
    """Arm → its pictures [N, 3, s, s], or one for all. mean: of the training pairs."""
    aligned = pixel_training.align(adapter, pairs.events)
    return dict(zip(ARMS, (pairs.events, mean, aligned, aligned.clamp(0, 1)), strict=True))


def judge(P: PixelParameters, near: Mapping[str, np.ndarray], pairs: Mapping[str, PixelPairs],
          adapter: PixelAlignment, history: list[dict[str, Any]],
          best_epoch: int) -> dict[str, Any]:
    """What it writes to ``results/pixels.json``: every arm, and what P0 has beyond the other two.

    near: arm → cosines on the held-out pairs. pairs: by split. Raises: MetricError when a held-out
    sequence is among the training ones.
    """
    test = pairs["test"]
    sequence = test.sequence
    statistics.check_disjoint(pairs["train"].sequence, sequence)
    options = {"n_resamples": P.resamples, "seed": P.seed}

    def beyond(after: str, arm: str, least: float | None = None) -> dict[str, Any]:
        both = (near[one] if least is None else near[one] > least for one in (after, arm))
        return vars(statistics.bootstrap_difference(*both, sequence, **options))

    with torch.device("meta"):
        full = PixelAlignment(FULL_SIZE, width=FULL_WIDTH)
    arms = {
        arm: {
            "cosine": vars(statistics.bootstrap_mean(values, sequence, **options)) | shape(values),
            "accept_at": {f"{least:g}": float((values > least).mean()) for least in P.thresholds},
            "percentiles": {f"P{p}": float(np.percentile(values, p)) for p in PERCENTILES},
        } for arm, values in near.items()
    }
    lengths = np.array(test.duration_ms)
    results = {
        "image_size": P.image_size,
        "parameters": registry.count_parameters(adapter),
        "parameters_full_size": registry.count_parameters(full),
        "pairs": {split: len(some.sequence) for split, some in pairs.items()},
        "sequences": {split: len(set(some.sequence)) for split, some in pairs.items()},
        "epochs": len(history), "best_epoch": best_epoch, "arms": arms,
        "gain": beyond(AFTER, BEFORE), "gain_cut": beyond(CUT, BEFORE),
        "over_floor": beyond(AFTER, FLOOR),
        "gain_at": {f"{least:g}": {"as it comes": beyond(AFTER, BEFORE, least),
                                   "cut to 0…1": beyond(CUT, BEFORE, least)}
                    for least in P.thresholds},
        "durations": {f"{length}ms": {"n": int((lengths == length).sum())} | {
            arm: float(values[lengths == length].mean()) for arm, values in near.items()}
            for length in sorted(set(test.duration_ms))},
        "random_split": random_split(P, pairs["train"]),
        "speed": pixel_training.speed(adapter, test.events),
        "provenance": provenance(seed=P.seed, data_hash=digest(pairs["train"]),
                                 parameters=P.model_dump()),
    }
    folder.save_results(P.run_dir, "pixels", results)
    return results


# --- for the reader


def table(results: Mapping[str, Any]) -> pd.DataFrame:
    """One row per arm: mean cosine with its interval, std, min, max, and the share of pairs above
    each threshold."""
    return pd.DataFrame([{
        "arm": arm, **sides("cosine", found["cosine"]),
        **{name: found["cosine"][name] for name in ("std", "min", "max")},
        **{f"> {least}": share for least, share in found["accept_at"].items()}
    } for arm, found in results["arms"].items()])


def gains(results: Mapping[str, Any]) -> pd.DataFrame:
    """What P0 gains over the event picture: in mean cosine, and in the share of pairs above each
    threshold, with intervals; its output as it comes, and cut to 0…1."""
    whole = {"mean cosine": {"as it comes": results["gain"], "cut to 0…1": results["gain_cut"]}}
    shares = {f"share > {least}": gain for least, gain in results["gain_at"].items()}
    return pd.DataFrame([{"gain in": what} | {
        name: value for form, one in found.items() for name, value in sides(form, one).items()}
        for what, found in (whole | shares).items()])


def splits(results: Mapping[str, Any]) -> pd.DataFrame:
    """Mean cosines by arm, under the split by sequence and under the random one (and by length of
    clip, where the held-out set holds several)."""
    rows = {"by sequence": {arm: found["cosine"]["value"]
                            for arm, found in results["arms"].items()},
            "random 80/20": {arm: found["value"]
                             for arm, found in results["random_split"]["cosine"].items()}}
    n = {"by sequence": results["pairs"]["test"],
         "random 80/20": results["random_split"]["pairs"]["test"]}
    if len(results["durations"]) > 1:
        for length, found in results["durations"].items():
            n[f"by sequence, clips of {length}"] = found["n"]
            rows[f"by sequence, clips of {length}"] = {arm: found[arm] for arm in results["arms"]}
    return pd.DataFrame([{"split": name, "held-out pairs": n[name], **row}
                         for name, row in rows.items()])


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
    shown = (255 * pictures[chosen].clamp(0, 1)).round().byte().permute(0, 2, 3, 1)
    return list(shown.contiguous().numpy())
