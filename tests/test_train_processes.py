"""Two processes train one adapter: the weights and the curves of one process, and one folder."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import train_examples as examples

from xsd.adapters import registry
from xsd.train import fit, processes, source

OPTIONS = {
    "epochs": 2, "batch_size": 8, "validation_share": 0.2, "adapter_options": {"dropout": 0.0}
}
LEVELS = {
    "L4": {"profile": "reference", "accumulation": 2},
    "L5F": {"profile": "rollout", "rollout_steps": 2}
}


def train(level, folder):
    # 33 answers: the last batch holds one, so that one of two processes has nothing in it
    config = fit.FitConfig(**OPTIONS, **LEVELS[level])
    return fit.fit_adapter(level, examples.answers(33, n_sequences=4), folder=folder, config=config,
                           head=examples.head())


def test_two_gloo_processes_train_as_one(tmp_path):
    here = Path(__file__)
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
        str(here),
        str(tmp_path)
    ]
    settings = {
        **os.environ, "OMP_NUM_THREADS": "1",
        "PYTHONPATH": f"{here.parent}{os.pathsep}{here.parents[1]}"
    }
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=settings,
                          check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert sorted(path.name for path in tmp_path.glob("rank_*")) == ["rank_0", "rank_1"]
    for level in LEVELS:
        alone = train(level, tmp_path / f"alone_{level}")
        together = json.loads((tmp_path / level / "history.json").read_text())
        assert len(together) == len(alone.history) == 2
        for one, other in zip(alone.history, together, strict=True):
            assert one.keys() == other.keys()
            for name in (name for name in one if not name.endswith("seconds")):
                assert other[name] == pytest.approx(one[name], rel=1e-3, abs=1e-4), (level, name)
        ours, theirs = (registry.load_any_adapter(place / "final.safetensors").state_dict()
                        for place in (alone.folder, tmp_path / level))
        for name in ours:
            torch.testing.assert_close(theirs[name], ours[name], atol=2e-4, rtol=2e-3)
    assert not list(tmp_path.rglob("*.part"))


def test_alone_nothing_is_started_and_nothing_changes():
    alone = processes.Processes(torch.device("cpu"))
    batch = next(source.PackedStates(examples.answers(4)).batches(torch.arange(4), 4))
    assert (alone.rank, alone.size, alone.writes) == (0, 1, True) and alone.rows(batch) is batch
    assert alone.sums({"a": torch.tensor(2.0), "b": 3.0}) == {"a": 2.0, "b": 3.0}
    assert not torch.distributed.is_initialized()


if __name__ == "__main__":
    for each in LEVELS:
        train(each, Path(sys.argv[1]) / each)
    # a file each: what two processes print to one pipe may run together
    (Path(sys.argv[1]) / f"rank_{processes.Processes(torch.device('cpu')).rank}").touch()
