"""A flag is refused where a file behind it sets the same otherwise, and nowhere else."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from jsonargparse import ActionConfigFile, ArgumentParser, Namespace

from muse_lightning.configuration.allow_list import only_allowed_modules
from muse_lightning.configuration.check import ConfigCheck, parse
from muse_lightning.configuration.layers import read_layers, use_loader
from muse_lightning.errors import UserError


class Attention:
    """What Near and Far are kinds of."""


class Near(Attention):
    def __init__(self, layer: int, width: int = 4) -> None: ...


class Far(Attention):
    def __init__(
        self, layer: int, width: int = 4, top_k: int = 2, inner: Callable[[int], Attention] | None = None
    ) -> None: ...


class Listener:
    """What Printer and Counter are kinds of."""


class Printer(Listener):
    def __init__(self, every: int = 1) -> None: ...


class Counter(Listener):
    def __init__(self, every: int = 1) -> None: ...


@dataclasses.dataclass
class Scaling:
    factor: float = 1.0
    other: float | None = 1.0


@dataclasses.dataclass
class Sizes:
    hidden: int = 1
    depth: int = 1
    scaling: Scaling | None = None


class Model:
    def __init__(
        self,
        sizes: Sizes,
        attention: Callable[[int], Attention] = Near,
        logger: Listener | bool | None = None,
        listeners: list[Listener] | Listener | None = None,
        numbers: list[int] | None = None,
        table: dict[str, int] | None = None,
        rate: float | None = 0.5,
    ) -> None: ...


FLAGS: dict[str, list[str]] = {
    "far": ["--model.attention=Far", "--model.attention.top_k=3"],
    "printer": ["--model.listeners+=Printer", "--model.listeners.every=3"],
}


@pytest.fixture
def parsed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Namespace]:
    """What a command line comes to, with these files: `a` is a.yaml."""
    monkeypatch.chdir(tmp_path)

    def parse_args(args: Sequence[str], **files: str) -> Namespace:
        for name, text in files.items():
            Path(f"{name}.yaml").write_text(text)
        parser = ArgumentParser(exit_on_error=False)
        parser.add_argument("-c", "--config", action=ActionConfigFile)
        parser.add_argument("--steps", type=int, default=8)
        parser.add_class_arguments(Model, "model", sub_configs=True)
        use_loader()
        check = ConfigCheck(parser, {})
        with only_allowed_modules([__name__]):
            for layer in read_layers(args):
                check.add(layer)
            return parse(parser, args, check)

    return parse_args


@pytest.mark.parametrize(
    ("flags", "file", "line"),
    [
        (["--steps=1"], "steps: 8", "--steps=1 stands before --config a.yaml, which sets it to 8"),
        (["--steps", "1"], "steps: 8", "--steps 1 stands before --config a.yaml, which sets it to 8"),
        (
            ["--model.rate=0.1"],
            "model: {rate: null}",
            "--model.rate=0.1 stands before --config a.yaml, which sets it to null",
        ),
        (["--model.rate=null"], "model: {rate: 1.5}", "--model.rate=null stands before --config a.yaml, which sets it"),
        (
            ["--model={rate: 0.1}"],
            "model: {rate: 0.2}",
            "--model={rate: 0.1} stands before --config a.yaml, which sets model.rate to 0.2",
        ),
        (
            ["--model.sizes.scaling.factor=2"],
            "model: {sizes: {scaling: null}}",
            "--model.sizes.scaling.factor=2 stands before --config a.yaml, which sets model.sizes.scaling to null",
        ),
        (
            ["--model.sizes.scaling=null"],
            "model: {sizes: {scaling: {factor: 2}}}",
            "--model.sizes.scaling=null stands before --config a.yaml, which sets model.sizes.scaling.factor to 2",
        ),
        (
            ["--model.sizes.scaling=null"],
            "model: {sizes: {scaling: {other: null}}}",
            "--model.sizes.scaling=null stands before --config a.yaml, which sets model.sizes.scaling.other to null",
        ),
        # A file that a flag names.
        (
            ["--model.sizes=./sizes.yaml"],
            "model: {sizes: {depth: 2}}",
            "--model.sizes=./sizes.yaml stands before --config a.yaml, which sets model.sizes.depth to 2",
        ),
        # Classes and their arguments.
        (
            ["--model.attention=Far"],
            "model: {attention: Near}",
            "--model.attention=Far stands before --config a.yaml, which sets it to Near",
        ),
        (
            FLAGS["far"],
            "model: {attention: {class_path: Far, init_args: {top_k: 12}}}",
            "--model.attention.top_k=3 stands before --config a.yaml, which sets it to 12",
        ),
        (
            ["--model.attention={class_path: Far, init_args: {top_k: 3}}"],
            "model: {attention: {init_args: {top_k: 12}}}",
            "--model.attention={class_path: Far, init_args: {top_k: 3}} stands before --config a.yaml, "
            "which sets model.attention.init_args.top_k to 12",
        ),
        (
            ["--config=far.yaml", "--model.attention.top_k=3"],
            "model: {attention: {class_path: Near, init_args: {}}}",
            "--model.attention.top_k=3 stands before --config a.yaml, which sets model.attention to Near",
        ),
        (
            ["--model.logger=Printer"],
            "model: {logger: false}",
            "--model.logger=Printer stands before --config a.yaml, which sets it to false",
        ),
        (
            ["--model.logger=true"],
            "model: {logger: {class_path: Printer}}",
            "--model.logger=true stands before --config a.yaml, which sets it to Printer",
        ),
        # Lists and mappings, which a file replaces as a whole.
        (
            FLAGS["printer"],
            "model: {listeners: [{class_path: Counter}]}",
            "--model.listeners+=Printer stands before --config a.yaml, "
            'which sets model.listeners to [{"class_path": "Counter"}]',
        ),
        (
            FLAGS["printer"],
            "model: {listeners: {class_path: Counter}}",
            "--model.listeners+=Printer stands before --config a.yaml, "
            'which sets model.listeners to {"class_path": "Counter"}',
        ),
        (
            ["--model.listeners=[]"],
            "model: {listeners: Counter}",
            "--model.listeners=[] stands before --config a.yaml, which sets it to Counter",
        ),
        (
            ["--model.numbers+=1"],
            "model: {numbers: [2]}",
            "--model.numbers+=1 stands before --config a.yaml, which sets model.numbers to [2]",
        ),
        (
            ["--model.table.one=1"],
            "model: {table: {two: 2}}",
            '--model.table.one=1 stands before --config a.yaml, which sets model.table to {"two": 2}',
        ),
    ],
)
def test_refused(parsed: Callable[..., Namespace], flags: list[str], file: str, line: str) -> None:
    far = "model: {attention: {class_path: Far, init_args: {width: 1}}}"
    with pytest.raises(UserError) as refused:
        parsed([*flags, "--config", "a.yaml"], a=file, far=far, sizes="depth: 3")
    assert str(refused.value).startswith(line)
    assert str(refused.value).endswith("; put it behind")


@pytest.mark.parametrize(
    "args",
    [
        ["--steps=1", "--config=a.yaml"],
        ["--steps=1", "-c", "a.yaml"],
        ["--steps=1", "-ca.yaml"],
        ["--config=other.yaml", "--steps=1", "--config=a.yaml"],
        ["--steps=1", "--config=a.yaml", "--config=other.yaml"],
        ["--steps=2", "--config=a.yaml", "--steps=1", "--config=a.yaml"],
    ],
    ids=" ".join,
)
def test_refused_before_any_file_that_sets_it(parsed: Callable[..., Namespace], args: list[str]) -> None:
    with pytest.raises(UserError, match=r"^--steps=1 stands before --config a\.yaml, which sets it to 8; put it beh"):
        parsed(args, a="steps: 8", other="model: {rate: 1.0}")


@pytest.mark.parametrize(
    ("flags", "file", "then", "key", "value"),
    [
        (["--steps=1"], "model: {rate: 1.0}", [], "steps", 1),
        # The same, or behind the file as well.
        (["--steps=8"], "steps: 8", [], "steps", 8),
        (["--steps=8"], "steps: '8'", [], "steps", 8),
        (["--steps=1"], "steps: 8", ["--steps=2"], "steps", 2),
        (["--model.listeners=[{class_path: Counter}]"], "model: {listeners: [{class_path: Counter}]}", [], "steps", 8),
        (FLAGS["printer"], "model: {listeners: [{class_path: Counter}]}", ["--model.listeners=null"], "steps", 8),
        (["--model.sizes.depth=3"], "model: {sizes: {hidden: 2}}", [], "model.sizes.depth", 3),
        (
            ["--model.sizes.scaling.factor=2"],
            "model: {sizes: {scaling: {other: 3}}}",
            [],
            "model.sizes.scaling.factor",
            2,
        ),
        (["--model.sizes=./sizes.yaml"], "model: {sizes: {hidden: 2}}", [], "model.sizes.depth", 3),
        # A class keeps the arguments that it takes.
        (["--model.attention.width=3"], "model: {attention: Far}", [], "model.attention.init_args.width", 3),
        (FLAGS["far"], "model: {attention: {init_args: {width: 1}}}", [], "model.attention.init_args.top_k", 3),
        (FLAGS["far"], "model: {attention: Far}", [], "model.attention.init_args.top_k", 3),
        (
            ["--config=far.yaml", "--model.attention={class_path: Near, init_args: {}}"],
            "model: {attention: {init_args: {width: 7}}}",
            [],
            "model.attention.init_args.width",
            7,
        ),
        # What a file appends leaves what is there.
        (FLAGS["printer"], "model: {listeners+: [{class_path: Counter}]}", [], "model.listeners[0].init_args.every", 3),
        (["--model.numbers=[1]"], "model: {numbers+: [2]}", [], "model.numbers", [1, 2]),
    ],
)
def test_accepted_for_the_flag_counts(
    parsed: Callable[..., Namespace], flags: list[str], file: str, then: list[str], key: str, value: Any
) -> None:
    far = "model: {attention: {class_path: Far, init_args: {top_k: 1}}}"
    found: Any = parsed([*flags, "--config", "a.yaml", *then], a=file, far=far, sizes="depth: 3")
    name, bracket, rest = key.partition("[0].")
    assert (found[name][0][rest] if bracket else found[key]) == value


@pytest.mark.parametrize(
    ("args", "source"),
    [
        (["--model.attention.top_k=3", "--config=a.yaml"], "command line, before --config a.yaml"),
        (["--config=a.yaml", "--model.attention=Near", "--model.attention.top_k=3"], "command line"),
    ],
)
def test_an_argument_of_a_class_that_only_a_file_behind_it_names(
    parsed: Callable[..., Namespace], args: list[str], source: str
) -> None:
    line = rf"^model\.attention\.init_args\.top_k: not a parameter of Near; .* \({source}\)$"
    with pytest.raises(UserError, match=line):
        parsed(args, a="model: {attention: Far}")


def test_a_credential_is_not_shown(parsed: Callable[..., Namespace]) -> None:
    with pytest.raises(UserError) as refused:
        parsed(["--model.table.hf_token=1234", "--config=a.yaml"], a="model: {table: {hf_token: 5678}}")
    assert "1234" not in str(refused.value)
    assert "5678" not in str(refused.value)
