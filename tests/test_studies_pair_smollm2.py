"""The pair on a public decoder, with a tiny one in its place: what is trained begins as the
embedded pair, resumes, is kept alone, and comes back as two whole checkpoints that decode."""

from dataclasses import replace

import pytest
import torch
from tiny_base import make_base
from tiny_pair import make_samples

from studies.embedded_pair import prose, recipe, smollm2
from xsd.decode import autoregressive, proposers, speculative, tracks
from xsd.embedded import language
from xsd.files import sha256_of
from xsd.models import base, loading

PLAN = recipe.PROFILES["smollm2"]
TINY = replace(
    PLAN, n_sequences=2, drafter_layers=2,
    reading={role: replace(one, steps=2, batch_size=2, save_every=1)
             for role, one in PLAN.reading.items()},
    language={role: replace(one, steps=3, batch_size=1, questions_per_clip=2, save_every=1)
              for role, one in PLAN.language.items()})


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder, and the pair that was trained in it after a training that was cut short."""
    patch, folder = pytest.MonkeyPatch(), tmp_path_factory.mktemp("smollm2")
    patch.setenv("XSD_SMOLLM2", str(make_base(folder / "base")))
    patch.setenv("XSD_CACHE", str(folder / "cache"))
    patch.setitem(recipe.PROFILES, "smollm2", TINY)

    def stop(stage, step, total, loss):
        if (stage, step) == ("verifier language", 2):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        recipe.train(folder / "run", "smollm2", workers=1, progress=stop)
    yield folder, recipe.train(folder / "run", "smollm2", workers=1)
    patch.undo()


def test_a_resumed_training_ends_in_the_same_bytes(made):
    folder, pair = made
    (folder / "again").mkdir()
    (folder / "again" / "corpus").symlink_to(folder / "run" / "corpus")
    again = recipe.train(folder / "again", "smollm2", workers=1)
    for role in recipe.ROLES:
        assert sha256_of(pair / role / base.TUNED) == sha256_of(again / role / base.TUNED)


def test_only_what_was_trained_is_kept_and_it_loads(made):
    _, pair = made
    trained = loading.load_pair(pair)
    assert trained.name == "smollm2" and trained.draft_vocab_size == 640
    assert trained.verifier.steps == trained.drafter.steps == "small"
    assert len(trained.verifier.visual_tokens(make_samples(1)[0])) == 72
    whole = trained.folder / "verifier" / "model.safetensors"
    assert (pair / "verifier" / base.TUNED).stat().st_size < whole.stat().st_size * 2
    spoken = [trained.verifier.token_text(one) for one in trained.verifier.tokenizer(" a red van.",
              add_special_tokens=False).input_ids]
    assert "".join(spoken) == " a red van."
    assert trained.verifier.head.weight is trained.verifier.decoder.embed_tokens.weight


def test_what_comes_back_is_what_was_trained(made, monkeypatch):
    _, pair = made
    model, _ = smollm2.new_model("verifier", seed=0, layers=2)
    torch.manual_seed(3)
    for name, parameter in model.named_parameters():
        if ".lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    smollm2.save(pair.parent / "other", {"verifier": model, "drafter": smollm2.new_model(
        "drafter", seed=0, layers=2)[0]})
    back, sample = loading.load_pair(pair.parent / "other").verifier, make_samples(1)[0]
    embeds = back.prompt_embeddings(sample)[None]
    ours = model.eval().model.language_model(inputs_embeds=embeds).last_hidden_state
    theirs = back.decoder(inputs_embeds=embeds).last_hidden_state
    torch.testing.assert_close(ours, theirs, atol=0.02, rtol=0)  # kept in float16
    pixels = back.pixels(list(sample.video))
    ours = model.model.get_video_features(pixels[None], return_dict=True).pooler_output
    torch.testing.assert_close(ours.reshape(72, -1), back.visual_tokens(sample), atol=5e-3, rtol=0)


def test_decoding_on_it_is_lossless(made):
    pair = loading.load_pair(made[1])
    for sample in make_samples(3):
        own = autoregressive.generate(pair.verifier.plain(), sample, 24)
        source = proposers.DrafterTokens(tracks.DrafterTrack(pair.drafter), pair.draft_vocab_size,
                                         pair.drafter.eos_token_ids)
        drafted = speculative.generate(pair.verifier, source, sample, gamma=5, max_new_tokens=24)
        assert drafted.ids == own.ids


def test_prose_states_the_facts_and_can_be_read_back():
    facts = {"time": "dusk", "sky": "clear", "ego": "slow", "left": "towers", "right": "fields",
             "light": "red", "light_events": True, "moving": True, "grey": False,
             "vehicles": [{"kind": "van", "colour": "red", "place": "left", "motion": "approaching",
                           "distance": "near", "events": True}],
             "people": [{"kind": "cyclist", "colour": "blue", "place": "right", "motion": "away",
                         "distance": "near", "events": True}]}
    for dialect in ("verifier", "drafter"):
        answers = prose.answers(facts, dialect)
        assert list(answers) == [question.kind for question in language.questions()]
        for text in answers.values():
            assert len(text.split()) >= 40 and text[0] == " "
            assert ("kind", "van") in language.mentions(text)
    assert "colour" not in dict(language.mentions(prose.answers(facts, "drafter")["vehicles"]))
