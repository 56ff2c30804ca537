"""Training of the embedded pair: the block mask, the towers' patch targets, resuming, and the whole smoke profile."""

import json

import numpy as np
import pytest
import torch

from xsd.core import ParameterError, TrainingError
from xsd.models import embedded, loading
from xsd.steps import pair as step
from xsd.train import grounding, language
from xsd.train.language import LanguageConfig, Segment


def test_a_question_sees_the_prefix_and_itself_only():
    row = language.pack([1, 5], 2, [Segment([7], [8, 2], [1, 1]), Segment([9], [4, 2], [1, 1])])
    _, positions, targets, _, seen = language.collate([row])
    assert positions[0].tolist() == [0, 1, 2, 3, 4, 5, 6, 4, 5, 6]
    assert targets[0].tolist() == [-100] * 4 + [8, 2, -100] + [4, 2, -100]
    assert not seen[0, 0, 7:, 4:7].any() and seen[0, 0, 9, :4].all() and not seen[0, 0, :4, 4:].any()


def test_packed_questions_get_the_states_they_would_get_alone():
    model = embedded.new_drafter(64, seed=0, layers=2).eval()
    parts = embedded.drafter_parts(model)
    visual = torch.randn(1, 3, embedded.HIDDEN_SIZE)
    one, two = Segment([7, 9], [8, 2], [1, 1]), Segment([11], [4, 6, 2], [1, 1, 1])

    def states(segments):
        ids, positions, _, _, seen = language.collate([language.pack([1], 3, segments)])
        x = parts.embed(ids)
        x = torch.cat([x[:, :1], visual, x[:, 4:]], dim=1)
        return parts.decode(x, torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min), positions)[0]

    together, alone = states([one, two]), states([two])
    torch.testing.assert_close(together[-4:], alone[-4:], atol=1e-5, rtol=1e-4)


def test_patch_codes_prefer_objects_over_scenery():
    cells = np.zeros((1, 1, 24, 24), np.uint16)
    cells[0, 0, :4, :4] = 8 << 6
    cells[0, 0, 0, :3] = 1 << 6 | 2 << 3 | 4
    codes = grounding.patch_codes(cells, 6)
    assert codes[0, 0, 0] == (1 << 6 | 2 << 3 | 4) and codes[0, 0, 1:].max() == 0


def test_things_are_found_in_the_columns_they_stand_in():
    cells = np.zeros((1, 2, 24, 24), np.uint16)
    cells[0, 1, 7, 4] = 5 << 6 | 1
    cells[0, 1, 9, 23] = 8 << 6
    found = grounding.things_in_columns(cells, 6).reshape(1, 2, 8, 6)
    assert found.sum() == 1 and found[0, 1, 1, 4]


def test_a_patch_reader_asks_objects_for_colour_and_motion_and_everything_for_its_kind():
    reader = grounding.PatchReader(8, 12, 6, 7)
    codes = torch.zeros(2, 4, 9, dtype=torch.int64)
    codes[0, 1, 3] = 1 << 6 | 3 << 3 | 2
    states, known = torch.randn(2, 4, 9, 8), torch.tensor([True, True])
    with torch.no_grad():
        reader.kinds.weight.zero_()
        reader.kinds.bias.zero_()
    expected = torch.tensor(12.0).log()
    for classes, code in ((reader.colours, 2), (reader.motions, 1)):
        expected = expected - classes(reader.norm(states[0, 1, 3])).log_softmax(-1)[code]
    torch.testing.assert_close(reader(states, codes, known), expected)
    assert reader(states, codes, ~known) < reader(states, codes, known)


def test_the_camera_is_read_off_the_later_frames():
    reader = language.SceneReader(8, grounding.PatchReader(8, 12, 6, 7), 3, 4)
    with torch.no_grad():
        for parameter in reader.patches.parameters():
            parameter.zero_()
    states, known = torch.randn(2, 4, 9, 8, requires_grad=True), torch.ones(2, dtype=torch.bool)
    none, ego = torch.zeros(2, 4, 9, dtype=torch.int64), torch.tensor([1, -1])
    reader(states, torch.randn(2, 4, 8), none, torch.zeros(2, 4, 4, dtype=torch.bool), known, ego).backward()
    touched = states.grad.abs().sum(-1) > 0
    assert touched[0, 2:].all() and not touched[0, :2].any() and not touched[1].any()


def _toy(folder, progress=None):
    torch.manual_seed(0)
    body, head = torch.nn.Embedding(16, 8), torch.nn.Linear(8, 16)
    return language.train_decoder(
        embed=body,
        visual=lambda clips: torch.zeros(len(clips), 1, 8),
        decode=lambda x, mask, positions: x,
        lm_head=head,
        trained=torch.nn.ModuleList([body, head]),
        tower=torch.nn.Linear(1, 1),
        registers=language.FactRegisters(8, {"ego": 3}),
        middle=body,
        scene=language.SceneReader(8, grounding.PatchReader(8, 12, 6, 7), 3, 4),
        early=body,
        patches=lambda tokens: tokens[:, None],
        frames=lambda tokens: tokens,
        columns=lambda clips: np.zeros((len(clips), 1, 4), bool),
        codes=lambda clips, grid: np.full((len(clips), 1, grid * grid), 1 << 6 | 2),
        ego=np.zeros(4, np.int64),
        colour_known=np.ones(4, bool),
        labels=np.zeros((4, 1), np.int64),
        before=[1],
        n_visual=1,
        segments=lambda clip, rng: [Segment([int(rng.integers(3, 8))], [5, 2], [1.0, 1.0])],
        n_clips=4,
        config=LanguageConfig(steps=6, batch_size=2, bf16=False, save_every=2, warmup_steps=1),
        checkpoint=folder / "language.pt",
        progress=progress,
    )


def test_language_training_resumes_to_the_same_losses(tmp_path):
    (tmp_path / "straight").mkdir()
    (tmp_path / "broken").mkdir()

    class Stop(Exception):
        pass

    def interrupt(step, total, loss):
        if step == 4:
            raise Stop

    with pytest.raises(Stop):
        _toy(tmp_path / "broken", interrupt)
    assert _toy(tmp_path / "broken") == _toy(tmp_path / "straight")


def test_a_loss_that_is_not_finite_stops_with_a_sentence():
    embed, head = torch.nn.Embedding(16, 8), torch.nn.Linear(8, 16)
    with pytest.raises(TrainingError, match="lower learning_rate"):
        language.train_decoder(
            embed=embed,
            visual=lambda clips: torch.zeros(len(clips), 1, 8),
            decode=lambda x, mask, positions: x * float("nan"),
            lm_head=head,
            trained=head,
            tower=torch.nn.Linear(1, 1),
            registers=language.FactRegisters(8, {"ego": 3}),
            middle=embed,
            scene=language.SceneReader(8, grounding.PatchReader(8, 12, 6, 7), 3, 4),
            early=embed,
            patches=lambda tokens: tokens[:, None],
            frames=lambda tokens: tokens,
            columns=lambda clips: np.zeros((len(clips), 1, 4), bool),
            codes=lambda clips, grid: np.zeros((len(clips), 1, grid * grid), np.int64),
            ego=np.zeros(2, np.int64),
            colour_known=np.ones(2, bool),
            labels=np.zeros((2, 1), np.int64),
            before=[1],
            n_visual=1,
            segments=lambda clip, rng: [Segment([3], [5, 2], [1.0, 1.0])],
            n_clips=2,
            config=LanguageConfig(steps=1, batch_size=2, bf16=False),
        )


def test_the_smoke_profile_trains_a_pair_that_loads(tmp_path):
    stages = set()
    written = step.train(tmp_path, "smoke", workers=2, progress=lambda stage, done, total, loss: stages.add(stage))
    assert {"verifier tower", "verifier language", "drafter tower", "drafter language", "simulated drives"} == stages
    assert json.loads((written / "provenance.json").read_text())["seed"] == 0
    pair = loading.load_pair(str(written))
    table = step.answer_table(pair, step.held_out(1, seed=9)[:2], max_new_tokens=4)
    assert set(table["role"]) == {"drafter", "verifier"} and (table["right"] <= table["expected"]).all()
    card = step.score(written, n_sequences=1, command="make pair").read_text()
    assert "| verifier | **all** |" in card and "Duplicate answers" in card and "profile smoke" in card


def test_a_seed_of_the_held_out_drives_is_refused(tmp_path):
    with pytest.raises(ParameterError, match="cannot be trained with seed 1000"):
        step.train(tmp_path, "smoke", seed=1000)


def test_an_unknown_profile_is_refused(tmp_path):
    with pytest.raises(ParameterError, match="no training profile 'huge'"):
        step.train(tmp_path, "huge")
