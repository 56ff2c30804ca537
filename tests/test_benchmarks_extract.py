"""What the bench compares is the same work: equal states, equal answers, every file counted."""

import pytest
import torch
from tiny_pair import make_samples, make_tiny_pair

from benchmarks import extract as bench_extract
from benchmarks import streaming as bench
from xsd.extract import pairs
from xsd.models import loading
from xsd.shards import chunks
from xsd.shards.loader import Loader

SIZES = bench.Sizes(n_answers=16, width=64, narrow_width=16, samples_per_shard=4, chunk_size=8,
                    lengths=(4, 10), repeats=1)


@pytest.mark.parametrize("plain", [False, True])
def test_token_by_token_gives_the_forced_states(tmp_path, plain):
    pair = loading.load_pair(str(make_tiny_pair(tmp_path)))
    samples = make_samples(4)
    known = pair.verifier.generate(samples, 6)
    single = bench_extract.token_by_token(pair, samples, known, plain=plain)
    for one, forced in zip(single, pairs.teacher_forced_pairs(pair, samples, 6, 4, verifier=known),
                           strict=True):
        assert one.shape == forced.hidden_by_drafter.shape and torch.allclose(
            one, forced.hidden_by_drafter, atol=1e-4)


def test_extraction_is_measured_for_both_kinds_of_pairs(tmp_path):
    pair = loading.load_pair(str(make_tiny_pair(tmp_path)))
    found, facts = bench_extract.extraction_ratios(pair, make_samples(4),
                                                   bench_extract.Sizes(max_new_tokens=4, repeats=1))
    assert [one.target for one in found] == [5, 10, None, None, None] and all(one.value > 0
                                                                              for one in found)
    assert facts[
        "pairs"] == 4 and 1 <= facts["answer_tokens_mean"] <= facts["answer_tokens_longest"] <= 4


def test_chunks_and_shards_hold_the_same_answers(tmp_path):
    stored = bench.write_run(tmp_path / "run", 10, 64, SIZES, "fp32")
    files = bench.write_chunks(tmp_path / "chunks", 10, 64, SIZES)
    padded = [states for path in files for states in chunks.read_chunks(path)]
    assert len(files) == 2 and len(padded) == len(stored) == 10
    for a, b in zip(stored, padded, strict=True):
        assert torch.equal(a.hidden_by_verifier, b.hidden_by_verifier) and torch.equal(
            a.hidden_by_drafter, b.hidden_by_drafter)


def test_the_stream_that_is_measured_reads_every_answer(tmp_path):
    stored = bench.write_run(tmp_path, 16, 64, SIZES, "fp16")
    found = sorted(
        i
        for batch in Loader(stored, batch_size=4, max_padding=0.2, shuffle_seed=0, dtype="float16")
        for i in batch.index)
    assert found == list(range(16)) == sorted(i for batch in stored.batches(5)
                                              for i in batch.index)


def test_streaming_bytes_and_memory_are_written_down(tmp_path):
    ratios, facts = bench.streaming_ratios(tmp_path, SIZES)
    assert [one.target for one in ratios] == [0.8, None, None, None, 5, None, None
                                              ] and facts["bytes"]["wide"] > 16 * 4 * 64 * 2 * 2
    counted = bench.bytes_per_pair(tmp_path, SIZES, n=16)
    assert counted["int8"]["bytes"] < counted["bf16"]["bytes"] == counted["fp16"][
        "bytes"] < counted["fp32"]["bytes"]
    text = bench.bytes_table(counted)
    assert text.count("≤") == 2 and f"{counted['bf16']['share']:.3f}" in text


def test_peak_memory_is_measured_in_a_process_of_its_own(tmp_path):
    found = bench.peak_memory(tmp_path, SIZES, times=(1,))
    (row,) = found["rows"]
    assert row["peak"] > 1e7 and row["bound"] > 0 and found["largest_over_smallest"] == 1
    assert len(bench.memory_table(found).splitlines()) == 3


@pytest.mark.parametrize("share, met", [(0.39, "yes"), (0.41, "**no**")])
def test_a_missed_aim_is_said(share, met):
    row = {"bytes": 1000, "share": share}
    table = bench.bytes_table(
        {"fp32": row, "bf16": row, "fp16": row, "int8": {**row, "share": 0.1}})
    assert f"| bf16 | 1 | {share:.3f} | ≤ 0.4 | {met} |" in table
