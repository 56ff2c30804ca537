"""Views by other cameras: what they show, what is asked of them, and that plain clips stay as they
are."""

from functools import partial

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from studies.embedded_pair import corpus, views
from studies.embedded_pair import models as embedded
from studies.embedded_pair import recipe as step
from studies.embedded_pair import stages as training
from xsd.models import handle as handles

view_settings = {
    "zoom": st.floats(1.15, 1.8), "roll_degrees": st.floats(-8, 8), "right": st.floats(-1, 1),
    "down": st.floats(-1, 1), "gain": st.floats(0.5, 1.05),
}


@given(st.builds(views.View, **view_settings), st.sampled_from([24, 96]))
def test_a_view_lies_inside_the_picture_and_is_as_much_nearer_as_it_says(view, size):
    row, column = view.places(size)
    y, x = np.meshgrid(*[np.linspace(-1, 1, size) * (size - 1) / 2 / view.zoom] * 2, indexing="ij")
    angle = np.radians(view.roll_degrees)
    middle_row, middle_column = (place[[0, -1]][:, [0, -1]].mean() for place in (row, column))
    np.testing.assert_allclose(row, middle_row + x * np.sin(angle) + y * np.cos(angle),
                               atol=1e-6)  # nothing was clipped
    np.testing.assert_allclose(column, middle_column + x * np.cos(angle) - y * np.sin(angle),
                               atol=1e-6)


def test_the_plain_view_is_the_grey_picture():
    pictures = np.random.default_rng(0).integers(0, 256, (2, 96, 96, 3), dtype=np.uint8)
    codes = np.random.default_rng(1).integers(0, 700, (2, 24, 24)).astype(np.uint16)
    plain = views.View(1.0, 0.0, 0.0, 0.0, 1.0)
    seen = plain.of_pictures(pictures)
    assert np.abs(seen[..., 0] - pictures @ np.array([0.299, 0.587, 0.114])).max() <= 0.51 and (
        seen[..., 0] == seen[..., 2]).all()
    assert np.array_equal(plain.of_layout(codes), codes)
    assert abs(
        float(views.View(1.0, 0.0, 0.0, 0.0, 0.5).of_pictures(pictures).mean()) /
        float(seen.mean()) - 0.5) < 0.01


@given(st.builds(views.View, **view_settings | {"gain": st.just(1.0)}))
def test_picture_and_layout_are_seen_from_the_same_place(view):
    codes = np.zeros((1, 24, 24), np.uint16)
    codes[0, 6:18, 4:14] = 5
    pictures = np.repeat(np.kron(codes, np.ones((4, 4), np.uint16))[..., None] * 40, 3,
                         axis=-1).astype(np.uint8)
    bright = view.of_pictures(pictures)[0, 2::4, 2::4, 0] > 100
    assert (bright == (view.of_layout(codes)[0]
                       > 0)).mean() > 0.9  # cells on the square's edge may fall either way


@pytest.fixture(scope="module")
def drives(tmp_path_factory):
    return corpus.build(tmp_path_factory.mktemp("corpus"), split="train", n_sequences=5, seed=4)


def test_views_stand_behind_the_clips_and_are_the_same_each_time(drives):
    material = views.with_views(drives, share=0.5, seed=3)
    assert len(material.images) == len(material.layout) == len(material.labels) == len(
        material.colour_known) == 30
    rows = np.array([2, 20, 7, 29])
    images = material.images[rows]
    assert images.shape == (4, *drives.video.shape[1:]) and np.array_equal(
        images,
        views.with_views(drives, share=0.5, seed=3).images[rows])
    assert np.array_equal(images[0], drives.video[2]) and np.array_equal(
        material.layout[rows][2], drives.layout[7, :8])
    assert (images[1][..., 0] == images[1][..., 1]).all() and not material.colour_known[20:].any()


def test_a_view_is_asked_only_what_does_not_depend_on_the_camera(drives):
    material = views.with_views(drives, share=1.0, seed=0)
    names = list(corpus.LABELS)
    asked = {
        name for name, column in zip(names, material.labels[20:].T, strict=True)
        if (column >= 0).any()
    }
    assert asked == {"time", "ego"}
    motions = {
        corpus.LABELS["ego"][code] for code in material.labels[20:, names.index("ego")] if code >= 0
    }
    assert motions <= {"stopped", "left", "right"}
    kinds = {dialogue.question for row in material.dialogues[20:] for dialogue in row}
    assert kinds == {"What time of day is it?", "How is the camera moving?"}
    assert not any(dialogue.whole for row in material.dialogues[20:] for dialogue in row)
    assert all(dialogue.whole for row in material.dialogues[:20] for dialogue in row)


def test_an_answer_that_goes_on_does_not_end_in_eos(drives):
    material = views.with_views(drives, share=1.0, seed=0)
    words = embedded.train_tokenizer(step.training_texts(drives))
    tokenizer = embedded.verifier_tokenizer(words)
    config = embedded.new_verifier(len(words), seed=0, layers=1).config
    assert tokenizer.convert_tokens_to_ids(["<pad>", "<image>", "<video>"]) == [
        config.text_config.pad_token_id, config.image_token_id, config.video_token_id]
    rows = training.segments_of(tokenizer, partial(handles.prompt_ids, "verifier"),
                                material.dialogues, eos=words.eos_token_id, fact_weight=3.0)
    whole, cut = rows[0][0], rows[20][0]
    assert whole.answer[-1] == words.eos_token_id and words.eos_token_id not in cut.answer
    assert cut.weight[-1] == 3.0 and len(cut.weight) == len(cut.answer)
    time_answers = [
        segment for clip in rows[:20] for segment in clip if segment.question == cut.question
    ]
    assert any(segment.answer[:len(cut.answer)] == cut.answer
               for segment in time_answers)  # the same words begin a whole answer
