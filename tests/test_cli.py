"""The command line: one clear sentence for the user's mistakes, and a light start."""

import os
import signal
import subprocess
import sys
import time

import nbformat
import pytest
from nbformat.v4 import new_notebook

from xsd import cli
from xsd.cli import app
from xsd.files import FolderLock
from xsd.runs import doctor

VERBS = {
    (): ("run", "sweep", "runs", "report", "notebooks", "demo", "doctor", "plan", "train",
         "evaluate", "self-test", "data", "pair", "bench"),
    ("data",): ("simulate", "prepare-dsec", "extract", "status", "verify", "repair",
                "import-chunks", "import-traces"),
    ("pair",): ("train", "card"),
}


def test_help_and_import_load_nothing_heavy():
    code = ("import sys, xsd.cli, xsd.cli.app\n"
            "assert xsd.cli.main(['--help']) == xsd.cli.main(['data', 'extract', '--help']) == 0\n"
            "heavy = {'torch', 'transformers', 'plotly', 'pandas', 'numpy', 'papermill', "
            "'nbformat', 'rich'} & set(sys.modules)\n"
            "assert not heavy, heavy")
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)
    done = subprocess.run([sys.executable, "-m", "xsd.cli", "--help"], capture_output=True,
                          text=True, check=True)
    assert all(f"\n  {verb} " in done.stdout for verb in VERBS[()])


@pytest.mark.parametrize("path", [
    (*group, verb) for group, verbs in VERBS.items() for verb in verbs
    if (verb,) not in VERBS
])
def test_the_help_of_every_verb_ends_in_an_example(path, capsys):
    assert cli.main([*path, "--help"]) == 0
    said = capsys.readouterr().out
    examples = said[said.index("Examples:"):]
    assert f"xsd {' '.join(path)}" in examples or f"-m xsd.cli {' '.join(path)}" in examples


def test_the_readme_has_every_verb():
    page = (app.ROOT / "README.md").read_text(encoding="utf-8")
    table = page[page.index("## Verbs"):page.index("## The package")]
    named = {verb for verbs in VERBS.values() for verb in verbs}
    assert all(f"`{verb}" in table for verb in named), named


@pytest.mark.parametrize(("old", "new"), [
    (["simulate", "x", "-n", "2"], ["data", "simulate", "x", "-n", "2"]),
    (["import-traces", "x.json"], ["data", "import-traces", "x.json"]),
    (["pair", "--profile", "smoke"], ["pair", "train", "--profile", "smoke"]),
    (["pair"], ["pair", "train"]),
    (["pair", "--help"], ["pair", "--help"]),
    (["pair", "card", "x"], ["pair", "card", "x"]),
    (["bench", "extract"], ["bench", "extract"]),
])
def test_old_spellings_are_read_as_the_new_ones(old, new, monkeypatch):
    asked = []
    monkeypatch.setattr(app, "app", lambda given, **_: asked.append(given))
    assert cli.main(old) == 0 and asked == [new]


def test_the_shell_can_complete_verbs_and_notebooks():
    for words, found in (("xsd da", "data"), ("xsd data ext", "extract"), ("xsd run 0", "05_live")):
        done = subprocess.run([sys.executable, "-m", "xsd.cli"], capture_output=True, text=True,
                              env={**os.environ, "_XSD_COMPLETE": "complete_bash",
                                   "COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))},
                              check=False)
        assert found in done.stdout.split(), done


def test_a_verb_whose_module_was_not_shipped_says_so(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "benchmarks", None)
    monkeypatch.delitem(sys.modules, "benchmarks.train", raising=False)
    assert cli.main(["bench", "train"]) == 2
    assert "needs benchmarks.train, which stands beside the package" in capsys.readouterr().err


def test_an_interruption_ends_in_130(monkeypatch):
    def interrupt(**_):
        raise KeyboardInterrupt

    monkeypatch.setattr(doctor, "examine", interrupt)
    assert cli.main(["doctor"]) == 130


def test_runs_lists_what_there_is(tmp_path, capsys):
    assert cli.main(["runs", str(tmp_path)]) == 0
    assert "no run yet" in capsys.readouterr().out
    for name in ("a/results/live.json", "a/tokens.parquet", "b/index.html", "c/notes.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("{}")
    assert cli.main(["runs", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "results, tokens" in said and "page" in said and str(tmp_path / "c") not in said


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
    assert cli.main(["rum"]) == 2
    said = capsys.readouterr().err
    assert "No such command 'rum'. Did you mean 'run'" in said


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
    from xsd.runs import listing
    from xsd.steps import sweep

    asked = []
    monkeypatch.setattr(sweep, "run", lambda source, grid, *_, **__: asked.append(grid) or [])
    monkeypatch.setattr(listing, "sweep_of", lambda _: {"runs": []})
    assert cli.main(["sweep", "03", "level=L1,L2", "-g", "seed=0,1", "-o", str(tmp_path)]) == 0
    assert cli.main(["sweep", "03", "levels=L1|L4,B1", "-o", str(tmp_path)]) == 0
    assert asked == [{"levels": [["L1"], ["L2"]], "seed": [0, 1]},
                     {"levels": [["L1"], ["L4", "B1"]]}]


@pytest.mark.parametrize(("words", "sentence"), [
    (["self-test", "--options", "levels: 3"], "--options cannot hold levels, which is an option"),
    (["self-test", "--options", "layers:["], "--options cannot be 'layers:[': expected names"),
    (["train", "no/such/pairs", "-o", "runs/none", "-l", "L1"], "there is nothing at "),
])
def test_what_cannot_be_read_is_said_in_one_sentence(words, sentence, capsys):
    assert cli.main(words) == 2
    said = capsys.readouterr().err
    assert sentence in said and "Traceback" not in said


def hears_signals():
    """As in a terminal, also where the tests themselves run in the background or under nohup."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


def started(words, **options):
    return subprocess.Popen([sys.executable, "-m", "xsd.cli", *map(str, words)], text=True,
                            stderr=subprocess.PIPE, start_new_session=True,
                            preexec_fn=hears_signals, **{"stdout": subprocess.PIPE, **options})


def group_is_empty(group, seconds=10):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.1)
    return False


@pytest.mark.parametrize(("number", "status", "workers", "group"), [
    (signal.SIGINT, 130, 2, True), (signal.SIGTERM, 143, 2, False), (signal.SIGHUP, 129, 1, False)])
def test_a_signal_ends_a_verb_and_its_helpers_with_one_line(number, status, workers, group,
                                                            tmp_path):
    child = started(["data", "simulate", tmp_path / "drives", "-n", 200, "--workers", workers])
    while not (tmp_path / "drives").exists():
        time.sleep(0.05)
    (os.killpg if group else os.kill)(child.pid, number)
    said = child.communicate(timeout=60)[1]
    assert child.returncode == status
    assert said == "xsd: stopped; run the same command again to go on (what was finished is kept)\n"
    assert group_is_empty(child.pid), "a helper process outlived the verb"


def test_ctrl_c_while_the_verb_is_still_importing_is_no_traceback():
    code = ("import os, signal, sys, xsd.cli.door as door\n"
            "sys.argv = ['xsd', 'doctor']\n"
            "class Late:\n"
            "    def find_spec(self, name, *_):\n"
            "        if name == 'typer': os.kill(os.getpid(), signal.SIGINT)\n"
            "sys.meta_path.insert(0, Late())\n"
            "sys.exit(door.main())")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False,
                          preexec_fn=hears_signals)
    assert done.returncode == 130 and done.stderr.startswith("xsd: stopped; run the same command")
    assert done.stderr.count("\n") == 1


def test_nobody_reading_the_output_is_a_quiet_end():
    child = started(["data", "extract", "--help"])
    child.stdout.close()
    assert child.wait(timeout=60) == 141 and child.stderr.read() == ""


@pytest.mark.parametrize(("redirection", "status", "said"), [
    (">/dev/full", 2, "xsd: the output cannot be written: No space left on device; "),
    (">&-", 0, ""), (">&- 2>&-", 0, ""), ("<&-", 0, "")])
def test_an_output_that_is_full_or_closed_is_no_traceback(redirection, status, said):
    done = subprocess.run(
        ["bash", "-c", f"{sys.executable} -m xsd.cli run 03 --help-parameters {redirection}"],
        capture_output=True, text=True, check=False)
    assert done.returncode == status and done.stderr.startswith(said) and (
        done.stderr.count("\n") == bool(said))


@pytest.mark.parametrize("surroundings", [
    {"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    {"COLUMNS": "0"}, {"COLUMNS": "-5"}, {"COLUMNS": "wide"}, {"TERM": "nothing"}])
def test_a_terminal_that_shows_little_is_no_traceback(surroundings):
    for words in (["run", "03", "--help-parameters"], ["data", "extract", "--help"]):
        child = started(words, env={**os.environ, **surroundings})
        shown, said = child.communicate(timeout=60)
        assert child.returncode == 0 and said == "" and len(shown) > 500


def test_one_process_writes_a_folder_of_pages(tmp_path, capsys):
    nbformat.write(new_notebook(), tmp_path / "a.ipynb")
    with FolderLock(tmp_path):
        assert cli.main(["report", str(tmp_path)]) == 2
    assert f"is being written by process {os.getpid()}; wait" in capsys.readouterr().err


def test_what_a_name_holds_is_no_command_to_the_terminal(tmp_path, capsys):
    place = tmp_path / "run\x1b[2J\nxsd: all well" / "results"
    place.mkdir(parents=True)
    (place / "live.json").write_text("{}")
    assert cli.main(["runs", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "\x1b" not in shown and "run?[2J?xsd: all well" in shown
    assert cli.main(["report", str(place.parent)]) == 2
    said = capsys.readouterr().err
    assert "\x1b" not in said and said.count("\n") == 1


def test_a_parameter_that_has_an_option_of_its_own_is_given_once(capsys):
    assert cli.main(["train", "pairs", "-o", "runs/x", "-p", "seed=3"]) == 2
    assert "-p seed=… has an argument or option of its own" in capsys.readouterr().err
