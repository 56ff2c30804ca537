"""A handle equals transformers' own forward and generate, one at a time and in batches."""

import dataclasses
import functools

import numpy as np
import pytest
import torch
from models_fixtures import tiny_pair
from tiny_pair import make_samples
from transformers import AutoTokenizer, VideoLlavaForConditionalGeneration

from xsd import core
from xsd.decode import autoregressive
from xsd.models import handle as handles
from xsd.models import loading

SAMPLES = make_samples(6, seed=1)
ROLES = pytest.mark.parametrize("role", ["drafter", "verifier"])


@functools.lru_cache
def handle_of(role, steps="auto"):
    own = getattr(tiny_pair(), role)
    return own if steps == "auto" else own.plain(steps)


@pytest.fixture(params=["auto", "plain", "static"])
def steps(request):
    """How a handle's extend runs: what holds of one kind of steps holds of all."""
    return request.param


def transformers_ids(handle, sample, n, eos):
    """What a user of transformers would get: its own generate on ids and pixels."""
    before, after = handle.prompt_ids(sample.question)
    if handle.role == "drafter":
        ids, extra = torch.tensor([[*before, -200, *after]
                                   ]), {"event_pixels": handle.pixels(sample.event_frames)[None]}
        cut = 0
    else:
        n_video = 8 * 5
        ids = torch.tensor([[*before, *[handle.model.config.video_token_id] * n_video, *after]])
        extra, cut = {"pixel_values_videos": handle.pixels(sample.video)[None]}, ids.shape[1]
    out = handle.model.generate(ids, max_new_tokens=n, do_sample=False, eos_token_id=eos,
                                pad_token_id=0, **extra)
    return out[0, cut:].tolist()


@ROLES
def test_it_is_a_decoder_handle(role, steps):
    handle = handle_of(role, steps)
    assert isinstance(handle, core.DecoderHandle)
    assert handle.hidden_size == 32 and handle.eos_token_ids == frozenset({2})
    assert handle.draft_vocab_size == 400 and handle.vocab_size == (400
                                                                    if role == "drafter" else 464)


@ROLES
def test_generated_ids_equal_transformers_generate(role):
    handle = handle_of(role)
    for sample, answer in zip(SAMPLES, handle.generate(SAMPLES, 10), strict=True):
        assert answer.ids.tolist() == transformers_ids(handle, sample, 10, eos=2)


@torch.no_grad()
def test_verifier_logits_equal_the_whole_models_forward():
    handle = handle_of("verifier")
    before, after = handle.prompt_ids(SAMPLES[0].question)
    ids = torch.tensor([[*before, *[handle.model.config.video_token_id] * 40, *after]])
    output = handle.model(input_ids=ids, pixel_values_videos=handle.pixels(SAMPLES[0].video)[None],
                          output_hidden_states=True)
    state = handle.prefill(SAMPLES[0])
    assert state.length == ids.shape[1]
    torch.testing.assert_close(state.logits, output.logits[0, -1], atol=2e-5, rtol=0)
    torch.testing.assert_close(state.hidden, output.hidden_states[-1][0, -1], atol=2e-5, rtol=0)


@ROLES
def test_batched_ids_equal_one_at_a_time(role):
    handle = handle_of(role)
    done = []
    batched = handle.generate(SAMPLES, 12, batch_size=4, progress=done.append)
    assert done == [4, 2]
    for sample, answer in zip(SAMPLES, batched, strict=True):
        alone = handle.generate([sample], 12)[0]
        assert torch.equal(answer.ids, alone.ids) and answer.finish == alone.finish
        torch.testing.assert_close(answer.hidden, alone.hidden, atol=5e-5, rtol=0)
        assert torch.equal(handle.lm_head(answer.hidden).argmax(-1), answer.ids)


@ROLES
def test_rows_stop_at_their_own_eos(role):
    handle = handle_of(role)
    free = handle.generate(SAMPLES, 12)
    eos = int(free[0].ids[3])
    handle.eos_token_ids = frozenset({eos})
    try:
        answers = handle.generate(SAMPLES, 12)
        expected = [transformers_ids(handle, sample, 12, eos) for sample in SAMPLES]
    finally:
        handle.eos_token_ids = frozenset({2})
    assert answers[0].finish == "eos" and answers[0].ids[-1] == eos
    for answer, ids in zip(answers, expected, strict=True):
        assert answer.ids.tolist() == ids and len(answer.hidden) == len(ids)


@ROLES
def test_extend_follows_the_greedy_answer(role, steps):
    handle = handle_of(role, steps)
    answer = handle.generate([SAMPLES[1]], 8)[0]
    state = handle.prefill(SAMPLES[1])
    start = state.length
    assert int(state.logits.argmax()) == int(answer.ids[0])
    hidden, logits = handle.extend(state, answer.ids[:5])
    assert state.length == start + 5 and logits.shape == (5, handle.vocab_size)
    assert torch.equal(logits.argmax(-1), answer.ids[1:6])
    torch.testing.assert_close(hidden, answer.hidden[1:6], atol=5e-5, rtol=0)
    assert torch.equal(state.hidden, hidden[-1]) and torch.equal(state.logits, logits[-1])


@ROLES
def test_rollback_forgets_rejected_tokens(role, steps):
    handle = handle_of(role, steps)
    answer = handle.generate([SAMPLES[2]], 8)[0]
    state = handle.prefill(SAMPLES[2])
    start = state.length
    handle.extend(state, torch.tensor([*answer.ids[:2].tolist(), 7, 8, 9]))
    handle.rollback(state, start + 2)
    assert state.length == start + 2 and state.cache.get_seq_length() == start + 2
    _, logits = handle.extend(state, answer.ids[2:4])
    assert logits.argmax(-1).tolist() == answer.ids[3:5].tolist()
    handle.rollback(state, state.length)
    assert state.length == start + 4
    with pytest.raises(ValueError, match="the cache holds"):
        handle.rollback(state, state.length + 1)


@ROLES
def test_forced_states_are_the_greedy_states_on_its_own_answer(role):
    handle = handle_of(role)
    answers = handle.generate(SAMPLES, 9)
    ragged = [answer.ids[:3 + row] for row, answer in enumerate(answers)]
    for answer, ids, forced in zip(answers, ragged, handle.force(SAMPLES, ragged, batch_size=4),
                                   strict=True):
        assert torch.equal(forced.ids, ids)
        torch.testing.assert_close(forced.hidden, answer.hidden[:len(ids)], atol=5e-5, rtol=0)


@ROLES
def test_forced_states_follow_the_other_models_prefix(role, steps):
    handle = handle_of(role, steps)
    foreign = torch.tensor([5, 300, 17, 290])
    forced = handle.force([SAMPLES[0]], [foreign])[0]
    state = handle.prefill(SAMPLES[0])
    expected = [state.hidden]
    for token in foreign[:-1]:
        expected.append(handle.extend(state, token[None])[0][0])
    torch.testing.assert_close(forced.hidden, torch.stack(expected), atol=5e-5, rtol=0)


def test_ten_questions_on_a_clip_run_the_tower_once(monkeypatch):
    handle = handle_of("verifier")
    handle._vision.clear()
    calls = []
    encode = handle._encode_images
    monkeypatch.setattr(handle, "_encode_images", lambda images: calls.append(1) or encode(images))
    clip = SAMPLES[0]
    same_clip = [
        dataclasses.replace(clip, question=f"What is {word}?") for word in ("ahead", "left", "red")
    ]
    handle.generate(same_clip, 2)
    assert len(calls) == 1
    handle.prefill(clip)
    handle.prefill(clip)
    assert len(calls) == 3  # prefill is what gets timed: it never reuses
    handle.generate([dataclasses.replace(clip, video=255 - clip.video)], 1)
    assert len(calls) == 4  # same name, other pixels


@ROLES
def test_questions_on_one_clip_share_its_prefill(role, monkeypatch):
    handle = handle_of(role)
    answers = handle.generate(SAMPLES, 8)
    fed = []
    forward = handle.decoder.forward
    monkeypatch.setattr(
        handle.decoder, "forward",
        lambda **inputs: fed.append(inputs["inputs_embeds"].shape[:2]) or forward(**inputs))
    batched = handle.force(SAMPLES, [answer.ids for answer in answers], batch_size=6)
    before, _ = handle.prompt_ids(SAMPLES[0].question)
    n_visual = len(handle.visual_tokens(SAMPLES[0]))
    assert fed[0] == (2, len(before) + n_visual)  # six questions on two clips
    assert fed[1][0] == 6 and fed[1][1] < len(before) + n_visual
    for sample, answer, forced in zip(SAMPLES, answers, batched, strict=True):
        alone = handle.force([sample], [answer.ids])[0]
        torch.testing.assert_close(forced.hidden, alone.hidden, atol=5e-5, rtol=0)
        assert torch.equal(forced.ids, answer.ids)


def test_clips_of_one_and_five_frames_go_in_one_batch():
    handle = handle_of("drafter")
    mixed = [
        *SAMPLES[:3],
        dataclasses.replace(SAMPLES[0], event_frames=SAMPLES[0].event_frames[:1])
    ]
    for sample, answer in zip(mixed, handle.generate(mixed, 6), strict=True):
        assert torch.equal(answer.ids, handle.generate([sample], 6)[0].ids)


def test_empty_input_is_refused_with_a_sentence():
    pair = tiny_pair()
    with pytest.raises(core.DatasetError, match="a question has zero length"):
        pair.drafter.prefill(dataclasses.replace(SAMPLES[0], question="  "))
    for question in ("What is <image>?", "Is this <video> new?", "<ev_start> What?", "\ud83d?"):
        for handle in (pair.drafter, pair.verifier):
            with pytest.raises(core.DatasetError, match="holds a placeholder of pictures"):
                handle.prefill(dataclasses.replace(SAMPLES[0], question=question))
    with pytest.raises(core.DatasetError, match="has no event frame"):
        pair.drafter.prefill(dataclasses.replace(SAMPLES[0], event_frames=[]))
    with pytest.raises(core.VideoError, match="has no video frame"):
        pair.verifier.prefill(
            dataclasses.replace(SAMPLES[0], video=np.zeros((0, 4, 4, 3), np.uint8)))
    with pytest.raises(ValueError, match="one answer for each sample"):
        pair.drafter.force(SAMPLES, [])


def with_positions(role, most, steps="plain"):
    """A handle whose model has so many positions, and prompts of the tests' questions in it."""
    handle = handle_of(role).plain(steps)
    handle.max_positions = most
    return handle


@ROLES
def test_an_answer_that_reaches_the_last_position_gets_one_sentence_everywhere(role, steps):
    sample, own = SAMPLES[0], handle_of(role)
    length = own.prefill(sample).length
    handle = with_positions(role, length + 4, steps)
    handle.eos_token_ids = own.eos_token_ids - {2}  # nothing ends it
    sentence = (f"prompt and answer need {length + 5} positions, but the {role} has {length + 4} ")
    whole = autoregressive.generate(handle, sample, 5)
    assert handle.generate([sample], 5)[0].ids.tolist() == list(whole.ids)
    said = torch.tensor([*whole.ids, 7])
    assert len(handle.force([sample], [said[:5]])[0].ids) == 5
    with pytest.raises(core.ParameterError, match=sentence):
        autoregressive.generate(handle, sample, 6)
    with pytest.raises(core.ParameterError, match=sentence):
        handle.generate(SAMPLES[:2], 6)
    with pytest.raises(core.ParameterError, match=sentence):
        handle.force([sample], [said])


@ROLES
def test_a_prompt_beyond_the_positions_is_refused_before_the_tower_runs(role, monkeypatch):
    handle = with_positions(role, 64)
    monkeypatch.setattr(handle, "_encode_images", lambda images: pytest.fail("the tower ran"))
    for question, sentence in (("word " * 500, r"need \d+ positions, but the .* has 64 "),
                               ("x" * 200_000, "200000 characters is longer than the 64 pos")):
        sample = dataclasses.replace(SAMPLES[0], question=question)
        for ask in (handle.prefill, lambda one: handle.generate([one], 2),
                    lambda one: handle.force([one, one], [torch.tensor([5])] * 2)):
            with pytest.raises(core.ParameterError, match=sentence):
                ask(sample)
    with pytest.raises(core.ParameterError, match=r"need \d+ positions"):
        with_positions(role, len(handle_of(role).prompt_ids("What?")[0]) + 20).prefill(SAMPLES[0])


@ROLES
def test_logits_that_are_no_numbers_are_said(role, steps, monkeypatch):
    handle = handle_of(role).plain(steps)
    monkeypatch.setattr(handle, "lm_head", lambda hidden: hidden.new_full((*hidden.shape[:-1], 9),
                                                                          float("nan")))
    for answer in (lambda: handle.generate(SAMPLES[:1], 2), lambda: autoregressive.generate(
            handle, SAMPLES[0], 2), lambda: handle.force(SAMPLES[:1], [torch.tensor([5, 6])])):
        with pytest.raises(core.CheckpointError, match=f"the {role} gives NaN or infinity .* load "
                                                       "it with --dtype float32 or bfloat16"):
            answer()


def test_one_frame_or_five_change_the_prompt_length():
    five, one = SAMPLES[0], dataclasses.replace(SAMPLES[0],
                                                event_frames=SAMPLES[0].event_frames[:1])
    handle = handle_of("drafter")
    assert handle.prefill(five).length - handle.prefill(one).length == 4


def test_both_prompts_have_one_bos_and_the_questions_own_words():
    pair = tiny_pair()
    for handle in (pair.drafter, pair.verifier):
        before, after = handles.prompt_ids(handle.role, handle.tokenizer, "What is on the road?")
        assert before[0] == 1 and (before + after).count(1) == 1
        assert "What is on the road? ASSISTANT:" in handle.text(after)
    assert pair.verifier.tokenizer.convert_tokens_to_ids("<video>") not in before + after


def test_text_and_token_text_round_trip():
    handle = handle_of("drafter")
    ids = handle.tokenizer("the car\n", add_special_tokens=False).input_ids
    assert handle.text(ids) == "the car\n" and 1 not in ids
    assert "".join(handle.token_text(i) for i in ids) == " the car\n"


def test_weights_hash_tells_models_apart():
    pair = tiny_pair()
    assert len(pair.drafter.weights_hash()) == 64
    assert pair.drafter.weights_hash() == pair.drafter.weights_hash() != pair.verifier.weights_hash(
    )


def test_the_shipped_verifier_works_with_plain_transformers():
    folder = loading.EMBEDDED / "verifier"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = VideoLlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    config = model.config
    assert tokenizer.convert_tokens_to_ids(["<pad>", "<image>", "<video>"]) == [
        config.text_config.pad_token_id, config.image_token_id, config.video_token_id]
    assert model.generation_config.pad_token_id == tokenizer.pad_token_id
    sample = SAMPLES[0]
    handle = loading.load_verifier(folder)
    videos = tokenizer.decode(config.video_token_id) * config.video_seq_length
    ids = tokenizer(f"USER: {videos}\n{sample.question} ASSISTANT:", return_tensors="pt").input_ids
    said = model.generate(ids, pixel_values_videos=handle.pixels(sample.video)[None],
                          max_new_tokens=24, do_sample=False)
    assert said[0, ids.shape[1]:].tolist() == handle.generate([sample], 24)[0].ids.tolist()
