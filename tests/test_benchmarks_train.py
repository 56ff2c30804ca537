"""What ``xsd bench train`` measures, at toy sizes; no speed is asserted."""

import json

from benchmarks import train as bench_train


def test_bench_train_counts_the_same_tokens_in_both_arms(tmp_path):
    tiny = bench_train.Size("tiny", 8, 12, 12, 6, 4)
    text = bench_train.run(tmp_path, sizes=(tiny,), levels=("L1", "L5F"), repeats=1)
    assert [line.split("|")[1].split(",")[0].strip()
            for line in text.splitlines()[2:]] == ["L1", "L5F"]
    stored = json.loads((tmp_path / "ratios.json").read_text())
    assert [one["target"] for one in stored["ratios"]] == [0.9, 0.9]
    fact = stored["facts"]["L5F, tiny"]
    assert fact["tokens"] > 0 and fact["tokens_per_s"] > 0 and fact["bare_tokens_per_s"] > 0
