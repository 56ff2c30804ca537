"""P0 from event pictures to its table: what stands beside what, and that it is found again."""

import dataclasses
import itertools

import pytest
import torch

from studies import pixel_training, pixels
from studies.parameters import PixelParameters
from xsd.adapters import registry, tensor_files
from xsd.core import CheckpointError, MetricError, ParameterError, TrainingError


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    return PixelParameters.checked({
        "run_dir": str(tmp_path_factory.mktemp("pixels")), "image_size": 16, "width": 8,
        "epochs": 4, "workers": 1, "resamples": 50, "n_train_sequences": 3, "n_test_sequences": 2,
    })


@pytest.fixture(scope="module")
def pairs(given):
    return {split: pixels.read_pairs(given, split) for split in ("train", "test")}


def judged(given, pairs):
    """What the notebook does: P0's pictures, cosines of the three arms, results."""
    adapter, history, best_epoch = pixels.train(given, pairs["train"])
    test = pairs["test"]
    mean = pixel_training.mean_picture(pairs["train"], given.seed)
    arms = pixels.pictures(adapter, test, mean)
    near = pixels.cosines(arms, test.video)
    return arms[pixels.AFTER], near, pixels.judge(given, near, pairs, adapter, history, best_epoch)


def test_before_floor_and_after(given, pairs):
    aligned, near, results = judged(given, pairs)
    n = results["pairs"]["test"]
    assert results["sequences"] == {"train": 3, "test": 2} and aligned.shape == (n, 3, 16, 16)
    assert results["parameters_full_size"] == 154_556_416
    assert 1 <= results["best_epoch"] <= results["epochs"] == 4
    table = pixels.table(results).set_index("arm")
    assert list(table.index) == list(pixels.ARMS)
    assert {"cosine low", "cosine high", "> 0.5", "> 0.95"} <= set(table.columns)
    columns = list(pixels.percentiles(results).columns)
    assert columns == ["arm", *(f"P{p}" for p in pixels.PERCENTILES)]
    test = pairs["test"]
    before = torch.nn.functional.cosine_similarity(test.events.flatten(1), test.video.flatten(1))
    mean = results["arms"][pixels.BEFORE]["cosine"]["value"]
    assert mean == pytest.approx(float(before.mean()), abs=1e-6)
    assert pixels.histogram(near, bins=7).groupby("level")["n"].sum().tolist() == [n] * 4
    shown = pixels.some(aligned, 4)
    assert len(shown) == 4 and shown[0].shape == (16, 16, 3) and shown[0].dtype == "uint8"


def test_the_headline_is_p0_as_it_comes_and_the_cut_one_stands_beside_it(given, pairs):
    aligned, near, results = judged(given, pairs)
    video = pairs["test"].video
    assert aligned.min() < 0 or aligned.max() > 1
    for arm, picture in ((pixels.AFTER, aligned), (pixels.CUT, aligned.clamp(0, 1))):
        one = results["arms"][arm]["cosine"]
        by_hand = torch.nn.functional.cosine_similarity(picture.flatten(1), video.flatten(1))
        assert one["value"] == pytest.approx(float(by_hand.mean()), abs=1e-6)
        assert (one["std"], one["min"], one["max"]) == pytest.approx(
            [float(f) for f in (by_hand.std(correction=0), by_hand.min(), by_hand.max())], abs=1e-6)
    gains = pixels.gains(results).set_index("gain in")
    assert list(gains.index) == ["mean cosine", *(f"share > {one:g}" for one in given.thresholds)]
    before = near[pixels.BEFORE]
    assert gains.loc["mean cosine", "cut to 0…1"] == pytest.approx(
        (near[pixels.CUT] - before).mean())
    assert gains.loc["share > 0.8", "as it comes"] == pytest.approx(
        (near[pixels.AFTER] > 0.8).mean() - (before > 0.8).mean())


def test_the_random_split_and_the_costs_stand_beside_the_split_by_sequence(given, pairs):
    *_, results = judged(given, pairs)
    table = pixels.splits(results).set_index("split")
    assert list(table.index) == ["by sequence", "random 80/20"]
    n = results["pairs"]["train"]
    assert results["random_split"]["pairs"] == {"train": round(0.8 * n), "test": n - round(0.8 * n)}
    assert table.loc["random 80/20", "held-out pairs"] == n - round(0.8 * n)
    speed = results["speed"]
    assert speed["pairs_per_s"] > 0 and speed["weight_bytes"] == 4 * results["parameters"]
    assert speed["peak_bytes"] >= 3 * 16 * 16 * 4 * speed["batch_size"]  # its output at least


def test_clips_of_several_lengths_are_counted_apart(given, pairs):
    test = pairs["test"]
    lengths = [500 + 500 * (i % 2) for i in range(len(test.sequence))]
    mixed = {**pairs, "test": dataclasses.replace(test, duration_ms=lengths)}
    _, near, results = judged(given, mixed)
    assert {name: one["n"] for name, one in results["durations"].items()} == {
        "500ms": lengths.count(500), "1000ms": lengths.count(1000)}
    rows = pixels.splits(results).set_index("split")
    assert rows.loc["by sequence, clips of 500ms", pixels.AFTER] == pytest.approx(
        near[pixels.AFTER][::2].mean())


def test_higher_thresholds_accept_no_more_and_percentiles_rise(given, pairs):
    _, near, results = judged(given, pairs)
    assert all((abs(values) <= 1 + 1e-9).all() for values in near.values())
    for arm in results["arms"].values():
        shares, percentiles = list(arm["accept_at"].values()), list(arm["percentiles"].values())
        assert all(a >= b for a, b in itertools.pairwise(shares))
        assert all(a <= b for a, b in itertools.pairwise(percentiles))


def test_a_finished_training_is_found_and_another_refused(given, pairs):
    first, again = judged(given, pairs), judged(given, pairs)
    assert torch.equal(again[0], first[0]) and again[2]["arms"] == first[2]["arms"]
    with pytest.raises(ParameterError, match="holds a P0 of other data or parameters"):
        pixels.train(given.model_copy(update={"width": 9}), pairs["train"])


def test_a_sequence_in_both_splits_is_refused(given, pairs):
    adapter, history, best_epoch = pixels.train(given, pairs["train"])
    near = pixels.cosines({arm: pairs["train"].events for arm in pixels.ARMS},
                          pairs["train"].video)
    both = {"train": pairs["train"], "test": pairs["train"]}
    with pytest.raises(MetricError, match="are in training and in test"):
        pixels.judge(given, near, both, adapter, history, best_epoch)


def test_p0_learns_a_picture_and_refuses_the_test_split():
    draw = torch.Generator().manual_seed(0)
    events = torch.rand(24, 3, 8, 8, generator=draw)
    names = [f"s{i % 4}" for i in range(24)]
    settings = {"width": 32, "epochs": 20, "batch_size": 8, "learning_rate": 3e-3}

    video = events.flip(-1)

    def fit(events, split="train"):
        pairs = pixel_training.PixelPairs(events, video, names, [split] * 24)
        return pixel_training.fit(pairs, **settings)

    _, history, best_epoch = fit(events)
    assert history[-1]["train_total"] < history[0]["train_total"] and 1 <= best_epoch <= 20
    with pytest.raises(TrainingError, match="24 of 24 samples are of the test split"):
        fit(events, split="test")
    with pytest.raises(ParameterError, match="square pictures in pairs"):
        fit(events[..., :6])
    with pytest.raises(TrainingError,
                       match="training P0 stopped in epoch 1: the loss is not a number"):
        fit(events * float("nan"))


def test_event_frames_stand_beside_the_video_of_their_stretch():
    assert pixels.middles(5, 8) == [0, 2, 4, 5, 7] and pixels.middles(1, 8) == [4]
    wide = torch.arange(4 * 8 * 3, dtype=torch.uint8).view(4, 8, 3).numpy()
    assert pixels.square(wide, 4).shape == (3, 4, 4)
    middle = torch.from_numpy(wide[:, 2:6].copy()).permute(2, 0, 1).float() / 255
    assert torch.equal(pixels.square(wide, 4), middle)


def test_p0_keeps_the_images_shape_and_counts_its_pixels():
    adapter = pixel_training.PixelAlignment(8, width=16)
    images = torch.rand(2, 3, 8, 8)
    assert adapter(images).shape == images.shape
    assert adapter.compute_loss(images, images)["total_loss"].requires_grad
    with pytest.raises(ParameterError, match="made for 192 values"):
        adapter(torch.rand(1, 3, 9, 9))


def test_p0_is_saved_and_loaded_and_made_no_larger_than_its_file(tmp_path):
    adapter = pixel_training.PixelAlignment(8, width=16).eval()
    path = registry.save_adapter(adapter, tmp_path)
    images = torch.rand(1, 3, 8, 8)
    assert torch.equal(pixel_training.load(path)(images), adapter(images))
    config, tensors = tensor_files.read(path)
    for options in ({"image_size": 10**5, "width": 10**5}, {"image_size": "x"}, {"size": 8}):
        tensor_files.write(path, tensors, config | {"options": options})
        with pytest.raises(CheckpointError, match="holds no whole P0"):
            pixel_training.load(path)
