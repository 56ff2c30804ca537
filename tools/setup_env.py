"""Create .venv and install the project into it: `python3 tools/setup_env.py`; called by every
`make` target that needs it.

Standard library only, and written so that an old Python 3 can still read it far enough to say that
it is too old. Does nothing, quickly, when .venv already holds what pyproject.toml and
constraints.txt ask for (a stamp keeps their hash and the interpreter's version).
"""

import hashlib
import os
import shutil
import subprocess
import sys
import time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
OLDEST = (3, 11)
CANDIDATES = ("python3.11", "python3.12", "python3.13", "python3.14")
NEEDED_GB = 4.0
"""The environment with the CPU build of torch takes about 2.5 GB, its wheels about 0.7 GB while
they install."""
NEEDED_CUDA_GB = 12.0
"""With the CUDA build of torch, which is what a plain Linux install downloads."""


class SetupError(Exception):
    """One sentence for the user: what is wrong and the way out."""


def say(sentence):
    """Print at once, also into a pipe."""
    print(f"setup: {sentence}", flush=True)


def version_text(version):
    """(3, 11) -> '3.11'."""
    return ".".join(str(part) for part in version[:2])


def find_python(own=None, candidates=CANDIDATES, runs=None):
    """The interpreter for .venv: the running one if it is new enough, otherwise the first newer one
    on the PATH.

    own: (version tuple, path) of the running interpreter. runs: path -> version tuple or None (a
    broken shim).
    Raises: SetupError when none is new enough.
    """
    version, path = own or (sys.version_info[:2], sys.executable)
    if tuple(version) >= OLDEST:
        return path
    for name in candidates:
        found = shutil.which(name)
        if found and ((runs or python_version)(found) or (0, 0)) >= OLDEST:
            say(f"python3 is {version_text(version)}, too old; using {found}")
            return found
    raise SetupError(
        f"Python {version_text(version)} is too old: {version_text(OLDEST)} or newer is needed and "
        f"none of {', '.join(candidates)} is on the PATH; install one (Debian: apt install "
        "python3.11 python3.11-venv, macOS: brew install python@3.11) and run make again")


def python_version(path):
    """(3, 11) of the interpreter at path, or None if it does not run."""
    try:
        text = subprocess.check_output(
            [path, "-c", "import sys; print('%d %d' % sys.version_info[:2])"],
            stderr=subprocess.DEVNULL, timeout=60).decode()
    except (OSError, subprocess.SubprocessError):
        return None
    return tuple(int(part) for part in text.split())


def check_disk(free_gb, folder, needed_gb=NEEDED_GB):
    """Raises: SetupError when fewer than needed_gb GB are free where .venv goes."""
    if free_gb < needed_gb:
        raise SetupError(
            f"only {free_gb:.1f} GB are free in {folder} and the environment needs {needed_gb:.0f} "
            "GB; free some space or clone the project onto a larger disk, then run make again")


def cuda_hint(free_gb, platform=sys.platform, has_gpu=None, environment=None):
    """On Linux without an NVIDIA driver: how to get the smaller CPU build of torch; None where that
    is settled already."""
    environment = os.environ if environment is None else environment
    indexes = environment.get("PIP_INDEX_URL", "") + environment.get("PIP_EXTRA_INDEX_URL", "")
    settled = "cpu" in indexes or "PIP_FIND_LINKS" in environment
    if has_gpu is None:
        has_gpu = shutil.which("nvidia-smi")
    if not platform.startswith("linux") or settled or has_gpu:
        return None
    hint = ("no NVIDIA driver here; unless your package index offers torch's CPU build, pip "
            "downloads the CUDA build (several GB). For the CPU build stop and run: "
            "PIP_EXTRA_INDEX_URL=<the CPU index that PyTorch's installation page names> make")
    if free_gb < NEEDED_CUDA_GB:
        hint += f" (only {free_gb:.1f} GB are free; the CUDA build wants {NEEDED_CUDA_GB:.0f})"
    return hint


def stamp_text(root, version):
    """What .venv was made from: hash over pyproject.toml and constraints.txt, the place, and the
    interpreter's version."""
    digest = hashlib.sha256((root + " " + version_text(version)).encode())
    for name in ("pyproject.toml", "constraints.txt"):
        with open(os.path.join(root, name), "rb") as file:
            digest.update(file.read())
    return digest.hexdigest() + "\n"


def failure_sentence(log_text, log_path):
    """Why an install failed, from pip's own output, and what to do."""
    errors = [line.strip() for line in log_text.splitlines()
              if line.startswith("ERROR:") or "No space left" in line or "ensurepip" in line]
    reason = errors[0][:240] if errors else "see the log"
    if "No space left" in log_text:
        way_out = "the disk is full: free some space"
    elif "ensurepip" in log_text:
        way_out = "this Python lacks its venv part: install it (Debian: apt install python3-venv)"
    elif "No matching distribution" in log_text or "Could not find a version" in log_text:
        way_out = ("no wheel for this machine, or the package index is out of reach: check the "
                   "network and that Python is 3.11 to 3.14")
    else:
        way_out = "check the network"
    return (f"installing failed ({reason}); {way_out}, then run make again: it goes on from here. "
            f"The whole log is in {log_path}")


def run_logged(command, log_path):
    """Run, keep all output in the log, show the lines that tell progress. Raises: SetupError with
    pip's reason."""
    with open(log_path, "a", encoding="utf-8", errors="replace") as log:
        log.write("$ " + " ".join(command) + "\n")
        try:
            process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE,
                                       stderr=subprocess.STDOUT)
        except OSError as error:
            raise SetupError(
                f"cannot run {command[0]}: {error}; delete .venv and run make again") from error
        for raw in process.stdout:
            line = raw.decode("utf-8", "replace")
            log.write(line)
            if line.startswith(("Collecting ", "Installing collected")):
                print("  " + line.split(" (")[0].strip()[:100], flush=True)
        code = process.wait()
    if code:
        with open(log_path, encoding="utf-8", errors="replace") as log:
            raise SetupError(failure_sentence(log.read(), log_path))


def ensure(root=ROOT, python=None):
    """Make .venv what the project asks for. Returns True if anything was done. Raises:
    SetupError."""
    folder = os.path.join(root, ".venv")
    inside = os.path.join(folder, "bin", "python")
    stamp = os.path.join(folder, "xsd-stamp")
    python = python or find_python()
    version = python_version(inside) if os.path.exists(inside) else None
    if version and os.path.exists(stamp):
        with open(stamp) as file:
            if file.read() == stamp_text(root, version):
                return False
    started = time.time()
    if not version or version < OLDEST:
        free_gb = shutil.disk_usage(root).free / 1e9
        check_disk(free_gb, root)
        say(f"creating .venv with Python {version_text(python_version(python) or OLDEST)} "
            f"({python})")
        if os.path.exists(os.path.join(folder, "pyvenv.cfg")):
            shutil.rmtree(folder)
        os.makedirs(folder, exist_ok=True)
        run_logged([python, "-m", "venv", folder], os.path.join(folder, "install.log"))
        hint = cuda_hint(free_gb)
        if hint:
            say(hint)
    say("installing the project and its pinned dependencies (about 170 wheels; minutes, once)")
    run_logged([inside, "-m", "pip", "install", "--disable-pip-version-check", "--no-input",
                "--only-binary", ":all:", "--constraint", "constraints.txt",
                "--editable", ".[dev]"], os.path.join(folder, "install.log"))
    with open(stamp, "w") as file:
        file.write(stamp_text(root, python_version(inside)))
    say(f"ready in {time.time() - started:.0f} s")
    return True


def lock(root=ROOT):
    """Write constraints.txt from what .venv holds, keeping its comments; torch without its local
    tag, so that every build satisfies it."""
    python = os.path.join(root, ".venv", "bin", "python")
    lines = subprocess.check_output([python, "-m", "pip", "freeze", "--exclude-editable",
                                     "--exclude", "pip", "--exclude", "setuptools"]
                                    ).decode().splitlines()
    # What comes with torch's CUDA build only is left out.
    lines = [line for line in lines if not line.startswith(("nvidia-", "cuda-", "triton"))]
    path = os.path.join(root, "constraints.txt")
    with open(path) as file:
        comments = [line.rstrip("\n") for line in file if line.startswith("#")]
    with open(path, "w") as file:
        file.write("\n".join(comments + [line.split("+")[0] for line in lines]) + "\n")
    say(f"constraints.txt holds {len(lines)} pins; read `git diff constraints.txt`")


def main(arguments):
    try:
        if arguments == ["--lock"]:
            lock()
        else:
            ensure()
    except SetupError as error:
        say(str(error))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
