"""The storage study: the same pairs in every dtype, and adapters that differ by nothing else."""

import dataclasses

import pytest
import torch
import train_examples

from studies import figures, parameters, storage
from xsd.core import ParameterError, ShardError
from xsd.shards.store import ShardDataset
from xsd.shards.writer import ShardWriter


def write(folder, split, n, seed):
    config = {"split": split, "data_hash": "made"}
    with ShardWriter(folder, mode="teacher_forced", dtype="fp32", config=config,
                     samples_per_shard=8) as out:
        out.save_head("verifier", train_examples.head(), train_examples.VOCABULARY)
        for one in train_examples.answers(n, split=split, seed=seed):
            out.write(dataclasses.replace(one, sequence=f"{split}_{one.sequence}"))
    return ShardDataset(folder)


@pytest.fixture(scope="module")
def exact(tmp_path_factory):
    root = tmp_path_factory.mktemp("exact")
    return {
        "train": write(root / "train", "train", 30, 0), "test": write(root / "test", "test", 15, 1)
    }


@pytest.fixture(scope="module")
def study(exact, tmp_path_factory):
    """A whole study on small made-up pairs in place of the models' answers; and its run folder."""
    run_dir = tmp_path_factory.mktemp("run")
    given = parameters.StorageParameters.checked({
        "run_dir": str(run_dir), "levels": ["L1", "L5F"], "dtypes": ["fp32", "bf16", "int8"],
        "epochs": 2, "resamples": 50, "gamma": 3
    })
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(storage, "extract", lambda _: exact)
        first = storage.run(given)
        again = storage.run(given)  # everything is found again
    assert again["levels"] == first["levels"]
    return first, run_dir


@pytest.mark.parametrize("dtype, largest", [("fp16", 2**-11), ("bf16", 2**-8), ("int8", 0.02)])
def test_rewritten_pairs_differ_by_their_rounding_alone(exact, tmp_path, dtype, largest):
    stored = storage.recode(exact["test"], tmp_path, dtype)
    assert stored.manifest["dtype"] == dtype and len(stored) == 15 and 0 < storage.rounding(
        exact["test"], stored) <= largest
    for a, b in zip(exact["test"], stored, strict=True):
        assert torch.equal(
            a.ids_by_verifier,
            b.ids_by_verifier) and (a.sequence, a.clip, a.split) == (b.sequence, b.clip, b.split)
    assert torch.equal(stored.head("verifier"), exact["test"].head("verifier"))
    assert storage.recode(exact["test"], tmp_path, dtype).manifest == stored.manifest


def test_a_rewrite_of_other_states_is_refused(exact, tmp_path):
    storage.recode(exact["test"], tmp_path, "bf16")
    with pytest.raises(ShardError, match=r"begun with other settings: config\.recoded_from"):
        storage.recode(dataclasses_like(exact["test"]), tmp_path, "bf16")


def dataclasses_like(dataset):
    other = ShardDataset(dataset.folder)
    other.manifest = {**other.manifest, "digest": "another"}
    return other


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16", "int8"])
def test_bytes_a_token_are_those_of_a_shard(exact, tmp_path, dtype):
    stored = storage.recode(exact["train"], tmp_path, dtype)
    told = storage.bytes_per_token(dtype, stored.drafter_size, stored.verifier_size)
    size = sum(shard["bytes"] for shard in stored.manifest["shards"])
    fixed = size - told * stored.table()["n_tokens_verifier"].sum()  # headers and offsets
    assert 0 < fixed < 1200 * len(stored.manifest["shards"])


def test_every_dtype_is_compared_with_the_exact_states(study):
    frame = storage.acceptance(study[0])
    assert list(zip(frame["level"], frame["dtype"],
                    strict=True)) == [(a, b) for a in ("L1", "L5F")
                                      for b in ("fp32", "bf16", "int8")]
    assert (frame["value"].between(0, 1).all() and (frame["value low"] <= frame["value"]).all()
            and (frame["value"] <= frame["value high"]).all())
    exact = frame[frame["dtype"] == "fp32"]
    assert (exact[["difference", "difference low", "difference high"]]
            == 0).all(axis=None) and (exact["value"] == exact["self_measured"]).all()
    values = frame.set_index(["level", "dtype"])
    for level, dtype in values.index:
        assert values.loc[(level, dtype),
                          "difference"] == pytest.approx(values.loc[(level, dtype), "value"] -
                                                         values.loc[(level, "fp32"), "value"])
    assert storage.acceptance(study[0], "accepted_per_round")["value"].between(0, 3).all()
    assert (study[1] / "results" / "storage.json").is_file()
    summary = storage.summary(study[0])
    assert summary["levels whose interval excludes zero"].iloc[0] == "0 of 2"
    assert summary["largest difference"].iloc[0] == 0


def test_sizes_tell_bytes_at_full_width_and_the_rounding(study):
    sizes = storage.sizes(study[0]).set_index("dtype")
    assert sizes["bytes at 4096"].to_dict() == {"fp32": 32784, "bf16": 16400, "int8": 8216}
    assert sizes.loc["fp32", "error of a state"] == 0 < sizes.loc["bf16", "error of a state"]


def test_fp16_rounds_less_than_bf16(exact, tmp_path):
    test = exact["test"]
    stored = [storage.recode(test, tmp_path / dtype, dtype) for dtype in ("fp32", "fp16", "bf16")]
    none, less, more = (storage.rounding(test, one) for one in stored)
    assert none == 0 < less < more


def test_a_study_without_exact_states_is_refused():
    given = parameters.StorageParameters.checked({"dtypes": ["bf16", "int8"]})
    with pytest.raises(ParameterError,
                       match="holds no 'fp32', which the others are compared with; add it"):
        storage.run(given)


def test_the_picture_holds_both_figures_of_every_level(study):
    frame = storage.acceptance(study[0])
    figure = figures.acceptance_by_bytes(frame)
    drawn = [trace for trace in figure.data if trace.name in ("L1", "L5F")]
    assert [trace.name for trace in drawn] == ["L1", "L1", "L5F", "L5F"
                                               ] and [trace.showlegend
                                                      for trace in drawn] == [True, False] * 2
    part = frame[frame["level"] == "L5F"]
    assert list(drawn[2].y) == part["value"].tolist() and list(
        drawn[3].y) == part["difference"].tolist()
    places = [x for trace in drawn[::2] for x in trace.x]
    assert len(set(places)) == len(places), "no point hides another"
    assert "bf16" in "".join(figure.layout.xaxis.ticktext) and figure.layout.xaxis.type == "log"
