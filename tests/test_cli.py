"""The command line: one clear sentence for the user's mistakes, and a light start."""

import subprocess
import sys

import nbformat
import pytest
from nbformat.v4 import new_notebook

from xsd import cli
from xsd.runs import doctor


def test_help_and_import_load_nothing_heavy():
    code = (
        "import sys, xsd.cli\n"
        "heavy = {'torch', 'transformers', 'plotly', 'pandas', 'numpy', 'papermill', 'pydantic', "
        "'nbformat'} & set(sys.modules)\n"
        "assert not heavy, heavy")
    subprocess.run([sys.executable, "-c", code], check=True)
    done = subprocess.run([sys.executable, "-m", "xsd.cli", "--help"], capture_output=True,
                          text=True, check=True)
    verbs = ("run", "sweep", "report", "notebooks", "demo", "simulate", "doctor", "plan",
             "prepare-dsec", "import-traces")
    verbs += ("extract", "status", "verify", "repair", "import-chunks")
    assert all(verb in done.stdout for verb in verbs)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [(["run", "99"], "there is no notebook '99'"),
     (["run", "nowhere/x.ipynb"], "there is no notebook at nowhere/x.ipynb"),
     (["sweep", "nowhere/x.ipynb", "-g", "seed=1"], "there is no notebook at"),],
)
def test_a_mistake_is_one_sentence_and_exit_status_2(arguments, words, capsys):
    assert cli.main(arguments) == 2
    said = capsys.readouterr().err
    assert said.startswith("xsd: ") and words in said and said.count("\n") == 1


def test_an_unknown_verb_is_refused_by_name(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["rum"])
    assert stop.value.code == 2 and "rum" in capsys.readouterr().err


def test_report_needs_an_executed_notebook(tmp_path, capsys):
    assert cli.main(["report", str(tmp_path)]) == 2
    assert "no executed notebook" in capsys.readouterr().err
    nbformat.write(new_notebook(), tmp_path / "a.ipynb")
    assert cli.main(["report", str(tmp_path)]) == 0
    assert (tmp_path / "notebooks" / "a.html").is_file()


def test_notebooks_check_lists_what_is_wrong(tmp_path, capsys):
    nbformat.write(new_notebook(), tmp_path / "06_compare.ipynb")
    assert cli.main(["notebooks", "check", str(tmp_path / "06_compare.ipynb")]) == 2
    assert "exactly one cell tagged 'parameters'" in capsys.readouterr().err


def test_doctor_says_what_is_in_order_and_what_to_do(monkeypatch, capsys):
    assert cli.main(["doctor"]) in (0, 1)
    said = capsys.readouterr().out
    assert "Python" in said and "GB free" in said and "torch" in said
    monkeypatch.setattr(doctor, "LEAST_GB", 10**9)
    assert doctor.disk(doctor.ROOT).state == "bad" and "free some space" in doctor.disk(
        doctor.ROOT).advice


def test_a_sweep_over_level_gives_each_run_one_level(monkeypatch, tmp_path):
    from xsd.runs import notebooks

    asked = []
    monkeypatch.setattr(notebooks, "sweep",
                        lambda source, grid, out, fixed: asked.append(grid) or [])
    monkeypatch.setattr(notebooks, "table", lambda rows: "")
    assert cli.main(["sweep", "03", "-g", "level=L1,L2", "-g", "seed=0,1", "-o",
                     str(tmp_path)]) == 0
    assert asked == [{"levels": [["L1"], ["L2"]], "seed": [0, 1]}]
