"""Passes over keys and values that stay in place compute what transformers' own decoder computes on
a cache that grows, whatever was rolled back, outgrown or set aside meanwhile."""

import pytest
import torch
from models_fixtures import tiny_pair
from tiny_pair import make_samples, make_tiny_pair, tiny_tokenizer
from transformers import DynamicCache, LlamaConfig, LlamaModel

from xsd.core import ParameterError
from xsd.decode import autoregressive, speculative
from xsd.models import loading, static_steps
from xsd.models.eventgpt import EventGPTConfig, EventGPTForCausalLM
from xsd.models.handle import ModelHandle
from xsd.models.pixels import PixelSpec

SAMPLE, OTHER, THIRD = make_samples(3, seed=3)
WITHOUT_GPU = pytest.mark.skipif(not torch.cuda.is_available(),
                                 reason="CUDA graphs need a GPU that torch sees; there is none")


def decoder_of(**options):
    torch.manual_seed(0)
    return LlamaModel(
        LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                    num_attention_heads=4, initializer_range=0.3, **options)).eval()


def prefilled(decoder, n):
    cache = DynamicCache(config=decoder.config)
    decoder(inputs_embeds=torch.randn(1, n, 32), past_key_values=cache, use_cache=True)
    return cache


@pytest.mark.parametrize("heads", [4, 2, 1], ids=["all", "grouped", "one"])
@torch.no_grad()
def test_states_equal_the_growing_caches_through_every_width_and_rollback(heads):
    decoder = decoder_of(num_key_value_heads=heads)
    grown = prefilled(decoder, 7)
    steps = static_steps.Steps(decoder)
    held = steps.take(prefilled_copy(grown, decoder))
    for rows, keep in ((1, 1), (3, 0), (6, 2), (64, 5), (90, 90), (300, 7), (2, 2)):
        embeds = torch.randn(rows, 32)
        own = steps(embeds, held)
        theirs = decoder(inputs_embeds=embeds[None], past_key_values=grown,
                         use_cache=True).last_hidden_state[0]
        torch.testing.assert_close(own, theirs, atol=2e-5, rtol=0)
        held.crop(keep - rows)
        if keep < rows:
            grown.crop(keep - rows)
        assert held.get_seq_length() == grown.get_seq_length()
    assert steps.uncaptured == "there are graphs on CUDA only"


def prefilled_copy(cache, decoder):
    copy = DynamicCache(config=decoder.config)
    for index, layer in enumerate(cache.layers):
        copy.update(layer.keys.clone(), layer.values.clone(), index)
    return copy


def test_more_sequences_than_rooms_do_not_disturb_each_other():
    """Four alive at once, used in turn, one of them outgrows every room."""
    plain = tiny_pair().verifier.plain()
    handle = plain.plain("static")
    samples = [SAMPLE, OTHER, THIRD, SAMPLE]
    own, theirs = ([one.prefill(sample) for sample in samples] for one in (handle, plain))
    for turn in range(3):
        for number, (mine, other) in enumerate(zip(own, theirs, strict=True)):
            ids = torch.full((90 if (turn, number) == (1, 2) else 3,), 5 + turn)
            torch.testing.assert_close(
                handle.extend(mine, ids)[1],
                plain.extend(other, ids)[1], atol=2e-4, rtol=0)
            for each, state in ((handle, mine), (plain, other)):
                each.rollback(state, state.length - 1)
    assert len(handle._arranged._rooms) == 2


def test_a_sequence_that_nobody_holds_leaves_its_room():
    handle = tiny_pair().drafter.plain("static")
    rooms = []
    for sample in (SAMPLE, OTHER, THIRD):
        state = handle.prefill(sample)
        handle.extend(state, torch.tensor([5]))
        rooms.append(state.cache.room)
        del state
    assert len(handle._arranged._rooms) == 1 and len(set(map(id, rooms))) == 1


@pytest.mark.parametrize("first", [torch.no_grad, torch.inference_mode])
def test_steps_made_in_inference_mode_work_outside_of_it_and_the_other_way(first):
    handle = tiny_pair().verifier.plain("static")
    own = autoregressive.generate(tiny_pair().verifier, SAMPLE, 8).ids
    for mode in (first, torch.inference_mode, torch.no_grad):
        with mode():
            state = handle.prefill(SAMPLE)
            assert handle.extend(state,
                                 torch.tensor(own[:4]))[1].argmax(-1).tolist() == list(own[1:5])


def test_tied_heads_and_grouped_attention_go_through_a_handle():
    torch.manual_seed(0)
    vision = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
                  image_size=28, patch_size=14, projection_dim=16)
    model = EventGPTForCausalLM(
        EventGPTConfig(vocab_size=400, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                       num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True,
                       initializer_range=0.3, max_position_embeddings=512, vision_config=vision))
    assert model.lm_head.weight is model.get_input_embeddings().weight
    made = ModelHandle(model, tiny_tokenizer(), "drafter", PixelSpec(28, 28), draft_vocab_size=400)
    assert made.steps == "small"
    plain = autoregressive.generate(made.plain(), SAMPLE, 12).ids
    assert autoregressive.generate(made.plain("static"), SAMPLE, 12).ids == plain
    assert autoregressive.generate(made, SAMPLE, 12).ids == plain


def test_four_bits_take_the_same_steps(tmp_path):
    folder = make_tiny_pair(tmp_path, hidden_size=64) / "verifier"
    handle = loading.load_verifier(folder, quant="4bit")
    assert autoregressive.generate(handle.plain("static"), SAMPLE,
                                   8).ids == (autoregressive.generate(handle, SAMPLE, 8).ids)


def test_a_replaced_weight_is_noticed():
    decoder = decoder_of()
    steps = static_steps.Steps(decoder)
    assert steps.current()
    decoder.norm.weight = torch.nn.Parameter(decoder.norm.weight.detach() * 2)
    assert not steps.current()


def test_what_does_not_fit_is_said():
    handle = tiny_pair().verifier
    assert handle.steps_in_words() == "small"
    assert handle.plain("static").steps_in_words() == (
        "static, uncaptured: there are graphs on CUDA only")
    with pytest.raises(ParameterError, match=r"steps=.fast. do not fit .*plain, small and static"):
        handle.plain("fast")
    eager = decoder_of(attn_implementation="eager")
    assert static_steps.why_not(eager) == "its attention is 'eager', not sdpa"
    window = decoder_of()
    window.config.sliding_window = 8
    assert "StaticSlidingWindowLayer" in static_steps.why_not(window)


def test_what_nan_left_behind_does_not_reach_the_next_request():
    handle = tiny_pair().verifier.plain("static")
    whole = autoregressive.generate(handle, SAMPLE, 6).ids
    for layer in handle._arranged._rooms[0].cache.layers:
        layer.values.fill_(float("nan"))
    assert autoregressive.generate(handle, SAMPLE, 6).ids == whole


def test_partly_right_drafts_are_lossless():
    handle = tiny_pair().verifier.plain("static")
    own = autoregressive.generate(tiny_pair().verifier.plain(), SAMPLE, 16)

    class Script:
        """Right for 0 … 4 tokens, then wrong."""
        needs_verifier = False

        def begin(self, sample, timeline=None):
            self.known, self.calls = [], 0

        def propose(self, n, stop=lambda: False):
            self.calls += 1
            at = len(self.known)
            right = list(own.ids[at:at + self.calls % 5])
            return [*right, *[(own.ids[0] + 1) % 300] * (n - len(right))][:n]

        def observe(self, tokens, hidden):
            self.known += tokens

    got = speculative.generate(handle, Script(), SAMPLE, gamma=4, max_new_tokens=16,
                               overlap="serial")
    assert got.ids == own.ids


def on_a_pretended_gpu(monkeypatch, capture):
    """A handle whose passes are "captured" by a function of ours: what is around it is real."""
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: None)
    monkeypatch.setattr(static_steps._Pass, "capture", capture)
    handle = tiny_pair().verifier.plain("static")
    handle.prefill(SAMPLE)
    handle._arranged.uncaptured = ""
    return handle


def test_every_width_is_captured_once_and_serves_all_requests(monkeypatch):
    captured = []

    def capture(one, length, stream, pool):
        class Graph:
            def replay(self):
                one._hidden = one._forward()

        captured.append(one.rows)
        one.graph = Graph()

    handle = on_a_pretended_gpu(monkeypatch, capture)
    plain = tiny_pair().verifier.plain()
    for sample in (SAMPLE, OTHER):
        own, theirs = handle.prefill(sample), plain.prefill(sample)
        for rows in (1, 6, 3, 90):
            ids = torch.full((rows,), 7)
            torch.testing.assert_close(
                handle.extend(own, ids)[1],
                plain.extend(theirs, ids)[1], atol=2e-4, rtol=0)
        del own  # else the next one would be given the second room, with passes of its own
    assert captured == [1, 2, 4, 6]
    assert handle.steps_in_words() == "static, captured"


def test_where_capture_fails_the_steps_go_on_and_say_so(monkeypatch):
    def capture(one, length, stream, pool):
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    handle = on_a_pretended_gpu(monkeypatch, capture)
    own = autoregressive.generate(tiny_pair().verifier, SAMPLE, 8).ids
    with pytest.warns(UserWarning, match=r"cannot be captured .*\(operation not permitted when"):
        assert autoregressive.generate(handle, SAMPLE, 8).ids == own
    assert "uncaptured: operation not permitted" in handle.steps_in_words()


@WITHOUT_GPU
@pytest.mark.parametrize("quant", [None, "4bit"])
def test_captured_passes_equal_the_eager_ones(tmp_path, quant):
    folder = make_tiny_pair(tmp_path, hidden_size=64) / "verifier"
    handle = loading.load_verifier(folder, device="cuda", quant=quant)
    assert handle.steps == "static"
    plain = handle.plain()
    for sample in (SAMPLE, OTHER):
        own, theirs = handle.prefill(sample), plain.prefill(sample)
        for rows, keep in ((1, 1), (6, 2), (3, 0), (16, 5), (90, 90), (6, 6)):
            ids = torch.randint(3, 300, (rows,), device="cuda")
            torch.testing.assert_close(
                handle.extend(own, ids)[1],
                plain.extend(theirs, ids)[1], atol=1e-3, rtol=0)
            for each, state in ((handle, own), (plain, theirs)):
                each.rollback(state, state.length - rows + keep)
    assert handle.steps_in_words() == "static, captured"


@WITHOUT_GPU
def test_eight_bits_stay_with_transformers_own_passes(tmp_path):
    folder = make_tiny_pair(tmp_path, hidden_size=64) / "verifier"
    handle = loading.load_verifier(folder, device="cuda", dtype="float16", quant="8bit")
    assert handle.steps == "plain"
    assert "outliers" in handle.plain("static").steps_in_words()
