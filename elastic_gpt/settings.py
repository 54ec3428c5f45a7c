"""Settings from a preset, the environment and flags; the last one wins.

All three become one list of flags for one parser, so a typo in any of them gets the same answer:
the wrong name, where it is, and the nearest right one. A preset is a YAML file of nested settings;
`EGPT__MODEL__N_LAYER=6` in the environment and `--model.n-layer 6` on the command line name the
same field.
"""

import ast
import contextlib
import dataclasses
import difflib
import inspect
import io
import itertools
import math
import os
import re
import sys
import textwrap
import types
import typing
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import tyro
import yaml

from prepare.frontdoor import fail as fail
from prepare.frontdoor import utf8

# Types of settings that several modules share. None of them should need torch for these.
Device = Literal["auto", "cpu", "cuda", "mps"]
Resume = Literal["auto", "storage", "memory"]
Traffic = Literal["float32", "bfloat16"]

PREFIX = "EGPT__"
MOST_BYTES = 1 << 20  # largest preset, so that a corpus that is named by mistake is not read


T = TypeVar("T")


class SettingsError(ValueError):
    """A wrong setting that the user can mend. The message is one line with the cure."""


def nearest(name: str, known: Iterable[str]) -> str:
    """`: did you mean 'x'?` with the known name closest to `name`, or a list of all if none is close."""
    names = list(known)
    section, _, leaf = name.rpartition(".")
    leaves = {other: other.rpartition(".")[2] for other in names}
    # The right field in a wrong section is nearer than the distance of the whole names tells, and so is "lr" for
    # "learning_rate".
    near = difflib.get_close_matches(leaf, set(leaves.values()), n=1, cutoff=0.75)
    close = [other for other in names if leaves[other] in near]
    close = close or [other for other in names if leaf == "".join(word[:1] for word in leaves[other].split("_"))]
    close = close or difflib.get_close_matches(name, names, n=1, cutoff=0.4)
    close.sort(key=lambda other: other.rpartition(".")[0] != section)  # names in the same section come first
    return f": did you mean '{close[0]}'?" if close else f": choose from {', '.join(names)}"


def refuse_rounded(traffic: Traffic, *, exact: bool) -> None:
    """Raise SettingsError where gradients would be rounded on their way in a run that is to be exact."""
    if exact and traffic != "float32":
        raise SettingsError(f"traffic {traffic} rounds gradients, and exact mode does not: leave one of the two out")


def node_range(nnodes: str) -> tuple[int, int]:
    """The least and the most nodes, from `MIN:MAX`, or one number for both. Raises ValueError for anything else."""
    match = re.fullmatch(r"(\d+)(?::(\d+))?", nnodes)
    least, most = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
    if not 1 <= least <= most:
        raise ValueError(f"--nnodes {nnodes} is not MIN:MAX with 1 <= MIN <= MAX: write for example --nnodes 2:4")
    return least, most


def field_types(kind: type) -> dict[str, Any]:
    """Dotted name to type of every field of a dataclass and of the dataclasses in it."""
    found: dict[str, Any] = {}
    hints = typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        hint = hints[field.name]
        if dataclasses.is_dataclass(hint):
            found |= {f"{field.name}.{name}": leaf for name, leaf in field_types(typing.cast(type, hint)).items()}
        else:
            found[field.name] = hint
    return found


def field_help(kind: type) -> dict[str, str]:
    """Field name to the docstring under it, for the fields of a dataclass that have one."""
    (definition,) = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
    assert isinstance(definition, ast.ClassDef)
    return {
        field.target.id: " ".join(str(text.value.value).split())
        for field, text in itertools.pairwise(definition.body)
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
        and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant)
    }  # fmt: skip


def parse(
    kind: type[T],
    argv: Sequence[str],
    *,
    presets: Path,
    prog: str,
    environment: Mapping[str, str],
    unheard: Collection[str] = (),
) -> T:
    """Build a `kind` from `argv`: a preset (a name in `presets`, or a path to a YAML file), then flags.

    Args:
        kind: a frozen dataclass of settings, whose sections are dataclasses too.
        argv: the command line.
        presets: the folder of presets.
        prog: name of the command, for messages.
        environment: the variables among which `EGPT__SECTION__FIELD` are settings.
        unheard: settings that the preset does not decide, though it names them.

    Raises:
        SettingsError: for an unknown preset, name or value, wherever it was given.
        SystemExit: after `--help`.
    """
    known = field_types(kind)
    if any(word in ("-h", "--help") for word in argv):
        print(f"usage: {prog} PRESET [--section.field VALUE ...]\n")
        print(f"PRESET is a YAML file or one of: {', '.join(preset_names(presets))}.")
        print(f"A setting also comes from the environment: {PREFIX}SECTION__FIELD=VALUE. Flags win over it.\n")
        tyro.cli(kind, args=["--help"], prog=prog, config=(tyro.conf.FlagConversionOff,))
    for word in argv:
        utf8(word)
    if not argv or not argv[0] or argv[0].startswith("-"):
        raise SettingsError(f"name a preset first, as in `{prog} debug_cpu`: one of {', '.join(preset_names(presets))}")
    preset = find_preset(argv[0], presets)
    variables, flags = _from_environment(environment, known), _from_flags(argv[1:], known)
    for name in variables.keys() & flags.keys():
        if variables[name][0] != flags[name][0]:
            _say(f"{variables[name][1]} has no effect: the flags say --{name} {flags[name][0]}")
    from_preset = {name: value for name, value in _from_preset(preset, known).items() if name not in unheard}
    given = from_preset | variables | flags
    for name, (value, _) in given.items():
        if known[name] is bool:
            given[name] = (str(value).capitalize(), given[name][1])
    try:
        # With an equals sign, since -3 alone would be taken for a flag.
        parsed = _tyro(kind, [f"--{name}={value}" for name, (value, _) in given.items()], prog)
        for name, value in flatten(dataclasses.asdict(parsed)).items():  # type: ignore[call-overload]
            if isinstance(value, float) and not math.isfinite(value):
                raise SettingsError(f"--{name.replace('_', '-')} is {value}: give a number that is finite")
        return parsed
    except SettingsError as error:
        origin = next((where for name, (_, where) in given.items() if f"--{name.replace('_', '-')}" in str(error)), "")
        raise SettingsError(f"{error}{f' (from {origin})' if origin else ''}") from error


def preset_names(presets: Path) -> list[str]:
    return sorted(path.stem for path in presets.glob("*.yaml"))


def find_preset(name: str, presets: Path) -> Path:
    """The path of a preset. `name` is its path, or its name in the folder `presets`."""
    for path in (Path(name), presets / name, presets / f"{name}.yaml"):
        with contextlib.suppress(OSError, ValueError):  # not a path: too long, for example
            if path.is_file():
                return path
    if Path(name).is_dir():
        raise SettingsError(
            f"preset {name} is a folder: name a YAML file, or one of {', '.join(preset_names(presets))}"
        )
    raise SettingsError(f"no preset '{name}'{nearest(name.removesuffix('.yaml'), preset_names(presets))}")


def tree(settings: Any) -> dict[str, Any]:
    """A settings dataclass as the plain values that YAML knows, in the form of a preset."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        return str(value) if isinstance(value, Path) else value

    return {key: plain(value) for key, value in dataclasses.asdict(settings).items()}


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """`{"model": {"n_layer": 4}}` to `{"model.n_layer": 4}`."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


def _known(name: str, known: Mapping[str, Any], where: str) -> str:
    if name not in known:
        raise SettingsError(f"unknown setting '{name}' in {where}{nearest(name, known)}")
    return name


def _from_preset(path: Path, known: Mapping[str, Any]) -> dict[str, tuple[Any, str]]:
    try:
        if path.stat().st_size > MOST_BYTES:
            raise SettingsError(f"preset {path} is too large to be one: name a YAML file of settings")
        tree = yaml.load(path.read_text(encoding="utf-8"), _Loader) or {}
    except OSError as error:
        raise SettingsError(
            f"preset {path} cannot be read ({error.strerror}): name another, or mend its mode"
        ) from error
    except SettingsError:
        raise
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        why = "too deeply nested" if isinstance(error, RecursionError) else " ".join(str(error).split())
        raise SettingsError(f"preset {path} is not YAML: {why}") from error
    if not isinstance(tree, dict):
        raise SettingsError(f"preset {path} holds no settings: write lines like `steps: 1000`")
    where = f"preset {path}"
    given = {_known(name, known, where): (value, where) for name, value in _leaves(tree, known)}
    for name, (value, _) in given.items():
        if isinstance(value, (dict, list)):
            raise SettingsError(f"setting '{name}' in {where} is a {type(value).__name__}: give one value")
    return given


class _Loader(yaml.SafeLoader):
    """YAML's loader that refuses two equal keys, of which the original silently takes the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for name in names:
            if names.count(name) > 1:
                raise yaml.YAMLError(f"'{name}' stands twice in one section (from line {node.start_mark.line + 1})")
        return super().construct_mapping(node, deep)


def _leaves(tree: Mapping[Any, Any], known: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted name and value of each setting in a preset."""
    for key, value in tree.items():
        name = f"{prefix}{key}"
        section = any(other.startswith(f"{name}.") for other in known)
        if section and isinstance(value, Mapping):
            yield from _leaves(value, known, f"{name}.")
        elif not (section and value is None):  # a section with comments only
            yield name, value


def _from_environment(environment: Mapping[str, str], known: Mapping[str, Any]) -> dict[str, tuple[Any, str]]:
    for variable in environment:
        if variable.startswith("EGPT_") and not variable.startswith(PREFIX):
            name = variable.removeprefix("EGPT_").lstrip("_")
            raise SettingsError(f"variable {variable}: a setting's has two underscores, as in {PREFIX}{name}")
        if variable.startswith(PREFIX):
            utf8(f"{variable}={environment[variable]}")
    return {
        _known(variable.removeprefix(PREFIX).lower().replace("__", "."), known, f"variable {variable}"): (
            value,
            f"variable {variable}",
        )
        for variable, value in environment.items()
        if variable.startswith(PREFIX)
    }


def _from_flags(argv: Sequence[str], known: Mapping[str, Any]) -> dict[str, tuple[Any, str]]:
    given: dict[str, tuple[Any, str]] = {}
    words = list(argv)
    while words:
        flag, equals, value = words.pop(0).partition("=")
        if not flag.startswith("--"):
            raise SettingsError(f"'{flag}' is neither a flag nor a flag's value: flags look like --steps 100")
        name = _known(flag[2:].replace("-", "_"), known, "the flags")
        if not equals:
            if words and not words[0].startswith("--"):
                value = words.pop(0)
            elif known[name] is bool:
                value = "True"
            else:
                raise SettingsError(f"flag {flag} needs a value: {flag} {_shape(known[name])}")
        if name in given and given[name][0] != value:
            _say(f"--{name} is given twice: {value} is taken, not {given[name][0]}")
        given[name] = (value, "the flags")
    return given


def _say(note: str) -> None:
    print(f"note: {' '.join(note.split())}", file=sys.stderr, flush=True)


def _shape(hint: Any) -> str:
    """In words, what a value of this type looks like."""
    if typing.get_origin(hint) is Literal:
        return "|".join(str(choice) for choice in typing.get_args(hint))
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        return "|".join(_shape(choice) for choice in typing.get_args(hint))
    return str(getattr(hint, "__name__", hint)).upper()


def _tyro(kind: type[T], args: list[str], prog: str) -> T:
    """Parse with tyro. Its error is a box of several lines, whose first paragraph becomes our message."""
    box = io.StringIO()
    try:
        with contextlib.redirect_stderr(box), contextlib.redirect_stdout(box), _unwrapped():
            return tyro.cli(kind, args=args, prog=prog, config=(tyro.conf.FlagConversionOff,))
    except SystemExit as stop:
        # The box has a title, perhaps a rule, the message, a rule, and advice.
        _, *lines = [line.strip("│╭╮╰╯ ") for line in box.getvalue().splitlines()]
        message = itertools.takewhile(_is_text, itertools.dropwhile(lambda line: not _is_text(line), lines))
        text = " ".join(message) or f"settings refused ({stop.code})"
        text = re.sub(r"^Error parsing (--\S+): (?:invalid literal for int.*10|could not convert string to float):",
                      r"\1 is not a number:", text)  # fmt: skip
        text = re.sub(r"^Error parsing \w+: ", "", text)  # the error of a dataclass, which names the setting itself
        raise SettingsError(text) from None
    except ValueError as error:  # raised by the __post_init__ of a dataclass
        raise SettingsError(str(error)) from error


@contextlib.contextmanager
def _unwrapped() -> Iterator[None]:
    """Have tyro break no line, which it would do within long paths and numbers, too."""
    before = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = "100000"
    try:
        yield
    finally:
        del os.environ["COLUMNS"]
        if before is not None:
            os.environ["COLUMNS"] = before


def _is_text(line: str) -> bool:
    return bool(line.strip("─-"))


def environment() -> Mapping[str, str]:
    return os.environ
