"""Configurations that name code: nothing outside the allowed modules is imported, nothing runs, nothing is written."""

import sys
from pathlib import Path
from typing import Any

import pytest
from jsonargparse import ArgumentParser, set_parsing_settings
from lightning.pytorch.callbacks import Callback

from tests.recipe import Muse


class TestHostileConfiguration:
    """Each attack first works on a parser without the allow-list, then is refused with nothing imported or written."""

    ATTACKS = (
        pytest.param("trainer: {callbacks: [{class_path: evil.Evil}]}", "evil.Evil", id="class_path in a list"),
        pytest.param("trainer: {callbacks: evil.Evil}", "evil.Evil", id="class name"),
        pytest.param(
            "trainer: {callbacks: [{class_path: LambdaCallback, init_args: {on_fit_start: evil.touch}}]}",
            "evil.touch",
            id="callable",
        ),
        pytest.param(
            "trainer: {callbacks: [{class_path: LambdaCallback, init_args: {on_fit_start: {class_path: evil.Evil}}}]}",
            "evil.Evil",
            id="callable by class_path",
        ),
        pytest.param("trainer: {callbacks: nested.yaml}", "evil.Evil", id="nested file"),
        pytest.param(
            "trainer: {callbacks: [{class_path: LambdaCallback, init_args: {on_fit_start: os.system}}]}",
            "os.system",
            id="os.system",
        ),
        pytest.param(
            "trainer: {callbacks: [{class_path: LambdaCallback, init_args: {on_fit_start: torch.os.system}}]}",
            "posix.system",
            id="through an allowed module",
        ),
    )

    @pytest.fixture(autouse=True)
    def _evil_module(self, muse: Muse, monkeypatch: pytest.MonkeyPatch) -> Any:
        Path("evil.py").write_text(
            "from pathlib import Path\n"
            "from lightning.pytorch.callbacks import Callback\n"
            "Path('ran').touch()\n"
            "class Evil(Callback):\n    def __call__(self, *args): ...\n"
            "def touch(*args): ...\n"
        )
        Path("nested.yaml").write_text("class_path: evil.Evil\n")
        monkeypatch.syspath_prepend(str(Path.cwd()))
        yield
        sys.modules.pop("evil", None)

    @pytest.mark.filterwarnings(
        "ignore::DeprecationWarning", "ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning"
    )
    @pytest.mark.parametrize(("yaml", "name"), ATTACKS)
    def test_in_a_file(self, muse: Muse, yaml: str, name: str) -> None:
        attack = yaml.removeprefix("trainer: ")
        self.assert_works_without_allow_list(
            ["--callbacks", attack.removeprefix("{callbacks: ").removesuffix("}")], name
        )
        Path("bad.yaml").write_text(yaml)
        line = muse.error("fit", "--config", "recipe.yaml", "--config", "bad.yaml")
        assert f"{name} is outside the modules a configuration may name" in line
        self.assert_nothing_happened()

    @pytest.mark.parametrize(
        ("flags", "name"),
        [
            (["--trainer.callbacks+=evil.Evil"], "evil.Evil"),
            (["--model.attention=evil.Evil"], "evil.Evil"),
            (["--trainer.strategy.class_path=evil.Evil"], "evil.Evil"),
            (["--data.sources=[evil.Evil]"], "evil.Evil"),
            (["--trainer.callbacks+=LambdaCallback", "--trainer.callbacks.on_fit_start=os.system"], "os.system"),
        ],
    )
    def test_in_flags(self, muse: Muse, flags: list[str], name: str) -> None:
        line = muse.error("fit", "--config", "recipe.yaml", *flags)
        assert f"{name} is outside the modules a configuration may name" in line
        self.assert_nothing_happened()

    def test_a_module_that_is_allowed(self, muse: Muse, monkeypatch: pytest.MonkeyPatch) -> None:
        """Found in the working directory, which is not otherwise importable; and not allowed any more afterwards."""
        monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry != str(Path.cwd())])
        Path("other.py").write_text("raise AssertionError('imported')\n")
        flags = ["--trainer.callbacks+=evil.Evil", "--trainer.max_steps=1"]
        code, _, err = muse.with_recipe("fit", *flags, "--allow_module", "evil")
        assert code == 0, err
        assert Path("ran").exists()
        assert "evil.Evil is outside" in muse.error("fit", "--config", "recipe.yaml", *flags)
        assert "other.Thing is outside" in muse.error(
            "fit", "--config=recipe.yaml", "--trainer.callbacks+=other.Thing", "--allow_module=evil"
        )

    def test_a_file_cannot_allow_itself(self, muse: Muse) -> None:
        Path("bad.yaml").write_text("allow_module: [evil]\ntrainer: {callbacks: evil.Evil}\n")
        line = muse.error("fit", "--config", "recipe.yaml", "--config", "bad.yaml")
        assert line.startswith("allow_module: not a known option")
        self.assert_nothing_happened()

    @pytest.mark.parametrize(
        ("value", "line"), [("a/b.py", "is not a module name"), ("jsonargparse", "cannot be allowed")]
    )
    def test_names_that_cannot_be_allowed(self, muse: Muse, value: str, line: str) -> None:
        assert line in muse.error("fit", "--allow_module", value)
        assert muse.error("fit", "--allow_module").startswith("--allow_module: a module name must follow")

    @staticmethod
    def assert_works_without_allow_list(args: list[str], name: str) -> None:
        """The attack reaches the object that it names on jsonargparse as it comes."""
        from jsonargparse import _common

        settings = {**_common.parsing_settings, "import_paths_enforced": False, "import_path_verdicts": {}}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(_common, "parsing_settings", settings)
            parser = ArgumentParser(exit_on_error=False)
            parser.add_argument("--callbacks", type=list[Callback] | Callback | None, enable_path=True)
            callbacks = parser.instantiate(parser.parse_args(args)).callbacks
        assert callbacks
        if name.startswith("evil"):
            assert Path("ran").exists()
            Path("ran").unlink()
            del sys.modules["evil"]

    @staticmethod
    def assert_nothing_happened() -> None:
        assert "evil" not in sys.modules
        assert not Path("ran").exists()
        assert not Path("runs").exists()


def test_settings_of_the_allow_list_exist() -> None:
    """The allow-list stands on these settings: a jsonargparse without them must fail here, not open the door."""
    set_parsing_settings(import_path_denylist=["*"], instantiate_subclass_spec_in_any=False)
