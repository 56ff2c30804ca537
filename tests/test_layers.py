"""docs/architecture.md's table against the code: who may import whom, no circles, nothing heavy at
import."""

import ast
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "xsd"
PAGE = ROOT / "docs" / "architecture.md"


@dataclass(frozen=True)
class Import:
    """One imported name of xsd: by which module, of which module, on which line; inner means inside
    a function."""

    importer: str
    target: str
    line: int
    inner: bool


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MANY = {"extract": 80}
"""A verb whose options take a line each."""
SOURCES = sorted(PACKAGE.rglob("*.py"))
MODULES = {module_name(path): path for path in SOURCES}
FACES = {name for name, path in MODULES.items() if path.name == "__init__.py"}


def inner_nodes(tree: ast.AST) -> set[ast.AST]:
    functions = [
        node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]
    return {child for function in functions for child in ast.walk(function)}


def imports_of(path: Path) -> list[Import]:
    """Every import of xsd in a file, resolved to the module it names (``from xsd.room import
    module`` is xsd.room.module)."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    inner, name, found = inner_nodes(tree), module_name(path), []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            where = f"{name}:{node.lineno}"
            assert node.level == 0, f"{where} imports relatively; write `from xsd.room import it`"
            origin = node.module or ""
            targets = [
                f"{origin}.{alias.name}" if f"{origin}.{alias.name}" in MODULES else origin
                for alias in node.names
            ]
        else:
            continue
        found += [
            Import(name, target, node.lineno, node in inner) for target in targets
            if target.split(".")[0] == "xsd"
        ]
    return found


IMPORTS = [found for path in SOURCES for found in imports_of(path)]


def room_of(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "xsd"


def table() -> tuple[dict[str, set[str]], dict[tuple[str, str], set[str]]]:
    """The page's table: room -> rooms it may import, and (room, module prefix) -> rooms only those
    modules may import as well."""
    allowed, extra = {}, {}
    for row in re.findall(r"^\| `(\w+)` \|[^|]*\| ([^|]*) \|$", PAGE.read_text(encoding="utf-8"),
                          re.MULTILINE):
        room, text = row
        for prefix, others in re.findall(r"\((\w+) also ([\w, ]+)\)", text):
            extra[room, prefix] = set(re.findall(r"\w+", others))
        plain = re.sub(r"\([^)]*\)", "", text)
        allowed[room] = set(re.findall(r"\w+", plain)) if not plain.startswith(
            ("nothing", "all")) else set()
        if plain.startswith("all"):
            allowed[room] = {"*"}
    return allowed, extra


ALLOWED, EXTRA = table()


def test_the_table_names_every_room_and_no_other():
    rooms = {room_of(name) for name in MODULES} - {"xsd"}
    assert rooms <= set(ALLOWED), f"not in {PAGE.name}: {sorted(rooms - set(ALLOWED))}"
    assert {room for others in ALLOWED.values() for room in others} - {"*"} <= set(ALLOWED)
    missing = set(ALLOWED) - rooms
    assert not missing, f"in {PAGE.name} but not in the code: {sorted(missing)}"


def test_the_table_peels_to_nothing():
    """Take away the rooms that import nothing left; what stays is a circle."""
    left = {
        room: others - {"*"} if "*" not in others else set(ALLOWED) - {room}
        for room, others in ALLOWED.items()
    }
    left = {
        room: others | set().union(*(names for (owner, _), names in EXTRA.items() if owner == room))
        for room, others in left.items()
    }
    assert not peel(left)


def peel(graph: dict[str, set[str]]) -> dict[str, set[str]]:
    """What remains after repeatedly removing nodes that depend on nothing that is left: empty when
    there is no circle."""
    graph = {node: set(others) for node, others in graph.items()}
    while ready := {node for node, others in graph.items() if not (others & graph.keys()) - {node}}:
        graph = {node: others for node, others in graph.items() if node not in ready}
    return graph


def test_peel_finds_a_circle():
    assert peel({"a": {"b"}, "b": set()}) == {}
    assert set(peel({"a": {"b"}, "b": {"a"}, "c": set()})) == {"a", "b"}


def test_rooms_import_only_what_the_table_allows():
    wrong = []
    for found in IMPORTS:
        room, other = room_of(found.importer), room_of(found.target)
        if room == other or other == "xsd" or "*" in ALLOWED.get(room, set()):
            continue
        stem = found.importer.rsplit(".", 1)[-1]
        also = set().union(*(names for (owner, prefix), names in EXTRA.items()
                             if owner == room and stem.startswith(prefix)))
        if other not in ALLOWED.get(room, set()) | also:
            wrong.append(
                f"{found.importer}:{found.line} imports {found.target}; {room} may import "
                f"{sorted(ALLOWED.get(room, set()) | also)}"
            )
    assert not wrong, "\n".join(wrong)


def test_the_command_line_imports_inside_its_verbs():
    outer = [
        f"{found.importer}:{found.line} {found.target}" for found in IMPORTS
        if room_of(found.importer) == "cli" and not found.inner
    ]
    light = ("xsd", "xsd.core", "xsd.cli.app", "xsd.cli.data", "xsd.cli.models",
             "xsd.cli.door", "xsd.cli.exits")
    assert all(entry.split()[-1] in light for entry in outer), outer


def test_modules_are_imported_never_package_faces():
    wrong = [
        f"{found.importer}:{found.line} names {found.target}" for found in IMPORTS
        if found.target in FACES - {"xsd"} or found.target not in MODULES
    ]
    assert not wrong, "import the module itself:\n" + "\n".join(wrong)


def test_modules_import_in_no_circle():
    assert not peel({name: {found.target for found in IMPORTS if found.importer == name}
                     for name in MODULES})


# --- the order inside a room
# ------------------------------------------------------------------------------------------------

HOUSE = {
    room: sorted(name.split(".")[2] for name in MODULES if name.startswith(f"xsd.{room}."))
    for room in sorted({room_of(name) for name in MODULES})
}
"""Room -> its modules, for every room that is a folder."""
HOUSE = {room: stems for room, stems in HOUSE.items() if stems}


def inside(room: str) -> dict[str, set[str]]:
    """Module -> the modules of its own room that it imports."""
    graph: dict[str, set[str]] = {stem: set() for stem in HOUSE[room]}
    for found in IMPORTS:
        importer, target = found.importer.split("."), found.target.split(".")
        if importer[1:2] == target[1:2] == [room] and len(importer) == len(target) == 3:
            graph[importer[2]].add(target[2])
    return graph


def floors() -> dict[str, list[list[str]]]:
    """The page's second table: room -> floors, bottom first, each a list of modules."""
    page = PAGE.read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)` \| ([\w, →]+) \|$", page, re.MULTILINE)
    return {room: [re.findall(r"\w+", floor) for floor in text.split("→")] for room, text in rows}


def lowest_floors(graph: dict[str, set[str]]) -> list[list[str]]:
    """Each module as low as its imports let it stand."""
    graph, found = dict(graph), []
    while graph:
        found.append(sorted(node for node, others in graph.items() if not others & graph.keys()))
        assert found[-1], f"a circle of {sorted(graph)}"
        graph = {node: others for node, others in graph.items() if node not in found[-1]}
    return found


def line(room: str, storeys: list[list[str]]) -> str:
    return f"| `{room}` | " + " → ".join(", ".join(floor) for floor in storeys) + " |"


def against(storeys: list[list[str]], graph: dict[str, set[str]]) -> list[str]:
    """What is wrong with a room's floors: modules not listed once, imports of the same floor or a
    higher one."""
    listed = [stem for floor in storeys for stem in floor]
    wrong = [f"{stem} is listed {listed.count(stem)} times and is there {int(stem in graph)} times"
             for stem in sorted({*listed, *graph}) if listed.count(stem) != (stem in graph)]
    height = {stem: number for number, floor in enumerate(storeys) for stem in floor}
    wrong += [f"{stem} imports {other}, which does not stand below it" for stem in graph
              for other in sorted(graph[stem])
              if stem in height and other in height and height[other] >= height[stem]]
    return wrong


@pytest.mark.parametrize("room", sorted(HOUSE))
def test_modules_of_a_room_import_only_lower_floors(room):
    graph = inside(room)
    proposed = line(room, lowest_floors(graph))
    assert room in floors(), f"{PAGE.name} lists no floors of {room}; these hold today:\n{proposed}"
    wrong = against(floors()[room], graph)
    assert not wrong, "\n".join([*wrong, "floors that hold today:", proposed])


def test_floors_are_checked_both_ways():
    graph = {"events": set(), "frames": {"events"}, "folder": {"events", "frames"}}
    assert lowest_floors(graph) == [["events"], ["frames"], ["folder"]]
    assert against(lowest_floors(graph), graph) == []
    assert against([["events", "frames"], ["folder"]], graph) == [
        "frames imports events, which does not stand below it"
    ]
    assert against([["events"], ["frames"], ["dsec"]], graph) == [
        "dsec is listed 1 times and is there 0 times",
        "folder is listed 0 times and is there 1 times"
    ]
    assert line("sensors", [["events"], ["dsec", "log"]]) == "| `sensors` | events → dsec, log |"


def test_the_package_does_not_know_what_stands_beside_it():
    """Benchmarks, studies and tools import the package; only a verb reaches for them."""
    wrong, beside = [], ("benchmarks", "studies", "tools")
    for path in SOURCES:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        verbs = inner_nodes(tree) if room_of(module_name(path)) == "cli" else set()
        for node in ast.walk(tree):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [
                node.module or ""] if isinstance(node, ast.ImportFrom) else []
            wrong += [f"{module_name(path)}:{node.lineno} imports {name}" for name in names
                      if name.split(".")[0] in beside and node not in verbs]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("face", sorted(FACES))
def test_package_faces_are_a_docstring(face):
    body = ast.parse(MODULES[face].read_text(encoding="utf-8")).body
    assert isinstance(body[0], ast.Expr) and isinstance(
        body[0].value, ast.Constant), f"{face} does not say what it is for"
    kept = {"xsd": ast.Assign, "xsd.cli": ast.FunctionDef}.get(face, ())  # the version; main
    rest = [node for node in body[1:] if not (kept and isinstance(node, kept))]
    assert not rest, f"{face} holds more than a docstring"


def third_party(paths: list[Path]) -> set[str]:
    names = set()
    for path in paths:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                names.add(node.module.split(".")[0])
    return names


def test_decode_knows_no_tokenizer_no_file_no_plot():
    known = third_party(list((PACKAGE / "decode").glob("*.py")))
    assert not known & {
        "transformers", "tokenizers", "safetensors", "pandas", "plotly", "ipywidgets", "pathlib",
        "io", "json", "shutil"
    }


def test_core_needs_the_standard_library_only():
    code = ("import sys, xsd.core; print(sorted({name.split('.')[0] for name in sys.modules} - "
            "set(sys.stdlib_module_names)))")
    others = set(
        ast.literal_eval(
            subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True,
                           cwd=ROOT).stdout))
    assert {name for name in others if not name.startswith(("_", "sitecustomize"))} == {"xsd"}


def test_import_of_the_package_is_fast_and_light():
    code = (
        "import sys, time; started = time.process_time(); import xsd, xsd.core; seconds = "
        "time.process_time() - started\n"
        "print(seconds, [name for name in ('torch', 'transformers', 'plotly', 'pandas', 'numpy') "
        "if name in sys.modules])"
    )
    runs = [
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True,
                       cwd=ROOT).stdout for _ in range(3)
    ]
    seconds = min(float(run.split(maxsplit=1)[0])
                  for run in runs)  # of the processor, best of three: the machine may be busy
    assert seconds <= 0.3
    assert all(run.split(maxsplit=1)[1].strip() == "[]" for run in runs)


def beside() -> dict[str, Path]:
    """The modules of the package and those that stand beside it."""
    paths = [path for folder in ("benchmarks", "studies", "tools")
             for path in (ROOT / folder).rglob("*.py")]
    return MODULES | {module_name(path): path for path in paths}


def test_modules_stay_short():
    long = {name: count for name, path in beside().items()
            if (count := len(path.read_text(encoding="utf-8").splitlines())) > 300}
    assert not long, f"over 300 lines, split by subject: {long}"


def test_functions_stay_short():
    """Sixty lines with the docstring, so that a function is read without scrolling."""
    kinds = ast.FunctionDef | ast.AsyncFunctionDef
    long = {f"{name}.{node.name}": count for name, path in beside().items()
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
            if isinstance(node, kinds)
            and (count := node.end_lineno - node.lineno + 1) > MANY.get(node.name, 60)}
    assert not long, f"over 60 lines: {long}"


def contract_names() -> list[tuple[str, str]]:
    """(room, name) of every function or class that the page's contracts write as a call, such as
    ``read_events(path)``."""
    block = re.search(r"## Contracts.*?```python\n(.*?)```", PAGE.read_text(encoding="utf-8"),
                      re.DOTALL).group(1)
    room, found = "", []
    for line in block.splitlines():
        if heading := re.match(r"# (\w+)", line):
            room = heading.group(1)
        code = line.split("#")[0].split("->")[0]
        found += [(room, name.rsplit(".", 1)[-1])
                  for name in re.findall(r"(?:^|[ ;.{,|]) *([A-Za-z_][\w.]*)\(", code)]
    return [(room, name) for room, name in found
            if name not in {"dataclass", "list", "dict", "tuple", "v"}]


def test_every_name_in_the_contracts_exists():
    defined: dict[str, set[str]] = {}
    for name, path in MODULES.items():
        nodes = [node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))]
        defined.setdefault(room_of(name), set()).update(
            node.name for node in nodes
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef))
    names = contract_names()
    assert len(names) > 40
    missing = sorted(
        {f"{room}: {name}" for room, name in names if name not in defined[room] | defined["core"]})
    assert not missing, f"{PAGE.name} promises what the code does not have: {missing}"
