"""tools/short_demo.yaml: what is trained after it is the demo but for its values."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.recipe import Muse

ROOT = Path(__file__).parents[2]
SHORT = ROOT / "tools" / "short_demo.yaml"


def leaves(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found


def test_it_is_the_demo_but_for_its_values(muse: Muse) -> None:
    configs = []
    for more in ((), (f"--config={SHORT}",)):
        code, out, err = muse("fit", "--config=recipe:demo", *more, "--print_config")
        assert code == 0, err
        configs.append(leaves(yaml.safe_load(out)))
    whole, short = configs
    changed = {key: value for key, value in short.items() if value != whole[key]}
    assert changed == leaves(yaml.safe_load(SHORT.read_text(encoding="utf-8")))
    assert short["trainer.max_steps"] < whole["trainer.max_steps"] / 5
    kinds, options = zip(
        *((each["class_path"], each.get("init_args")) for each in short["trainer.callbacks"]), strict=True
    )
    assert list(kinds) == [each["class_path"] for each in whole["trainer.callbacks"]]
    assert options[-1]["steps"] <= short["trainer.max_steps"] / 2, "no row would be whole, and none approximate"


@pytest.mark.parametrize("script", [".ci/run", "tools/check_dist.sh"])
def test_who_trains_it_says_no_more_of_the_training(script: str) -> None:
    text = (ROOT / script).read_text(encoding="utf-8")
    assert re.findall(r"tools/short_demo\.yaml", text)
    assert not re.findall(r"--(?:trainer|model|data\.max)\S*", text)
