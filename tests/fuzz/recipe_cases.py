"""Command lines made of broken recipes and flags: a grammar of what users mistype and attackers try."""

import copy
import json
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml

from muse_lightning.configuration.packaged import recipes_folder

Tree = dict[str, Any]

CLASSES = [
    *("Muse", "Dense", "SlidingWindow", "SpatialBlocks", "Timer", "ModelCheckpoint", "LambdaCallback", "Folders"),
    *("PythonPackages", "Archives", "Tables", "ExactTail", "LearningRateMonitor", "TensorBoardLogger", "Nobody", ""),
    *("evil.Evil", "os.system", "torch.os.system", "builtins.eval", "torch", "torch.", ".", "..", "a..b", "torch..nn"),
    *("torch.load", "torch.nn.Linear", "torch.no.such", "lightning.pytorch.callbacks.Timer", "lightning.Trainer"),
    *("muse_lightning.attention.Dense", "muse_lightning.errors.UserError", "muse_lightning.attention.Muse.forward"),
    *("litdata.StreamingDataset", "lightning.pytorch.callbacks.Callback", "torch.Tensor", "muse_lightning.cli"),
]
NUMBERS = [0, 1, -1, 2, 7, 2**31, 2**63, -(2**64), 10**400, 1e308, -0.0, 1.5, float("inf"), float("-inf"), float("nan")]
TEXTS = [
    *(
        "",
        " ",
        "null",
        "~",
        "true",
        "yes",
        "nan",
        "1e400",
        "1e-3",
        "0x10",
        "0o17",
        "1_000",
        "1:30",
        "2026-01-01",
        "-",
        "--",
    ),
    *(
        "é",
        "\u202e",
        "\U0001f600",
        "\x7f",
        "a\nb",
        "a\tb",
        "#",
        "a: b",
        "a: [",
        "[",
        "{",
        "}",
        "[1",
        "{a",
        "&a",
        "*a",
        "!t",
    ),
    *(
        "presets/75m.yaml",
        "presets/no.yaml",
        "recipe:demo",
        "recipe:../x",
        "part.yaml",
        "broken.yaml",
        "self.yaml",
        "folder",
    ),
    *(
        "bin.yaml",
        "/",
        "..",
        "/dev/null",
        "http://127.0.0.1:1/a",
        "s3://u:p@b/k?token=x",
        "~/x",
        "~nobody/x",
        "$HOME",
        "%s",
        "{0}",
        "\\",
    ),
    *("last", "best", "auto", "gpu", "cpu", "bf16-mixed", "sharded", "ddp", "x" * 5000, "-" * 3000, "a." * 400 + "b"),
]
KEYS = [
    *(
        "class_path",
        "init_args",
        "dict_kwargs",
        "config",
        "help",
        "print_config",
        "__class__",
        "__init__",
        "self",
        "",
        "+",
    ),
    *(
        "items",
        "keys",
        "clone",
        "get",
        "as_dict",
        "update",
        "pop",
        "a.b",
        "model.config",
        "x+",
        "-x",
        "--x",
        " ",
        "é",
        "cls",
    ),
    *("seed_everything", "callbacks+", "run", "trainer", "data", "model", "<<", "resume", "ckpt_path", "allow_module"),
]
RAW = [
    "&a [*a]",
    "&a {b: *a}",
    "*nowhere",
    "!!python/object/apply:os.system ['touch ran']",
    "!!python/name:os.system",
    "!!binary aGVsbG8=",
    "!!binary '***'",
    "!!set {a, b}",
    "!!omap [a: 1, b: 2]",
    "!!pairs [a: 1, a: 2]",
    "!!timestamp 2026-01-01",
    "!!int many",
    "!!float '.'",
    "!!str 1",
    "!own {a: 1}",
    "{<<: {a: 1}}",
    "{<<: 3}",
    "{<<: [1]}",
    "{? [a] : b}",
    "{? {a: 1} : b}",
    "{1: a, 2.5: b, null: c, true: d}",
    "{a: 1, a: 2}",
    "{class_path: Muse, class_path: Dense}",
    "0b1",
    "190:20:30",
    "|\n  text\n   more",
    ">-\n  folded",
    "'unclosed",
    '"\\x00"',
    '"\\ud800"',
    "%TAG ! x",
    "--- a\n--- b",
    "...",
    "\t1",
    "@at",
    "`tick`",
]


@dataclass(frozen=True)
class Case:
    """A command line, and the files that it finds in the working directory."""

    verb: str
    args: list[str]
    files: dict[str, str] = field(default_factory=dict)
    """Name -> content, each character a byte (latin-1)."""

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "Case":
        return cls(**json.loads(text))

    def write(self, folder: Path) -> None:
        for name, content in self.files.items():
            (folder / name).write_bytes(content.encode("latin-1"))


def bombs() -> list[str]:
    """YAML that is short and means much, or is nested deeply."""
    laughs = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    laughs += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12)]
    flow = "{" + ", ".join(laughs) + "}"
    merges = ["a0: &a0 {k: 1}"] + [f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 9)}]}}" for i in range(1, 10)]
    depths = (20, 60, 150, 300, 1000, 5000)
    nested = [text for depth in depths for text in ("[" * depth + "]" * depth, "{a: " * depth + "1" + "}" * depth)]
    nested += ["".join(f"{' ' * i}a:\n" for i in range(depth)) for depth in (100, 900)]
    nested += ["- " * depth + "x" for depth in (100, 900)]
    return [flow, "{" + ", ".join(merges) + "}", *nested, "[" * 5000, "{" * 5000, "9" * 5000, "!" * 3000, "? " * 2000]


class Grammar:
    """Random command lines of a seed."""

    def __init__(self, seed: int, keys: Sequence[str]) -> None:
        self.random = random.Random(seed)
        self.keys = list(keys)
        """Whole keys that the parser knows."""
        folder = recipes_folder()
        recipes = sorted(folder.glob("*.yaml")) + sorted(folder.glob("overlays/*.yaml"))
        self.texts = [path.read_text() for path in recipes]
        self.trees = [yaml.safe_load(text) for text in self.texts]
        self.data_trees = [yaml.safe_load(path.read_text()) for path in sorted(folder.glob("data/*.yaml"))]
        self.bombs = bombs()
        self.names = sorted(
            {name for tree in self.trees for name in _names(tree)} | {key.split(".")[-1] for key in keys}
        )

    def case(self) -> Case:
        """One more command line."""
        pick = self.random.random()
        make: Callable[[], Case]
        if pick < 0.5:
            make = self._broken_tree
        elif pick < 0.8:
            make = self._flags
        elif pick < 0.93:
            make = self._raw_value
        else:
            make = self._broken_text
        return make()

    def value(self, depth: int = 0) -> Any:
        """Any value, of a wrong kind as often as not."""
        r = self.random
        kind = r.random()
        if kind < 0.2:
            return r.choice(NUMBERS)
        if kind < 0.4:
            return r.choice(TEXTS)
        if kind < 0.5:
            return None
        if kind < 0.58:
            return r.choice([True, False])
        if kind < 0.66:
            return r.choice(CLASSES)
        if kind < 0.84 or depth > 2:
            return self.spec(depth + 1) if depth <= 2 else r.choice([[], {}])
        if kind < 0.92:
            return [self.value(depth + 1) for _ in range(r.randint(0, 3))]
        return {self.key(): self.value(depth + 1) for _ in range(r.randint(0, 3))}

    def key(self) -> Any:
        r = self.random
        return (
            r.choice(KEYS)
            if r.random() < 0.5
            else r.choice(self.names)
            if r.random() < 0.9
            else r.choice([1, None, True, 2.5])
        )

    def spec(self, depth: int) -> Tree:
        """Something with a class path, whole or not."""
        r = self.random
        made: Tree = {"class_path": r.choice(CLASSES) if r.random() < 0.85 else self.value(depth)}
        if r.random() < 0.6:
            arguments = {self.key(): self.value(depth) for _ in range(r.randint(0, 3))}
            made["init_args"] = arguments if r.random() < 0.8 else self.value(depth)
        if r.random() < 0.15:
            made[r.choice(["dict_kwargs", "extra", "init_arg", ""])] = self.value(depth)
        return made

    def _verb(self) -> str:
        return self.random.choices(["fit", "prepare", "info"], [8, 1, 1])[0]

    def _tree(self) -> Tree:
        """A recipe, of which most lines are left out: what has a default costs time alone."""
        r = self.random
        tree = copy.deepcopy(r.choice(self.trees if r.random() < 0.95 else self.data_trees))
        if r.random() < 0.7:
            for group in [tree, *(value for value in tree.values() if isinstance(value, dict))]:
                for key in list(group):
                    if r.random() < 0.5 and key not in ("config", "model"):
                        del group[key]
        return tree

    def _broken_tree(self) -> Case:
        tree = self._tree()
        for _ in range(self.random.choice([0, 1, 1, 1, 1, 2, 3])):
            self._mutate(tree)
        return Case(self._verb(), ["--config=a.yaml", *self._few_flags()], {"a.yaml": _dump(tree)})

    def _mutate(self, tree: Tree) -> None:
        r = self.random
        holder, key = r.choice(list(_places(tree)) or [(tree, "x")])
        fault = r.choice(["value", "value", "value", "remove", "add", "rename", "move", "wrap", "copy", "append"])
        if fault == "value" or key not in holder:
            holder[key] = self.value()
        elif fault == "remove":
            del holder[key]
        elif fault == "add":
            holder[self.key()] = self.value()
        elif fault == "rename":
            name = str(key)
            at = r.randint(0, len(name))
            holder[r.choice([name[:at] + name[at + 1 :], name[:at] + "x" + name[at:], name + "+", self.key()])] = (
                holder.pop(key)
            )
        elif fault == "move":
            other, _ = r.choice(list(_places(tree)))
            other[self.key()] = copy.deepcopy(holder.pop(key))
        elif fault == "wrap":
            value = holder[key]
            holder[key] = r.choice(
                [[value], {"class_path": value}, {"init_args": value}, {key: value}, [value, value], str(value)]
            )
        elif fault == "copy":
            other, there = r.choice(list(_places(tree)))
            other[there] = copy.deepcopy(holder[key])
        else:
            holder[f"{key}+"] = self.value()

    def _few_flags(self) -> list[str]:
        return self._some_flags(1) if self.random.random() < 0.15 else []

    def _some_flags(self, most: int) -> list[str]:
        flags: list[str] = []
        for _ in range(self.random.randint(1, most)):
            flags += self._flag()
        return flags

    def _flag(self) -> list[str]:
        r = self.random
        key = r.choice(self.keys)
        form = r.random()
        if form < 0.15:
            key += "." + r.choice(["class_path", "init_args", "init_args.chunk", "chunk", "path", "x", "dict_kwargs.a"])
        elif form < 0.22:
            key += "+"
        elif form < 0.27:
            key = r.choice(KEYS)
        elif form < 0.3:
            key += r.choice([".", "..", ".help", "[0]", " ", "é", ".0", ".-1"])
        value = self._flag_value()
        shape = r.random()
        if shape < 0.75:
            return [f"--{key}={value}"]
        if shape < 0.9:
            return [f"--{key}", value]
        return [
            r.choice(
                [f"--{key}", key, f"-{key}", f"--{key}==", f"-c{value}", f"-c={value}", "--", "-", value, f"--no_{key}"]
            )
        ]

    def _flag_value(self) -> str:
        r = self.random
        kind = r.random()
        if kind < 0.6:
            value = self.value()
            return value if isinstance(value, str) else json.dumps(value, skipkeys=True) if kind < 0.3 else str(value)
        if kind < 0.85:
            return r.choice(TEXTS)
        if kind < 0.97:
            return r.choice(RAW)
        return r.choice([*self.bombs, "\udcff", "a\0b"])

    def _flags(self) -> Case:
        r = self.random
        files = {"a.yaml": _dump(self._tree())} if r.random() < 0.7 else {}
        args = ["--config=a.yaml"] if files else ["--config=recipe:demo"] if r.random() < 0.1 else []
        args += self._some_flags(3)
        if r.random() < 0.1:
            r.shuffle(args)
        return Case(self._verb(), args, files)

    def _raw_value(self) -> Case:
        """YAML that no writer would write, as a value anywhere or as the whole file."""
        r = self.random
        raw = r.choice(self.bombs) if r.random() < 0.2 else r.choice(RAW)
        key = r.choice(self.keys) if r.random() < 0.85 else ""
        text = _dump(self._tree()) if r.random() < 0.3 else ""
        second = raw
        for part in reversed(key.split(".") if key else []):
            second = f"{{{part}: {second}}}" if "\n" not in second else f"{part}:\n  " + second.replace("\n", "\n  ")
        args = ["--config=a.yaml", "--config=b.yaml"] if text else ["--config=b.yaml"]
        return Case(self._verb(), args, {"b.yaml": _latin(second + "\n")} | ({"a.yaml": text} if text else {}))

    def _broken_text(self) -> Case:
        """A recipe's text with lines lost, repeated, indented, and bytes changed."""
        r = self.random
        lines = [line for line in r.choice(self.texts).splitlines() if not line.startswith("#")]
        for _ in range(r.randint(1, 3)):
            at = r.randrange(len(lines))
            fault = r.choice(["remove", "repeat", "indent", "outdent", "cut", "byte", "comment", "swap", "tab"])
            if fault == "remove" and len(lines) > 1:
                del lines[at]
            elif fault == "repeat":
                lines.insert(at, lines[at])
            elif fault == "indent":
                lines[at] = " " * r.randint(1, 3) + lines[at]
            elif fault == "outdent":
                lines[at] = lines[at].removeprefix(" " * r.randint(1, 3))
            elif fault == "cut":
                lines = lines[: at + 1]
            elif fault == "byte":
                position = r.randint(0, len(lines[at]))
                inserted = chr(r.randrange(256)) if r.random() < 0.5 else r.choice(":{}[],&*#?|->!%@`'\"\\")
                lines[at] = lines[at][:position] + inserted + lines[at][position + r.randint(0, 1) :]
            elif fault == "swap":
                other = r.randrange(len(lines))
                lines[at], lines[other] = lines[other], lines[at]
            elif fault == "tab":
                lines[at] = "\t" + lines[at]
        return Case(self._verb(), ["--config=a.yaml"], {"a.yaml": _latin("\n".join(lines) + "\n")})


def _places(tree: Any) -> Iterator[tuple[Tree, Any]]:
    """Every mapping with a key of it, at any depth."""
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield tree, key
            yield from _places(value)
    elif isinstance(tree, list):
        for value in tree:
            yield from _places(value)


def _names(tree: Any) -> set[str]:
    return {str(key) for _, key in _places(tree)}


def _dump(tree: Tree) -> str:
    return _latin(yaml.safe_dump(tree, sort_keys=False, allow_unicode=True))


def _latin(text: str) -> str:
    """UTF-8 bytes, each as a character."""
    return text.encode("utf-8", "surrogatepass").decode("latin-1")
