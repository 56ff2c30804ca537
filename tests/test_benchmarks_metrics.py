"""What ``xsd bench metrics`` measures, at toy sizes; no speed is asserted."""

import json

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import metrics as bench_metrics
from benchmarks import states
from xsd.core import Batch
from xsd.evaluate import drafting
from xsd.evaluate.kernels import head_tokens

SMALL = bench_metrics.Sizes(n_samples=8, full=20, positions=4, width=32, batch=4, vocabulary=50,
                            head_samples=2, vocabularies=(64, 128), memory_rows=8, loop_positions=6,
                            resamples=50, repeats=1,
                            )


def test_the_table_names_every_comparison_and_the_file_holds_the_facts(tmp_path):
    text = bench_metrics.run(tmp_path, SMALL)
    assert all(name in text for name in ("read and sum as float32", "plain loop",
                                         "bare matrix product", "Bootstrap, 50 resamples"))
    saved = json.loads((tmp_path / "ratios.json").read_text())
    assert [row["target"] for row in saved["ratios"]] == [0.5, None, 100, None, 0.7]
    assert saved["facts"]["full_pass_samples"] == 20 and set(
        saved["facts"]["peak_memory_of_the_head_mb"]) == {"64", "128"}


def test_the_streamed_pass_measures_what_the_plain_loop_defines(tmp_path):
    file = states.StateFile(tmp_path / "states.bin", (4, 4, 32), 8)
    assert file.n_samples == 8 and file.n_bytes == file.path.stat().st_size
    values = bench_metrics.hidden_pass(file).reshape(-1)
    batches = [torch.from_numpy(buffer.copy()).view(torch.bfloat16) for buffer in file.batches()]
    plain = [
        value for batch in batches
        for value in states.plain_loop(*batch.reshape(2, -1, 32).tolist())
    ]
    assert values.tolist() == pytest.approx(plain, abs=1e-6)
    assert states.loop_of_tensors(*batches[0].reshape(2, -1, 32)) == pytest.approx(
        plain[:16], abs=1e-5)
    assert states.read_and_sum(file) == pytest.approx(
        sum(float(batch.double().sum()) for batch in batches), abs=1e-2)
    assert states.read_and_sum_words(file) == sum(
        int(batch.view(torch.int64).sum()) for batch in batches)
    assert len(bench_metrics.hidden_pass(file, 5)) == 20  # the file again from its start


def test_the_file_is_sized_to_the_machine():
    sizes = bench_metrics.Sizes()
    one = 4 * 50 * 4096
    assert bench_metrics.n_samples_for(8 * 100 * one, sizes) == 96  # whole batches of 16
    assert bench_metrics.n_samples_for(0, sizes) == 64 and bench_metrics.n_samples_for(None,
                                                                                       sizes) == 640


class LargestTensor(TorchDispatchMode):
    """Bytes of the largest tensor that an operation made anew."""
    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        given = {x.untyped_storage().data_ptr() for x in args if isinstance(x, torch.Tensor)}
        for x in made if isinstance(made, (tuple, list)) else [made]:
            if isinstance(x, torch.Tensor) and x.untyped_storage().data_ptr() not in given:
                self.bytes = max(self.bytes, x.untyped_storage().nbytes())
        return made


def largest(vocabulary, dtype=torch.float32):
    weight, states = torch.randn(vocabulary, 16).to(dtype), torch.randn(40, 16)
    with LargestTensor() as count:
        head_tokens(states, weight, top_k=5, targets=torch.zeros(40, dtype=torch.int64), chunk=64,
                    rows=32)
    return count.bytes


def test_memory_of_the_head_pass_does_not_grow_with_the_vocabulary():
    assert largest(128) == largest(1_000) == largest(20_000) <= 32 * (64 + 5) * 8
    assert largest(1_000,
                   torch.bfloat16) == largest(20_000,
                                              torch.bfloat16)  # converted chunk by chunk, too


def test_what_the_table_keeps_of_states_does_not_grow_with_the_vocabulary_either():
    class Identity:
        shift = 0

        def align(self, batch):
            return batch.drafter, batch.verifier, batch.ids_by_verifier, batch.mask

    def growth(vocabulary):
        states, mask = torch.randn(4, 10, 16), torch.ones(4, 10, dtype=torch.bool)
        with LargestTensor() as count:
            ids = torch.zeros(4, 10, dtype=torch.int64)
            batch = Batch(states, states, ids, ids, mask, list("abcd"), range(4), "teacher_forced")
            drafting.one_step(Identity(), batch, torch.ones(vocabulary, 16), top_k=5)
        # the head itself was made inside, and is the largest
        return count.bytes - 4 * 16 * vocabulary

    assert growth(20_000) == growth(80_000) == 0
