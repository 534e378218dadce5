"""One true sentence for every mistake in files and flags, at any depth; and silence about what is right."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import pytest
from jsonargparse import ActionConfigFile, ArgumentError, ArgumentParser

from muse_lightning.configuration.allow_list import only_allowed_modules
from muse_lightning.configuration.check import ConfigCheck, explain
from muse_lightning.configuration.layers import read_layers
from muse_lightning.errors import UserError


class Strategy:
    """What Near and Far are kinds of."""


class Near(Strategy):
    def __init__(self, layer: int, width: int = 4, kind: Literal["fast", "slow"] = "fast") -> None: ...


class Far(Strategy):
    def __init__(
        self, layer: int, width: int = 4, top_k: int = 2, inner: Callable[[int], Strategy] | None = None
    ) -> None: ...


class Listener:
    """What Printer is a kind of."""


class Printer(Listener):
    def __init__(self, path: Path, every: int = 1, then: Callable | None = None) -> None: ...


@dataclasses.dataclass
class Scaling:
    factor: float = 1.0


@dataclasses.dataclass
class Sizes:
    hidden: int
    scaling: Scaling | None = None


class Model:
    def __init__(
        self,
        sizes: Sizes,
        attention: Callable[[int], Strategy] = Near,
        betas: tuple[float, float] = (0.9, 0.95),
        listeners: list[Listener] | Listener | None = None,
        seq_len: int = 8,
    ) -> None: ...


@pytest.fixture
def parse(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str | None]:
    """Parse a command line as the verbs do; the error's line, or None."""
    monkeypatch.chdir(tmp_path)

    def parse_args(args: Sequence[str], **files: str) -> str | None:
        for name, text in files.items():
            Path(f"{name}.yaml").write_text(text)
        parser = ArgumentParser(exit_on_error=False)
        parser.add_argument("-c", "--config", action=ActionConfigFile)
        parser.add_argument("--length", type=int, default=8)
        parser.add_class_arguments(Model, "model", sub_configs=True)
        parser.link_arguments("length", "model.seq_len")
        check = ConfigCheck(parser, {"model.seq_len": "length"})
        with only_allowed_modules([__name__]):
            try:
                for layer in read_layers(args):
                    check.add(layer)
                parser.parse_args(args)
            except UserError as error:
                return str(error)
            except ArgumentError as error:
                return explain(error, check)
        return None

    return parse_args


@pytest.mark.parametrize(
    ("yaml", "line"),
    [
        ("lenght: 3", "lenght: not a known option; nearest: length (a.yaml)"),
        ("hidden: 3", "hidden: not a known option; nearest: model.sizes.hidden (a.yaml)"),
        ("model: {hidden: 3}", "model.hidden: not a parameter of Model; nearest: model.sizes.hidden (a.yaml)"),
        ("seq_len: 3", "seq_len: not a known option; accepted: length, model (a.yaml)"),
        ("extra: {}", "extra: not a known option; accepted: length, model (a.yaml)"),
        ("config: {}", "config: not a known option; accepted: length, model (a.yaml)"),
        ("print_config: {}", "print_config: not a known option; accepted: length, model (a.yaml)"),
        ("print_shtab: {}", "print_shtab: not a known option; accepted: length, model (a.yaml)"),
        (r'model: {attention: "a\0b"}', "--config: cannot read a.yaml: 'a\\x00b' has a null byte"),
        ("model: {betas: [1, a]}", "model.betas: expected [a number, a number], found [1, 'a'] (a.yaml)"),
        ("model: {atention: Near}", "model.atention: not a parameter of Model; nearest: attention (a.yaml)"),
        ("model: 3", "model: expected keys with values, found 3 (a.yaml)"),
        ("model: {sizes: {hiden: 3}}", "model.sizes.hiden: not a parameter of Sizes; nearest: hidden (a.yaml)"),
        ("model: {sizes: {hidden: big}}", "model.sizes.hidden: expected an integer, found 'big' (a.yaml)"),
        (
            "model: {sizes: {scaling: {factr: 2}}}",
            "model.sizes.scaling.factr: not a parameter of Scaling; nearest: factor (a.yaml)",
        ),
        (
            "model: {sizes: {scaling: {factor: x}}}",
            "model.sizes.scaling.factor: expected a number, found 'x' (a.yaml)",
        ),
        ("model: {attention: Neer}", "model.attention: 'Neer' is no known Strategy; nearest: Near (a.yaml)"),
        (
            "model: {attention: {class_path: Far, init_args: {topk: 3}}}",
            "model.attention.init_args.topk: not a parameter of Far; nearest: top_k (a.yaml)",
        ),
        (
            "model: {attention: {class_path: Far, init_args: {top_k: many}}}",
            "model.attention.init_args.top_k: expected an integer, found 'many' (a.yaml)",
        ),
        (
            "model: {attention: {class_path: Near, init_args: {kind: quick}}}",
            "model.attention.init_args.kind: expected one of fast, slow, found 'quick' (a.yaml)",
        ),
        (
            "model: {attention: {class_path: Near, initargs: {}}}",
            "model.attention.initargs: not a known key; accepted: class_path, init_args, dict_kwargs (a.yaml)",
        ),
        (
            "model: {attention: {class_path: Far, init_args: {inner: {class_path: Near, init_args: {widht: 1}}}}}",
            "model.attention.init_args.inner.init_args.widht: not a parameter of Near; nearest: width (a.yaml)",
        ),
        (
            "model: {listeners: [{class_path: Printer, init_args: {path: x}}, {class_path: Printr}]}",
            "model.listeners[1]: 'Printr' is no known Listener; nearest: Printer (a.yaml)",
        ),
        (
            "model: {listeners: [{class_path: Printer, init_args: {path: x, evry: 2}}]}",
            "model.listeners[0].init_args.evry: not a parameter of Printer; nearest: every (a.yaml)",
        ),
        ("model: {listeners: [{class_path: Printer}]}", "model.listeners[0]: Printer needs path, which is not given"),
        (
            "model: {listeners: [{class_path: Printer, init_args: {path: x, then: os.system}}]}",
            "model.listeners[0].init_args.then: os.system is outside the modules a configuration may name, torch, "
            "lightning, litdata, muse_lightning (a.yaml); to trust it, add --allow_module os",
        ),
        (
            "model: {listeners: [{class_path: Printer, init_args: {path: x, then: torch.os.system}}]}",
            "model.listeners[0].init_args.then: posix.system is outside the modules a configuration may name, torch, "
            "lightning, litdata, muse_lightning (a.yaml)",
        ),
        (
            "model: {attention: torch.nn.Linear}",
            "model.attention: torch.nn.Linear is no Strategy; accepted: Far, Near (a.yaml)",
        ),
        (
            "model: {seq_len: 8}",
            "model.seq_len: always equals length and cannot be set, found 8 (a.yaml); set length instead",
        ),
        ("model: [1", "--config: a.yaml is not YAML at line 2, column 1: did not find expected ',' or ']'"),
        ("- 1", "--config: a.yaml holds [1]; expected keys with values, such as `trainer:`"),
        ("model: {sizes: none.yaml}", "model.sizes: no file none.yaml; nearest: a.yaml"),
        ("model: {attention: none.yaml}", "model.attention: no file none.yaml; nearest: a.yaml"),
        ("model: {listeners: [none.yaml]}", "model.listeners[0]: no file none.yaml; nearest: a.yaml"),
        ("model: {sizes: 75m.yaml}", "model.sizes: no file 75m.yaml; packaged: presets/75m.yaml"),
        ("model: {attention: Near}", "required, but not given: model.sizes.hidden"),
        ("model: {sizes: {hidden: null}}", "model.sizes.hidden: expected an integer, found null (a.yaml)"),
    ],
)
def test_a_mistake_in_a_file(parse: Callable[..., str | None], yaml: str, line: str) -> None:
    assert parse(["--config", "a.yaml"], a=yaml) == line


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        ("--lenght=3", "lenght: not a known option; nearest: length (command line)"),
        ("--length three", "length: expected an integer, found 'three' (command line)"),
        ("--model.sizes.hiden=3", "model.sizes.hiden: not a parameter of Sizes; nearest: hidden (command line)"),
        ("--model.attention=Neer", "model.attention: 'Neer' is no known Strategy; nearest: Near (command line)"),
        (
            "--model.attention=Far --model.attention.topk 3",
            "model.attention.init_args.topk: not a parameter of Far; nearest: top_k (command line)",
        ),
        (
            "--model.attention.top_k=3",
            "model.attention.init_args.top_k: not a parameter of Near; accepted: kind, width (command line)",
        ),
        (
            "--model.listeners+=Printer --model.listeners.path=x --model.listeners.evry=3",
            "model.listeners[0].init_args.evry: not a parameter of Printer; nearest: every (command line)",
        ),
        (
            "--model.attention=evil.Thing",
            "model.attention: evil.Thing is outside the modules a configuration may name, torch, lightning, litdata, "
            "muse_lightning (command line); to trust it, add --allow_module evil",
        ),
        ("stray", "stray: not a known option; accepted: config, length, model, print_config (command line)"),
        ("--config none.yaml", "--config: no file none.yaml"),
        ("--config recipes/demo.yaml", "--config: no file recipes/demo.yaml; packaged: recipe:demo"),
        ("--config demo", "--config: no file demo; packaged: recipe:demo"),
        ("--config smoke.yaml", "--config: no file smoke.yaml; packaged: recipe:overlays/smoke"),
        (
            "--model.seq_len=9",
            "model.seq_len: always equals length and cannot be set, found 9 (command line); set length instead",
        ),
    ],
)
def test_a_mistake_in_flags(parse: Callable[..., str | None], flags: str, line: str) -> None:
    assert parse(["--model.sizes.hidden=3", *flags.split()]) == line


def test_a_file_of_the_working_directory_needs_a_slash(parse: Callable[..., str | None]) -> None:
    line = parse(["--model.sizes=mine.yaml"], mine="hidden: 3")
    assert line == "mine.yaml is read as a class path; a file of the working directory is given as ./mine.yaml"
    assert parse(["--model.sizes=./mine.yaml"]) is None


@pytest.mark.parametrize(
    "flags",
    [
        "--model.attention=Far --model.attention.top_k=3",
        "--model.attention=Far --model.attention.init_args.inner=Near --model.attention.init_args.inner.width=2",
        "--model.listeners+=Printer --model.listeners.path=x --model.listeners+=Printer --model.listeners.path=y",
        "--model.sizes.scaling.factor=2.5 --model.betas=[0.8,0.9]",
        "--model.attention={class_path:\u00a0Far} --length 9",
        "--config a.yaml --model.attention.width=8",
        "-c a.yaml -c=b.yaml",
    ],
)
def test_what_is_right_passes(parse: Callable[..., str | None], flags: str) -> None:
    args = [flag.replace("\u00a0", " ") for flag in flags.split(" ")]
    far = "model: {attention: {class_path: Far, init_args: {top_k: 3, width: 1}}}"
    assert parse(["--model.sizes.hidden=3", *args], a=far, b="model: {attention: {init_args: {top_k: 5}}}") is None


def test_a_sub_configuration_is_read_where_it_is_named(parse: Callable[..., str | None], tmp_path: Path) -> None:
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts" / "far.yaml").write_text("class_path: Far\ninit_args: {topk: 3}\n")
    (tmp_path / "parts" / "main.yaml").write_text("model: {sizes: {hidden: 3}, attention: far.yaml}\n")
    line = "model.attention.init_args.topk: not a parameter of Far; nearest: top_k (far.yaml)"
    assert parse(["--config=parts/main.yaml"]) == line


class TestAnotherClass:
    FAR = "model: {sizes: {hidden: 3}, attention: {class_path: Far, init_args: {top_k: 3, width: 1}}}"
    LINE = (
        "model.attention: Near does not take top_k=3, given to Far (a.yaml); "
        "to drop it, write model.attention: {class_path: Near, init_args: {}}"
    )

    @pytest.mark.parametrize(
        ("flag", "then"),
        [
            ("Near", ""),
            ("{class_path: Near}", ""),
            (
                "{class_path: Near, init_args: {kind: slow}}",
                ", then model.attention.kind in a flag or file after it",
            ),
        ],
    )
    def test_arguments_it_has_not_are_an_error(self, parse: Callable[..., str | None], flag: str, then: str) -> None:
        assert parse(["--config=a.yaml", f"--model.attention={flag}"], a=self.FAR) == self.LINE + then

    def test_its_own_come_after_those_are_dropped(self, parse: Callable[..., str | None]) -> None:
        flags = ["--model.attention={class_path: Near, init_args: {}}", "--model.attention.kind=slow"]
        assert parse(["--config=a.yaml", *flags], a=self.FAR) is None

    def test_also_from_file_to_file(self, parse: Callable[..., str | None]) -> None:
        other = "model: {attention: {class_path: Near}}"
        assert parse(["--config=a.yaml", "--config=b.yaml"], a=self.FAR, b=other) == self.LINE

    def test_empty_arguments_say_that_they_shall_go(self, parse: Callable[..., str | None]) -> None:
        assert parse(["--config=a.yaml", "--model.attention={class_path: Near, init_args: {}}"], a=self.FAR) is None

    def test_arguments_it_has_are_kept(self, parse: Callable[..., str | None]) -> None:
        near = "model: {sizes: {hidden: 3}, attention: {class_path: Near, init_args: {width: 1}}}"
        assert parse(["--config=a.yaml", "--model.attention=Far"], a=near) is None
