"""The first mistake of a configuration, in one line.

jsonargparse merges --config files and flags, checks types and builds objects. About a mistake below a class it tells
everything that it tried; about three mistakes it tells nothing: arguments dropped because the class changed, values
that a link overwrites, unknown groups without content. `ConfigCheck` therefore reads the same files and flags in the
same order. The three it refuses at once; what jsonargparse refuses it names by key, value found and values accepted. It
also notes what each sets, for `Order`.
"""

import dataclasses
import inspect
import io
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext, redirect_stderr
from functools import cache
from pathlib import Path
from typing import Any, get_args

from jsonargparse import ArgumentError, ArgumentParser, Namespace

from muse_lightning.configuration.allow_list import ALLOWED_MODULES, is_allowed
from muse_lightning.configuration.imports import NotFoundError, find_object, making, public_path
from muse_lightning.configuration.layers import COMMAND_LINE, Layer, is_file, load_yaml
from muse_lightning.configuration.order import Order
from muse_lightning.configuration.packaged import resolve
from muse_lightning.configuration.types import Accepted, accepted_by, describe
from muse_lightning.errors import UserError, reason_of, suggestion

UNREADABLE = "the configuration cannot be read"
SPEC_KEYS = ("class_path", "init_args", "dict_kwargs")
NO_SETTINGS = {"config", "print_config", "print_shtab"}
"""Options of every parser of a verb that are no keys of a configuration."""


@dataclasses.dataclass
class Spec:
    """A class and the arguments given to it so far, merged over layers. `sources` says which layer set an argument."""

    cls: type
    path: str
    skip: int
    args: dict[str, Any] = dataclasses.field(default_factory=dict)
    sources: dict[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Leaf:
    """A value whose type jsonargparse checks: only looked at when it found a mistake."""

    hint: Any
    value: Any
    source: str


class ConfigCheck:
    """Merges layers as the parser will, and collects mistakes.

    Args:
        parser: the parser of a verb.
        links: target -> source of the values that the command line fills in.
        allowed: modules of --allow_module.
    """

    def __init__(self, parser: ArgumentParser, links: Mapping[str, str], allowed: Sequence[str] = ()) -> None:
        self.parser = parser
        self.links = links
        self.allowed = allowed
        self.merged: dict[str, Any] = {}
        self.problems: list[str] = []
        self.specs: dict[str, Spec] = {}
        self.leaves: dict[str, Leaf] = {}
        self.order = Order()

    def add(self, layer: Layer) -> None:
        """Merge one more layer.

        Raises:
            UserError: it sets a link's target, drops arguments by changing a class, names a module that is not
                allowed or cannot be imported, a file that does not exist, or a group that does not exist.
        """
        self.order.begin(layer)
        if layer.source != COMMAND_LINE:
            # What a flag asks of a class may be meant for one that only this file names.
            end, file = f" ({COMMAND_LINE})", " ".join(layer.given)
            early = f"{end[:-1]}, before {file})"
            self.problems = [each.removesuffix(end) + early * each.endswith(end) for each in self.problems]
        self._merge_args(self.parser, "", "", self.merged, layer.values, layer, owner=None)

    def first_problem(self) -> str | None:
        """The first mistake found in the layers, as one line; None if they look right."""
        return next(self._all_problems(), None)

    def instantiators(self) -> list[tuple[Callable[..., Any], type, bool]]:
        """For `ArgumentParser.instantiate`: how to make objects of the classes of the user's own."""
        keys: dict[type, list[str]] = {}
        for path, spec in self.specs.items():
            if not is_allowed(spec.cls.__module__, ()):
                keys.setdefault(spec.cls, []).append(path)
        return [(making(", ".join(paths)), cls, False) for cls, paths in keys.items()]

    def _all_problems(self) -> Iterator[str]:
        yield from self.problems
        for path, leaf in self.leaves.items():
            refusal = _refusal(leaf.hint, leaf.value)
            if refusal is not None:
                yield f"{path}: {refusal} ({leaf.source})"
        for spec in self.specs.values():
            missing = [name for name in _required(spec.cls, spec.skip) if name not in spec.args]
            if missing:
                yield f"{spec.path}: {spec.cls.__name__} needs {', '.join(missing)}, which is not given"
        absent = [key for key, action in _typed(self.parser).items() if self._is_missing(key, action)]
        if absent:
            yield f"required, but not given: {', '.join(absent)}"

    def _is_missing(self, key: str, action: Any) -> bool:
        """Whether a key has neither a default nor a value."""
        group: Any = self.merged
        for part in key.split("."):
            if not isinstance(group, Mapping) or part not in group:
                return action.default is None and _refusal(action._typehint, None) is not None
            group = group[part]
        return False

    def _merge_args(
        self,
        parser: ArgumentParser,
        prefix: str,
        path: str,
        old: dict[str, Any],
        new: Mapping[str, Any],
        layer: Layer,
        owner: type | None,
    ) -> None:
        """Merge the arguments `new` of a group over `old`: `prefix` is its key in `parser`, `path` its whole key."""
        typed = _typed(parser)
        names = _children(parser, prefix)
        is_top = parser is self.parser and not path
        if is_top:
            names -= NO_SETTINGS
        for written, value in new.items():
            key = str(written).removesuffix("+")
            dest, full = _join(prefix, key), _join(path, key)
            if full in self.links:
                raise UserError(
                    f"{full}: always equals {self.links[full]} and cannot be set, found {value!r} ({layer.source}); "
                    f"set {self.links[full]} instead"
                )
            if key not in names:
                whose = f"a parameter of {owner.__name__}" if owner else "a known option"
                known = names | {"config", "print_config"} if is_top and layer.source == COMMAND_LINE else names
                if parser is self.parser:
                    suggested = self._elsewhere(key) or suggestion(key, known)
                    raise UserError(f"{full}: not {whose}{suggested} ({layer.source})")
                self.problems.append(f"{full}: not {whose}{suggestion(key, known)} ({layer.source})")
            elif dest in typed:
                action = typed[dest]
                before = old.get(key, self._default_spec(action, full))
                old[key] = self._merge_value(action._typehint, before, value, full, layer, written != key)
            else:
                values, inner = self._group_values(value, full, layer)
                base = next((a.basetype for a in parser._actions if a.dest == dest and hasattr(a, "basetype")), None)
                self._merge_args(parser, dest, full, old.setdefault(key, {}), values, inner, base or owner)

    def _elsewhere(self, key: str) -> str:
        """`suggestion` of whole keys that end with `key`: of max_steps, trainer.max_steps."""
        found = [dest for dest in _typed(self.parser) if dest.rpartition(".")[2] == key and dest not in self.links]
        return f"; nearest: {', '.join(found)}" if found else ""

    def _group_values(self, value: Any, full: str, layer: Layer) -> tuple[Mapping[str, Any], Layer]:
        """The values of a group, and the layer they are in: a group may also be the name of a YAML file."""
        if isinstance(value, str):
            file = resolve(value)
            return load_yaml(file, full, layer.folder), Layer(file, {}, (layer.folder / file).parent)
        if isinstance(value, Mapping) and "class_path" in value:
            value = value.get("init_args")
        if isinstance(value, Mapping):
            return value, layer
        found = "null" if value is None else f"{value!r:.100}"
        raise UserError(f"{full}: expected keys with values, found {found} ({layer.source})")

    def _merge_value(self, hint: Any, old: Any, new: Any, path: str, layer: Layer, append: bool = False) -> Any:
        accepted = accepted_by(hint)
        if append:
            items = list(old) if isinstance(old, list) else [] if old is None else [old]
            for value in new if isinstance(new, list) else [new]:
                items.append(self._merge_value(accepted.item, None, value, f"{path}[{len(items)}]", layer))
            return items
        if isinstance(new, list) and accepted.item is not None:
            self.order.set(path, new)
            for stale in [known for known in self.specs if known.startswith(f"{path}[")]:
                del self.specs[stale]
            return [self._merge_value(accepted.item, None, v, f"{path}[{i}]", layer) for i, v in enumerate(new)]
        if isinstance(new, dict) and isinstance(old, list) and old:
            if "class_path" in new:
                self.order.set(path, new)
            old[-1] = self._merge_value(accepted.item, old[-1], new, f"{path}[{len(old) - 1}]", layer)
            return old
        if accepted.classes and (isinstance(new, dict) or (isinstance(new, str) and not accepted.text)):
            return self._merge_spec(accepted, old, new, path, layer)
        if isinstance(new, str) and accepted.importable and "." in new:
            self._require_allowed(new, path, layer)
            if not accepted.text:
                self._find_object(new, accepted, {}, path, layer)
        self.order.set(path, new)
        self.leaves.pop(path, None)
        self.leaves[path] = Leaf(hint, new, layer.source)
        return new

    def _merge_spec(self, accepted: Accepted, old: Any, new: Any, path: str, layer: Layer) -> Spec | None:
        if isinstance(new, str) and (new.endswith((".yaml", ".yml")) or is_file(layer.folder / new)):
            new, layer = load_yaml(new, path, layer.folder), Layer(new, {}, (layer.folder / new).parent)
        spec = {"class_path": new} if isinstance(new, str) else new
        if not any(key in spec for key in SPEC_KEYS):
            spec = {"init_args": spec}
        for key in spec:
            if key not in SPEC_KEYS:
                self.problems.append(
                    f"{path}.{key}: not a known key; accepted: {', '.join(SPEC_KEYS)} ({layer.source})"
                )
        old = old if isinstance(old, Spec) else None
        cls = self._find_class(spec["class_path"], accepted, path, layer) if "class_path" in spec else None
        if cls is None and ("class_path" in spec or (old is None and len(accepted.classes) != 1)):
            return None
        merged = Spec(cls or (old.cls if old else accepted.classes[0]), path, accepted.positional)
        if cls is not None:
            self.order.set(path, cls, with_children=False)
        if old is not None:
            self._keep_arguments(old, merged, layer, given=spec.get("init_args"))
        shown = path if dataclasses.is_dataclass(merged.cls) else f"{path}.init_args"
        given = spec.get("init_args") or {}
        if isinstance(given, Mapping):
            known = set(merged.args)
            self._merge_args(_class_parser(merged.cls, merged.skip), "", shown, merged.args, given, layer, merged.cls)
            merged.sources |= {key: layer.source for key in merged.args if key in given or key not in known}
        self.specs[path] = merged
        return merged

    def _default_spec(self, action: Any, path: str) -> Spec | None:
        """The class that holds as long as no layer names one."""
        if isinstance(action.default, Mapping) and "class_path" in action.default:
            accepted = accepted_by(action._typehint)
            return Spec(find_object(action.default["class_path"], accepted.classes, {}), path, accepted.positional)
        return None

    def _keep_arguments(self, old: Spec, new: Spec, layer: Layer, given: Any) -> None:
        """Carry arguments over to the new class, which must take all of them unless the layer gives it `init_args: {}`;
        its own then come with a later layer."""
        if new.cls is old.cls:
            new.args, new.sources = dict(old.args), dict(old.sources)
            return
        hints = {dest: a._typehint for dest, a in _typed(_class_parser(new.cls, new.skip)).items()}
        for name, value in old.args.items():
            if name in hints and _refusal(hints[name], value) is None:
                new.args[name], new.sources[name] = value, old.sources.get(name, "")
        dropped = [name for name in old.args if name not in new.args]
        for name in dropped:
            self.order.set(new.path, new.cls, covers=f"{new.path}.init_args.{name}")
        if dropped and given != {}:
            names = " and ".join(f"{name}={old.args[name]!r}" for name in dropped)
            source = old.sources.get(dropped[0], "earlier")
            arguments = [f"{new.path}.{name}" for name in given] if isinstance(given, Mapping) else []
            own = f", then {' and '.join(arguments)} in a flag or file after it" if arguments else ""
            raise UserError(
                f"{new.path}: {new.cls.__name__} does not take {names}, given to {old.cls.__name__} ({source}); "
                f"to drop it, write {new.path}: {{class_path: {new.cls.__name__}, init_args: {{}}}}{own}"
            )

    def _find_class(self, name: Any, accepted: Accepted, path: str, layer: Layer) -> type | None:
        base = accepted.classes[0].__name__
        if not isinstance(name, str):
            self.problems.append(f"{path}.class_path: expected the name of a class, found {name!r} ({layer.source})")
            return None
        known = {cls.__name__: cls for root in accepted.classes for cls in _subclasses(root)}
        # The base class of others is rarely what somebody meant to name.
        choices = {key: cls for key, cls in known.items() if len(known) == 1 or cls not in accepted.classes}
        if "." not in name:
            if name not in known:
                self.problems.append(f"{path}: {name!r} is no known {base}{suggestion(name, choices)} ({layer.source})")
            return known.get(name)
        self._require_allowed(name, path, layer)
        found = self._find_object(name, accepted, choices, path, layer)
        if not isinstance(found, type):
            return None
        if not issubclass(found, accepted.classes):
            wanted = suggestion(name, choices)
            if not is_allowed(name, ()):
                wanted = f"; derive it from {' or '.join(map(public_path, accepted.classes))}"
            self.problems.append(f"{path}: {name} is no {base}{wanted} ({layer.source})")
            return None
        abstract: frozenset[str] = getattr(found, "__abstractmethods__", frozenset())
        if abstract:
            lacking = " and ".join(f"{method}()" for method in sorted(abstract))
            self.problems.append(f"{path}: {name} has no {lacking}, which every {base} needs ({layer.source})")
            return None
        return found

    def _find_object(self, name: str, accepted: Accepted, known: Mapping[str, type], path: str, layer: Layer) -> Any:
        """The object that a configuration names; None if there is none.

        Raises:
            UserError: its module is there, and cannot be imported.
        """
        try:
            return find_object(name, accepted.classes, known)
        except NotFoundError as problem:
            self.problems.append(f"{path}: {problem} ({layer.source})")
            return None
        except UserError as error:
            raise UserError(f"{path}: {error} ({layer.source})") from error.__cause__

    def _require_allowed(self, name: str, path: str, layer: Layer) -> None:
        if not is_allowed(name, self.allowed):
            module = name.rpartition(".")[0]
            raise UserError(
                f"{path}: {name} is outside the modules a configuration may name, {', '.join(ALLOWED_MODULES)} "
                f"({layer.source}); to trust it, add --allow_module {module}"
            )


def parse(parser: ArgumentParser, args: Sequence[str], check: ConfigCheck) -> Namespace:
    """The configuration of a command line.

    Raises:
        UserError: it is refused, in one line; or one of its flags counts for nothing, where it stands.
    """
    lost = check.order.lost_flag()
    if lost is not None:
        raise UserError(lost)
    said = io.StringIO()
    # A parser of its own prints the help of a class, and what follows on the line it would refuse at length.
    quiet = redirect_stderr(said) if any(arg.endswith(".help") for arg in args) else nullcontext()
    try:
        with quiet:
            return parser.parse_args(args)
    except SystemExit as stop:
        if not stop.code:
            raise
        raise UserError(" ".join(said.getvalue().split("error: ")[-1].split())[:400]) from stop
    except Exception as error:  # Of values that nobody expected, jsonargparse raises anything.
        raise UserError(explain(error, check)) from error


def explain(error: Exception, check: ConfigCheck) -> str:
    """One line for what jsonargparse refused or failed at: by our own reading of the layers, else from its message."""
    problem = check.first_problem()
    if problem is not None:
        return problem
    if not isinstance(error, ArgumentError):
        return f"{UNREADABLE}: {reason_of(error)}"
    message = str(error)
    denied = _denied_import(error)
    if denied:
        return denied
    return " ".join(message.split())[:400]


def _typed(parser: ArgumentParser) -> dict[str, Any]:
    """The arguments of a parser that have a type, by key."""
    actions = {action.dest: action for action in parser._actions if hasattr(action, "_typehint")}
    return {dest: action for dest, action in actions.items() if not dest.endswith(".help")}


def _join(prefix: str, key: str) -> str:
    return f"{prefix}.{key}" if prefix else key


def _children(parser: ArgumentParser, prefix: str) -> set[str]:
    start = prefix + "." if prefix else ""
    dests = [action.dest for action in parser._actions if action.dest.startswith(start)]
    return {dest[len(start) :].split(".")[0] for dest in dests if not dest.endswith(".help") and dest != "help"}


def _subclasses(cls: type) -> list[type]:
    found: list[type] = [] if inspect.isabstract(cls) else [cls]
    sub: type
    for sub in cls.__subclasses__():
        found += [c for c in _subclasses(sub) if not c.__name__.startswith("_")]
    return found


@cache
def _class_parser(cls: type, skip: int) -> ArgumentParser:
    """A parser of the arguments of a class, without its first `skip` positional ones."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(cls, fail_untyped=False, skip={skip} if skip else None)
    return parser


def _required(cls: type, skip: int) -> list[str]:
    """Parameters of a class that have no default."""
    try:
        parameters = list(inspect.signature(cls).parameters.values())[skip:]
    except ValueError:
        return []
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return [p.name for p in parameters if p.default is p.empty and p.kind not in variadic]


def _refusal(hint: Any, value: Any) -> str | None:
    """Why jsonargparse does not accept the value for the type; None if it does."""
    if isinstance(value, Spec):
        return None if issubclass(value.cls, accepted_by(hint).classes) else f"expected {describe(hint)}"
    if value is None:  # To jsonargparse this is an argument that was not given.
        accepts_null = hint is Any or type(None) in get_args(hint)
        return None if accepts_null else f"expected {describe(hint)}, found null"
    try:
        _value_parser(hint).parse_object({"value": value})
    except Exception as error:  # Also what a type's own check did not expect, such as an OverflowError.
        return _denied_import(error) or f"expected {describe(hint)}, found {value!r:.100}"
    return None


@cache
def _value_parser(hint: Any) -> ArgumentParser:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--value", type=hint)
    return parser


def _denied_import(error: Exception) -> str | None:
    found = re.search(r"Importing '([^']+)' is not allowed", str(error))
    if found and Path(found[1]).is_file():  # to jsonargparse a name with a dot, and nothing else that it accepts
        return f"{found[1]} is read as a class path; a file of the working directory is given as ./{found[1]}"
    return found and f"{found[1]} is outside the modules a configuration may name, {', '.join(ALLOWED_MODULES)}"
