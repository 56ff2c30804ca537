"""House rules: declared dependencies, pins that agree, small files, and what the environment set-up
says when it cannot go on."""

import ast
import importlib.util
import json
import os
import re
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
SETUP_SPEC = importlib.util.spec_from_file_location("setup_env", ROOT / "tools" / "setup_env.py")
setup_env = importlib.util.module_from_spec(SETUP_SPEC)
SETUP_SPEC.loader.exec_module(setup_env)

USED_WITHOUT_IMPORT = {
    "accelerate", "aedat", "anywidget", "bitsandbytes", "ipykernel", "jupyterlab", "kaleido",
    "protobuf", "sentencepiece"
}
"""Needed by another package or as a program; each says so in the README's table."""


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def pins(lines: list[str]) -> dict[str, str]:
    return {
        normal(name): version for name, version in (line.split("==") for line in lines
                                                    if line and not line.startswith("#"))
    }


RUNTIME = pins(PROJECT["dependencies"])
DEV = pins(PROJECT["optional-dependencies"]["dev"])
EXTRA = pins([one for name, some in PROJECT["optional-dependencies"].items() if name != "dev"
              for one in some])
"""Not installed unless asked for; where one is missing, a sentence says so."""
CONSTRAINTS = pins((ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines())


def tracked() -> list[Path]:
    """The files of the project: what git tracks, or everything but the ignored folders where there
    is no git."""
    done = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True,
                          check=False)
    if done.returncode == 0 and done.stdout:
        return [path for name in done.stdout.split("\0") if name and (path := ROOT / name).exists()]
    ignored = {
        ".venv", ".git", "reports", "runs", "__pycache__", ".pytest_cache", ".ruff_cache", "build"
    }
    return [
        path for path in ROOT.rglob("*")
        if path.is_file() and not ignored & set(path.relative_to(ROOT).parts)
    ]


def imported_distributions(sources: list[str]) -> set[str]:
    """Names on the index of everything imported that is neither the standard library nor this
    project."""
    modules = set()
    for source in sources:
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Import):
                modules |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                modules.add(node.module.split(".")[0])
    own = {
        "xsd", "benchmarks", "studies", "tools",
        *(path.stem for path in (ROOT / "tests").glob("*.py")),
        *(path.stem for path in (ROOT / "tools").glob("*.py"))
    }
    known = metadata.packages_distributions()
    return {
        normal(known.get(name, [name])[0]) for name in modules - set(sys.stdlib_module_names) - own
    }


def package_sources() -> list[str]:
    """Of the package and of what stands beside it."""
    rooms = ("xsd", "benchmarks", "studies", "tools")
    return [path.read_text(encoding="utf-8") for room in rooms
            for path in (ROOT / room).rglob("*.py")]


def notebook_sources() -> list[str]:
    cells = [
        cell for path in sorted((ROOT / "notebooks").glob("*.ipynb"))
        for cell in json.loads(path.read_text())["cells"]
    ]
    return [
        "".join(cell["source"]) for cell in cells
        if cell["cell_type"] == "code" and not "".join(cell["source"]).startswith("%")
    ]


def test_every_import_of_the_package_is_declared():
    used = imported_distributions(package_sources() + notebook_sources())
    missing = used - set(RUNTIME) - set(EXTRA)
    assert not missing, f"imported but not in pyproject.toml: {sorted(missing)}"


def test_every_import_of_the_tests_is_declared():
    used = imported_distributions(
        [path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("*.py")])
    assert used <= set(RUNTIME) | set(
        DEV), f"imported but not in pyproject.toml: {sorted(used - set(RUNTIME) - set(DEV))}"


def test_every_declared_dependency_is_used():
    used = imported_distributions(package_sources() + notebook_sources())
    idle = set(RUNTIME) - used - USED_WITHOUT_IMPORT
    assert not idle, f"declared but never imported: {sorted(idle)}"


def test_every_dependency_has_its_reason_in_the_readme():
    rows = re.findall(r"^\| `([\w.-]+)` \| (.+?) \|$",
                      (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    reasons = {normal(name): reason for name, reason in rows}
    given = {name for name, reason in reasons.items() if len(reason) > 8}
    missing = {*RUNTIME, *DEV, *EXTRA} - given
    assert not missing, f"no reason given in README.md: {sorted(missing)}"


def test_pins_agree_between_pyproject_and_constraints():
    different = {
        name: (version, CONSTRAINTS.get(name)) for name, version in {**RUNTIME, **DEV}.items()
        if CONSTRAINTS.get(name) != version
    }
    assert not different, f"(pyproject, constraints): {different}"


def test_constraints_fit_every_build_of_torch():
    assert CONSTRAINTS["torch"] == "2.13.0"
    assert not [name for name in CONSTRAINTS if name.startswith(("nvidia", "cuda", "triton"))]
    assert not [version for version in CONSTRAINTS.values() if "+" in version]


def test_conda_users_get_the_same_pins():
    text = (ROOT / "environment.yml").read_text(encoding="utf-8")
    assert "--constraint constraints.txt" in text and "--editable .[dev]" in text
    assert re.search(r"- python=3\.11$", text,
                     re.MULTILINE) and PROJECT["requires-python"] == ">=3.11"
    assert "==" not in text, "pins live in constraints.txt only"


def test_installed_versions_are_the_pinned_ones():
    wrong = {
        name: found for name, version in {**RUNTIME, **DEV}.items()
        if (found := metadata.version(name).split("+")[0]) != version
    }
    assert not wrong, f"run `make env`: {wrong}"


def test_no_tracked_file_is_large():
    sizes = {str(path.relative_to(ROOT)): path.stat().st_size / 1e6 for path in tracked()}
    assert {name: size for name, size in sizes.items() if size > 20} == {}
    assert sum(size for name, size in sizes.items()
               if name.startswith("data/")) <= 60, "data/ is over 60 MB"
    assert {name: size for name, size in sizes.items()
            if name.endswith(".ipynb") and size > 0.2} == {}, "notebooks over 200 kB"


def test_the_shipped_pair_is_what_the_readme_says_of_it():
    configs = {
        role: json.loads((ROOT / "data" / "pair" / role / "config.json").read_text())
        for role in ("drafter", "verifier")
    }
    verifier = configs["verifier"]["text_config"]
    assert configs["drafter"]["model_type"] == "EventChat_llama" and configs["verifier"][
        "model_type"] == "video_llava"
    assert verifier["num_hidden_layers"] >= 12 > configs["drafter"]["num_hidden_layers"]
    assert verifier["hidden_size"] == configs["drafter"]["hidden_size"]
    assert sum(path.stat().st_size
               for path in (ROOT / "data" / "pair").rglob("*.safetensors")) <= 40e6
    assert json.loads(
        (ROOT / "data" / "pair" / "accuracy.json").read_text())["verifier_duplicates"] <= 0.3


def swallowed(tree: ast.AST) -> list[int]:
    """Lines of handlers that catch everything and say nothing: a bare except, or one of
    (Base)Exception that only passes."""
    handlers = [node for node in ast.walk(tree) if isinstance(node, ast.ExceptHandler)]
    silent = (ast.Pass, ast.Continue)
    wide = [
        node for node in handlers
        if isinstance(node.type, ast.Name) and node.type.id in ("Exception", "BaseException")
    ]
    return [
        node.lineno for node in handlers if node.type is None or (node in wide and all(
            isinstance(line, silent) for line in node.body))
    ]


def test_no_errors_are_swallowed():
    assert swallowed(ast.parse("try:\n    f()\nexcept Exception:\n    pass")) == [3]
    found = {
        str(path.relative_to(ROOT)): swallowed(ast.parse(path.read_text(encoding="utf-8")))
        for path in (ROOT / "xsd").rglob("*.py")
    }
    assert {name: lines for name, lines in found.items() if lines} == {}


def test_nothing_is_left_open():
    left_open = re.compile(r"\b(" + "|".join(("TO" + "DO", "FIX" + "ME")) + r")\b")
    sources = [
        path for folder in ("xsd", "benchmarks", "studies", "tests", "tools", "notebooks")
        for path in (ROOT / folder).rglob("*.*") if path.suffix in (".py", ".ipynb")
    ]
    assert [
        str(path.relative_to(ROOT)) for path in sources
        if left_open.search(path.read_text(encoding="utf-8"))
    ] == []


# --- tools/setup_env.py
# ------------------------------------------------------------------------------------------------


def test_an_old_python_is_named_with_the_way_out():
    with pytest.raises(setup_env.SetupError) as caught:
        setup_env.find_python(own=((3, 9), "/usr/bin/python3"),
                              candidates=("python3.11-that-is-not-there",))
    assert str(caught.value).startswith("Python 3.9 is too old: 3.11 or newer is needed")
    assert "run make again" in str(caught.value)


def test_a_newer_python_on_the_path_is_taken_and_a_broken_one_is_not(tmp_path, monkeypatch):
    for name in ("python3.11", "python3.12"):
        (tmp_path / name).write_text("#!/bin/sh\n" +
                                     ("exit 127\n" if name == "python3.11" else "echo 3 12\n"))
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert setup_env.find_python(own=((3, 9), "/usr/bin/python3")) == str(tmp_path / "python3.12")


def test_the_running_python_is_taken_when_it_is_new_enough():
    assert setup_env.find_python(own=((3, 12), "/some/python")) == "/some/python"


def test_setup_is_readable_for_an_old_python():
    ast.parse((ROOT / "tools" / "setup_env.py").read_text(encoding="utf-8"), feature_version=(3, 6))


def test_a_short_disk_is_named_with_what_is_needed():
    with pytest.raises(setup_env.SetupError) as caught:
        setup_env.check_disk(1.25, "/srv/somebody/xsd")
    assert str(caught.value) == (
        "only 1.2 GB are free in /srv/somebody/xsd and the environment needs 4 GB; "
        "free some space or clone the project onto a larger disk, then run make again")
    setup_env.check_disk(10, "/srv/somebody/xsd")


@pytest.mark.parametrize(
    ("log", "way_out"),
    [("ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device\n",
      "the disk is full"),
     ("ERROR: Could not find a version that satisfies the requirement torch==2.13.0\n",
      "the package index is out of reach"),
     ("The virtual environment was not created successfully because ensurepip is not available.\n",
      "apt install python3-venv"), ("ERROR: something else\n", "check the network"),],
)
def test_a_failed_install_says_why_and_where_the_log_is(log, way_out):
    sentence = setup_env.failure_sentence(log, ".venv/install.log")
    assert sentence.startswith("installing failed (") and way_out in sentence
    assert sentence.endswith("The whole log is in .venv/install.log")


def test_a_failing_installer_ends_in_one_sentence_and_keeps_its_log(tmp_path):
    command = [
        sys.executable, "-c",
        "print('Collecting torch'); print('ERROR: No matching distribution found for torch'); "
        "raise SystemExit(1)",
    ]
    with pytest.raises(setup_env.SetupError, match="No matching distribution found for torch"):
        setup_env.run_logged(command, str(tmp_path / "install.log"))
    assert "Collecting torch" in (tmp_path / "install.log").read_text()


def test_a_finished_environment_is_left_alone_until_the_pins_change(tmp_path):
    for name in ("pyproject.toml", "constraints.txt"):
        (tmp_path / name).write_text(name)
    inside = tmp_path / ".venv" / "bin" / "python"
    inside.parent.mkdir(parents=True)
    inside.symlink_to(sys.executable)
    (tmp_path / ".venv" / "xsd-stamp").write_text(
        setup_env.stamp_text(str(tmp_path), sys.version_info[:2]))
    assert setup_env.ensure(str(tmp_path), python=sys.executable) is False
    before = setup_env.stamp_text(str(tmp_path), (3, 11))
    (tmp_path / "constraints.txt").write_text("torch==2.13.1")
    assert setup_env.stamp_text(str(tmp_path), (3, 11)) != before


def test_linux_without_a_gpu_is_told_how_to_get_the_small_torch():
    hint = setup_env.cuda_hint(6.0, platform="linux", has_gpu=False, environment={})
    assert "stop and run: PIP_EXTRA_INDEX_URL=" in hint and "only 6.0 GB are free" in hint
    assert setup_env.cuda_hint(100.0, platform="linux", has_gpu=True, environment={}) is None
    assert setup_env.cuda_hint(100.0, platform="darwin", has_gpu=False, environment={}) is None
    settled = {"PIP_EXTRA_INDEX_URL": "https://example.org/whl/cpu"}
    assert setup_env.cuda_hint(100.0, platform="linux", has_gpu=False, environment=settled) is None


def test_links_between_the_pages_lead_somewhere():
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]
    links = {(page, link) for page in pages
             for link in re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text(encoding="utf-8"))}
    assert sorted(f"{page.name}: {link}" for page, link in links
                  if not (page.parent / link).exists()) == []


def test_the_readme_maps_every_room():
    rooms = {
        path.stem for path in (ROOT / "xsd").iterdir()
        if not path.name.startswith("_") and (path.is_dir() or path.suffix == ".py")
    }
    named = set(
        re.findall(r"^\| `xsd/(\w+)", (ROOT / "README.md").read_text(encoding="utf-8"),
                   re.MULTILINE))
    assert rooms == named


def test_the_ci_script_is_the_test_command_of_the_readme():
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert re.findall(r"^make .*$", script.read_text(), re.MULTILINE) == ["make test"]
    assert "make test" in (ROOT / "README.md").read_text(encoding="utf-8")


PRIVATE_PATH = re.compile(r"(?<![\w.~])/(?:home|Users|root|tmp|work)/[\w.]")


def test_no_tracked_text_holds_a_path_of_somebodys_machine():
    found = []
    for path in tracked():
        if path.name == "nbval_sanitize.cfg":  # names the pattern that it removes
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        found += [
            f"{path.relative_to(ROOT)}: {match.group(0)}" for match in PRIVATE_PATH.finditer(text)
        ]
    assert not found, found
