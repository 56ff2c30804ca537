"""Profiles: parameters in a YAML file that a user copies and changes. A name at its top goes to
every notebook that takes it, one under a notebook's number to that notebook alone."""

from pathlib import Path
from typing import Any

from xsd.core import ROOT, ParameterError, reading
from xsd.runs import command_line, parameters, typed

SHIPPED = Path(__file__).parents[1] / "profiles"


def names() -> list[str]:
    """The profiles that come with xsd."""
    return sorted(path.stem for path in SHIPPED.glob("*.yaml"))


def read(profile: str) -> dict[str, Any]:
    """A shipped profile by name, or a YAML file by its path; {} for "". Raises: ParameterError for
    a file that is not there or no profile, and naming the keys that no notebook takes."""
    if not profile:
        return {}
    path = SHIPPED / f"{profile}.yaml" if profile in names() else Path(profile)
    if not path.is_file():
        place = SHIPPED.relative_to(ROOT)
        raise ParameterError(f"there is no profile {typed.shortened(profile)}: "
                             f"{typed.hint(profile, names())}give one of {', '.join(names())} (in "
                             f"{place}), or a YAML file like them")

    def refused(why: str) -> ParameterError:
        return ParameterError(f"the profile {path} cannot be used: {why}")

    with reading(f"the profile {path} cannot be used", ParameterError, "give a YAML file"), open(
            path, encoding="utf-8-sig") as file:
        text = file.read(command_line.MOST_YAML + 1)
    found = command_line.read_yaml(text, refused)
    models = {name.partition("_")[0]: parameters.model_of(name) for name in parameters.NOTEBOOKS}
    known = {one for model in models.values() for one in model.model_fields} - {"run_dir"}
    if unknown := [key for key in found if key not in {*models, *known}]:
        raise refused(f"no notebook takes {', '.join(map(repr, unknown))}; "
                      f"{typed.hint(unknown[0], known)}xsd run NB --help-parameters lists what "
                      "one takes")
    for key in sorted(models.keys() & found):
        if not isinstance(found[key], dict):
            raise refused(f"what stands under {key} must be names and values")
        for name in found[key]:
            models[key].field(name)
    return found


def values(profile: str, given: list[str], *notebooks: str) -> dict[str, dict[str, Any]]:
    """By notebook, what the profile and then ``given`` (name=value, each read as the notebook's own
    type asks) say of it. Raises: ParameterError, also for a name that none of them takes."""
    found, asked = read(profile), {name: parameters.model_of(name) for name in notebooks}
    every = {one for model in asked.values() for one in model.model_fields}
    for pair in given:
        if (name := pair.partition("=")[0]) not in every and len(asked) > 1:
            raise ParameterError(f"none of the notebooks {', '.join(asked)} has a parameter "
                                 f"{typed.shortened(name)}: {typed.hint(name, every)}they take "
                                 f"{', '.join(sorted(every))}")
    out = {}
    for name, model in asked.items():
        fields = model.model_fields
        own = [one for one in given if len(asked) == 1 or one.partition("=")[0] in fields]
        out[name] = ({key: value for key, value in found.items() if key in fields}
                     | found.get(model.notebook.partition("_")[0], {})
                     | command_line.read_values(own, model))
        model.checked(out[name])
    return out
