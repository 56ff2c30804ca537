"""A made-up extraction of DSEC's size (52 000 pairs) through notebooks 02, 03, 04 and 06, by path:
peak memory and minutes of each.

    python -m benchmarks.many_pairs [folder] [pairs] [notebooks]

The states are random but not arbitrary: position t of the verifier is its token's row of the head
with noise, the drafter's a fixed random map of it with more noise, so that adapters, floors and
intervals have something to find. Notebook 05 needs models and clips, which made-up pairs lack.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from xsd.core import ROOT, PairedStates
from xsd.files import write_json
from xsd.shards.writer import ShardWriter

WIDTH, VOCABULARY, SEQUENCES, QUESTIONS = 64, 1024, 41, 10
END, CHUNK = 2, 2000
LEVELS = ["L1", "L4", "L5F", "B1"]


class World:
    """Head [V, D], the drafter's map [D, D], and templates of answers: what all pairs share."""

    def __init__(self, seed: int = 0) -> None:
        draw = np.random.default_rng(seed)
        self.head = draw.standard_normal((VOCABULARY, WIDTH), dtype=np.float32)
        self.map = draw.standard_normal((WIDTH, WIDTH), dtype=np.float32) / np.float32(WIDTH**0.5)
        self.templates = [[draw.integers(3, VOCABULARY, n) for n in row]
                          for row in draw.integers(12, 45, (QUESTIONS, 8))]

    def pairs(self, n: int, split: str, sequences: int, seed: int) -> Iterator[PairedStates]:
        """n teacher-forced pairs, ten questions a clip, clips in ``sequences`` sequences."""
        draw, clips = np.random.default_rng(seed), n // QUESTIONS
        for first in range(0, clips * QUESTIONS, CHUNK):
            numbers = range(first, min(first + CHUNK, clips * QUESTIONS))
            picks = draw.integers(8, size=len(numbers))
            answers = [self.templates[number % QUESTIONS][pick]
                       for number, pick in zip(numbers, picks, strict=True)]
            ids, ends = np.concatenate(answers), np.cumsum([len(one) for one in answers])
            changed = draw.random(len(ids)) < 0.3
            ids[changed] = draw.integers(3, VOCABULARY, changed.sum())
            ids[ends - 1] = END
            noise = draw.standard_normal((2, len(ids), WIDTH), dtype=np.float32)
            verifier = self.head[ids] + noise[0]
            drafter = verifier @ self.map + noise[1]
            said = np.where(draw.random(len(ids)) < 0.8, ids, (ids + 1) % VOCABULARY)
            columns = [torch.from_numpy(one).tensor_split(torch.from_numpy(ends[:-1]))
                       for one in (drafter, verifier, said, ids)]
            for number, *states in zip(numbers, *columns, strict=True):
                clip, question = divmod(number, QUESTIONS)
                yield PairedStates(f"{split}_{clip * sequences // clips:03d}", f"{clip:06d}",
                                   f"Question {question}?", *states, "teacher_forced",
                                   text_by_drafter=text(states[2]),
                                   text_by_verifier=text(states[3]), split=split)


def text(ids: torch.Tensor) -> str:
    """The answer's words, as pair.json spells them."""
    return "".join(f" w{token}" for token in ids.tolist())


def write(folder: Path, world: World, n: int, split: str, sequences: int) -> None:
    """A finished extraction in ``folder``: teacher_forced/, and pair.json beside it."""
    place = folder / "teacher_forced"
    with ShardWriter(place, mode="teacher_forced", dtype="fp16",
                     config={"split": split, "data_hash": "made up"}) as out:
        if out.finished:
            return
        for role in ("drafter", "verifier"):
            out.save_head(role, torch.from_numpy(world.head), VOCABULARY)
        for pair in world.pairs(n, split, sequences, seed=len(split)):
            out.write(pair)
    prompts = {f"Question {i}?": list(range(3, 13 + i)) for i in range(QUESTIONS)}
    write_json(folder / "pair.json", {
        "pair": "made up", "eos": [END], "prompt_ids": prompts,
        "token_texts": ["<unk>", "<s>", "</s>", *(f" w{i}" for i in range(3, VOCABULARY))],
    })


def run(notebook: str, out: Path, **parameters: object) -> dict[str, float]:
    """One notebook headless, in a process of its own: its minutes and the largest memory (GB) of
    any process below it, the kernel. Raises: RuntimeError when it fails."""
    given = [word for name, value in parameters.items()
             for word in ("-p", f"{name}={','.join(value) if isinstance(value, list) else value}")]
    began = time.perf_counter()
    child = subprocess.Popen([sys.executable, "-m", "xsd.cli", "run", notebook, "-o", str(out),
                              *given], cwd=ROOT, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(child.pid, 0)
    if status:
        raise RuntimeError(f"notebook {notebook} failed; see {out}")
    return {"minutes": (time.perf_counter() - began) / 60, "peak_gb": usage.ru_maxrss / 1e6}


def measure(out: Path, n: int = 52_000, notebooks: tuple[str, ...] = ("02", "03", "04", "06"),
            ) -> dict[str, dict[str, float]]:
    """Write both extractions (once) and run the notebooks on them; also into many_pairs.json."""
    world, began = World(), time.perf_counter()
    write(out / "train", world, n, "train", SEQUENCES)
    write(out / "held_out", world, max(n // 26, 100), "test", 10)
    size = sum(path.stat().st_size for path in out.rglob("*.safetensors")) / 1e9
    found = {"writing": {"minutes": (time.perf_counter() - began) / 60, "gb_on_disk": size}}
    run_dir, train, test = (str(out / name) for name in ("run", "train", "held_out"))
    own: dict[str, dict[str, object]] = {
        "02": {"data": train, "levels": LEVELS, "recipe": "reference", "epochs": 1},
        "03": {"levels": LEVELS, "test_data": [test]},
        "04": {"levels": LEVELS, "data": train, "test_data": [test]},
        "06": {"runs": [run_dir]},
    }
    for notebook in notebooks:
        found[notebook] = run(notebook, out / "notebooks", run_dir=run_dir, **own[notebook])
        print(f"{notebook}: {found[notebook]['minutes']:.1f} min, peak "
              f"{found[notebook]['peak_gb']:.2f} GB", flush=True)
    (out / "many_pairs.json").write_text(json.dumps({"pairs": n, **found}, indent=1) + "\n")
    return found


if __name__ == "__main__":
    given = sys.argv[1:]
    measure(Path(given[0] if given else ROOT / "reports" / "bench_many_pairs").resolve(),
            int(given[1]) if len(given) > 1 else 52_000,
            tuple(given[2].split(",")) if len(given) > 2 else ("02", "03", "04", "06"))
