"""What leaves is the verifier's own on every device and in every number format: the matrix, of
which a machine without a GPU runs the CPU's part and says why the rest is skipped."""

import pytest
import torch
from tiny_pair import make_samples, make_tiny_pair

from xsd.adapters import registry
from xsd.bench import arms
from xsd.decode import autoregressive, certificate, overlap
from xsd.models import loading

GPU = pytest.mark.skipif(not torch.cuda.is_available(),
                         reason="no GPU that torch sees: CUDA's part of the matrix needs one")
PLACES = [
    pytest.param("cpu", "float32", None),
    pytest.param("cpu", "bfloat16", None),
    *(pytest.param("cuda", dtype, quant, marks=GPU)
      for dtype, quant in (("float32", None), ("bfloat16", None), ("float32", "4bit"),
                           ("bfloat16", "4bit"), ("float16", "8bit")))
]
KINDS = {
    "cpu": ("L5F",), "cuda": ("drafter", "prompt_lookup", "L1", "L4", "B1", "L5F", "L1+L5F",
                              "hf_generate", "hf_prompt_lookup")
}
LENGTH = 12


@pytest.mark.parametrize("device,dtype,quant", PLACES)
def test_every_arm_says_what_the_verifier_says(device, dtype, quant, tmp_path):
    folder = make_tiny_pair(tmp_path, hidden_size=64)
    pair = loading.load_pair(folder, device=device, dtype=dtype, quant=quant)
    torch.manual_seed(0)
    numbers = pair.verifier.head.weight
    adapters = {
        level: registry.create_adapter(level, 64).to(numbers.device, numbers.dtype).eval()
        for level in ("L1", "L4", "B1", "L5F")
    }
    verdicts = []
    for lanes in ("threads", "serial"):
        for kind in KINDS[device]:
            arm = arms.build(kind, pair, adapters, gamma=3, overlap=lanes)
            for sample in make_samples(2):
                own = autoregressive.generate(pair.verifier, sample, LENGTH).ids
                got = arm.run(sample, LENGTH)
                verdict = certificate.certify(pair.verifier, sample, own, got.ids)
                verdicts.append((f"{kind} {lanes} on {sample.key}", verdict))
                assert all(0 <= span.start_s <= span.end_s for span in got.spans)
    certificate.require_lossless(verdicts, allow_near_ties=dtype != "float32")


def test_on_a_gpu_spans_lie_where_its_events_say(monkeypatch):
    """With events of our own: the lane's work ends long after the Python call has returned."""
    moments = iter([100.0, 103.0, 110.5])  # ms: the timeline, the span's start and its end

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.ms = next(moments)

        def synchronize(self):
            pass

        def elapsed_time(self, later):
            return later.ms - self.ms

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    timeline = overlap.Timeline()
    with timeline.span("adapter", "adapter"):
        pass
    (span,) = timeline.spans()
    assert (span.start_s, span.end_s) == (0.003, 0.0105)
