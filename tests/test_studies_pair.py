"""Training of the embedded pair: the block mask, the towers' patch targets, resuming, and the whole
smoke profile."""

import json

import numpy as np
import pytest
import torch

from studies.embedded_pair import card, grounding, language, reading
from studies.embedded_pair import models as embedded
from studies.embedded_pair import recipe as step
from studies.embedded_pair.language import LanguageConfig, Segment
from studies.embedded_pair.reading import ReadingConfig
from xsd.core import ParameterError, TrainingError
from xsd.models import loading


def test_a_question_sees_the_prefix_and_itself_only():
    row = language.pack([1, 5], 2, [Segment([7], [8, 2], [1, 1]), Segment([9], [4, 2], [1, 1])])
    _, positions, targets, _, seen = language.collate([row])
    assert positions[0].tolist() == [0, 1, 2, 3, 4, 5, 6, 4, 5, 6]
    assert targets[0].tolist() == [-100] * 4 + [8, 2, -100] + [4, 2, -100]
    assert not seen[0, 0, 7:, 4:7].any() and seen[0, 0,
                                                  9, :4].all() and not seen[0, 0, :4, 4:].any()


def test_packed_questions_get_the_states_they_would_get_alone():
    model = embedded.new_drafter(64, seed=0, layers=2).eval()
    parts = embedded.drafter_parts(model)
    visual = torch.randn(1, 3, embedded.HIDDEN_SIZE)
    one, two = Segment([7, 9], [8, 2], [1, 1]), Segment([11], [4, 6, 2], [1, 1, 1])

    def states(segments):
        ids, positions, _, _, seen = language.collate([language.pack([1], 3, segments)])
        x = parts.embed(ids)
        x = torch.cat([x[:, :1], visual, x[:, 4:]], dim=1)
        return parts.decode(
            x,
            torch.zeros(seen.shape).masked_fill(~seen,
                                                torch.finfo(torch.float32).min), positions)[0]

    together, alone = states([one, two]), states([two])
    torch.testing.assert_close(together[-4:], alone[-4:], atol=1e-5, rtol=1e-4)


def test_patch_codes_prefer_objects_over_scenery():
    cells = np.zeros((1, 1, 24, 24), np.uint16)
    cells[0, 0, :4, :4] = 8 << 6
    cells[0, 0, 0, :3] = 1 << 6 | 2 << 3 | 4
    codes = grounding.patch_codes(cells, 6)
    assert codes[0, 0, 0] == (1 << 6 | 2 << 3 | 4) and codes[0, 0, 1:].max() == 0


@pytest.mark.parametrize("role", step.ROLES)
def test_the_lower_half_puts_out_what_its_last_layer_does(role):
    verifier = role == "verifier"
    parts = (embedded.verifier_parts if verifier else embedded.drafter_parts)(
        (embedded.new_verifier if verifier else embedded.new_drafter)(64, seed=0).eval())
    x, positions = torch.randn(2, 7, embedded.HIDDEN_SIZE), torch.arange(7)[None].expand(2, -1)
    mask = torch.zeros(2, 1, 7, 7).masked_fill(~torch.ones(7, 7, dtype=torch.bool).tril(),
                                               torch.finfo(torch.float32).min)
    whole = []
    hook = parts.middle.register_forward_hook(lambda module, given, result: whole.append(result))
    parts.decode(x, mask, positions)
    hook.remove()
    torch.testing.assert_close(parts.decode_lower(x, mask, positions), whole[0])


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
    reader = reading.SceneReader(8, grounding.PatchReader(8, 12, 6, 7), 3)
    with torch.no_grad():
        for parameter in reader.patches.parameters():
            parameter.zero_()
    states, known = torch.randn(2, 4, 9, 8, requires_grad=True), torch.ones(2, dtype=torch.bool)
    none, ego = torch.zeros(2, 4, 9, dtype=torch.int64), torch.tensor([1, -1])
    reader(states, none, known, ego).backward()
    touched = states.grad.abs().sum(-1) > 0
    assert touched[0, 2:].all() and not touched[0, :2].any() and not touched[1].any()


def _readers(layer):
    truths = reading.ClipTruths(
        labels=np.zeros((4, 1), np.int64), ego=np.zeros(4, np.int64), colour_known=np.ones(4, bool),
        codes=lambda clips, grid: np.full((len(clips), 1, grid * grid), 1 << 6 | 2),
    )
    scene = reading.SceneReader(8, grounding.PatchReader(8, 12, 6, 7), 3)
    return reading.Readers(reading.FactRegisters(8, {"ego": 3}), scene, truths, middle=layer,
                           early=layer, patches=lambda tokens: tokens[:, None])


def _toy(stage, folder, progress=None, *, broken=False):
    torch.manual_seed(0)
    words, layer, head = torch.nn.Embedding(16, 8), torch.nn.Linear(8, 8), torch.nn.Linear(8, 16)
    scale = float("nan") if broken else 1.0
    common = {
        "embed": words,
        "visual": lambda clips:
                  (torch.as_tensor(clips).float()[:, None, None] * scale).expand(-1, 1, 8),
        "decode": lambda x, mask, positions: layer(x) * scale,
        "trained": torch.nn.ModuleList([words, layer, head]), "tower": torch.nn.Linear(1, 1),
        "readers": _readers(layer), "before": [1], "n_visual": 1, "n_clips": 4,
        "checkpoint": folder / f"{stage}.pt", "progress": progress,
    }
    config = {"steps": 6, "batch_size": 2, "bf16": False, "save_every": 2, "warmup_steps": 1}
    if stage == "reading":
        return reading.train_lower_half(**common, config=ReadingConfig(**config))
    return language.train_decoder(
        **common, lm_head=head,
        segments=lambda clip, rng: [Segment([int(rng.integers(3, 8))], [5, 2], [1.0, 1.0])],
        config=LanguageConfig(**config),
    )


@pytest.mark.parametrize("stage", ["reading", "language"])
def test_a_stage_resumes_to_the_same_losses(tmp_path, stage):
    (tmp_path / "straight").mkdir()
    (tmp_path / "broken").mkdir()

    class Stop(Exception):
        pass

    def interrupt(step, total, loss):
        if step == 4:
            raise Stop

    with pytest.raises(Stop):
        _toy(stage, tmp_path / "broken", interrupt)
    losses = _toy(stage, tmp_path / "broken")
    assert losses == _toy(stage, tmp_path / "straight") and losses[-1] < losses[0]


def test_a_checkpoint_of_other_settings_is_refused(tmp_path):
    _toy("reading", tmp_path)
    saved = torch.load(tmp_path / "reading.pt", weights_only=True)
    torch.save({**saved, "config": {**saved["config"], "steps": 7}}, tmp_path / "reading.pt")
    with pytest.raises(
            TrainingError, match=
            r"reading.pt is of a training with other settings .*choose another folder, or delete it"
    ):
        _toy("reading", tmp_path)


def test_the_registers_are_the_last_visual_positions_and_patches_are_all_of_them():
    middle, early = torch.nn.Identity(), torch.nn.Identity()
    truths = reading.ClipTruths(labels=np.zeros((1, 2), np.int64), ego=np.array([-1]),
                                colour_known=np.ones(1, bool), codes=lambda clips, grid: np.full(
                                    (1, 1, grid * grid), 1 << 6 | 2),
                                )
    registers, scene = reading.FactRegisters(8, {"ego": 3, "time": 2}), reading.SceneReader(
        8, grounding.PatchReader(8, 12, 6, 7), 3)
    readers = reading.Readers(registers, scene, truths, middle=middle, early=early,
                              patches=lambda tokens: tokens[:, None])
    low, high = torch.randn(1, 9, 8, requires_grad=True), torch.randn(1, 9, 8, requires_grad=True)
    with readers.listening():
        early(low), middle(high)
        readers.loss(np.array([0]), slice(2, 6)).backward()
    assert (low.grad.abs().sum(-1) > 0)[0].tolist() == [False] * 2 + [True] * 4 + [False] * 3
    assert (high.grad.abs().sum(-1) > 0)[0].tolist() == [False] * 4 + [True] * 2 + [False] * 3


@pytest.mark.parametrize("stage", ["reading", "language"])
def test_a_loss_that_is_not_finite_stops_with_a_sentence(tmp_path, stage):
    with pytest.raises(TrainingError, match="lower learning_rate"):
        _toy(stage, tmp_path, broken=True)


def test_the_smoke_profile_trains_a_pair_that_loads(tmp_path):
    stages = set()
    written = step.train(tmp_path, "smoke", workers=2,
                         progress=lambda stage, done, total, loss: stages.add(stage))
    assert stages == {"simulated drives"} | {
        f"{role} {stage}" for role in step.ROLES for stage in ("tower", "reading", "language")
    }
    assert json.loads((written / "provenance.json").read_text())["seed"] == 0
    pair = loading.load_pair(str(written))
    towers = [
        pair.verifier.model.model.image_tower.state_dict(),
        pair.verifier.model.model.video_tower.state_dict()
    ]
    assert all(torch.equal(weight, towers[1][name]) for name, weight in towers[0].items())
    table = card.answer_table(pair, card.held_out(1, seed=9)[:2], max_new_tokens=4)
    assert set(table["role"]) == {"drafter", "verifier"} and (table["right"]
                                                              <= table["expected"]).all()
    text = card.score(written, n_sequences=1, command="make pair").read_text()
    assert "| verifier | **all** |" in text and "Duplicate answers" in text
    assert " ".join(text.split()).count("profile smoke") == 1


def test_a_seed_of_the_held_out_drives_is_refused(tmp_path):
    with pytest.raises(ParameterError, match="cannot be trained with seed 1000"):
        step.train(tmp_path, "smoke", seed=1000)


def test_an_unknown_profile_is_refused(tmp_path):
    with pytest.raises(ParameterError, match="no training profile 'huge'"):
        step.train(tmp_path, "huge")
