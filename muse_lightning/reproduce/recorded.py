"""What a run folder says of how the run came about: its starts, each with a configuration and an environment."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from muse_lightning.checkpoints.choice import step_of
from muse_lightning.configuration.differences import changed_values
from muse_lightning.errors import UserError, reason_of
from muse_lightning.pretrained.run_folder import CONFIG_FILE, resumed_configurations, run_configuration

ENVIRONMENT_FILE = "environment.json"
_NOT_RECORDED = "not recorded"
_LONGEST = 200


@dataclass(frozen=True)
class Start:
    """One start of a run."""

    step: int
    """Optimizer steps done before it."""
    config_file: str
    config: dict[str, Any]
    environment: dict[str, Any]


def starts_of(run: Path) -> list[Start]:
    """All starts of a run, the first one and those that went on, in order.

    Raises:
        UserError: it is no run folder, or a file of a start is missing or damaged.
    """
    if not run.is_dir():
        raise UserError(f"run: no folder {run}; expected the folder of a run, such as runs/NAME/version_0")
    if not (run / CONFIG_FILE).is_file():
        raise UserError(f"run: {run} has no {CONFIG_FILE}; expected the folder of a run, such as runs/NAME/version_0")
    config = run_configuration(run)
    checkpoint = config.get("ckpt_path")
    first = max(step_of(Path(checkpoint)), 0) if isinstance(checkpoint, str) else 0
    starts = [Start(first, CONFIG_FILE, config, _environment(run / ENVIRONMENT_FILE))]
    for step, name in resumed_configurations(run).items():
        environment = _environment(run / f"environment.step={step}.json")
        starts.append(Start(step, name, run_configuration(run, name), environment))
    return starts


def _environment(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"run: {path} cannot be read: {reason_of(error)}; what the run ran on is not known") from None
    except (ValueError, RecursionError):
        raise UserError(f"run: {path} is damaged: it is not JSON") from None
    if not isinstance(found, dict):
        raise UserError(f"run: {path} is damaged: it holds no keys with values")
    return found


def differences_then_now(starts: list[Start], now: dict[str, Any], steps: int) -> list[str]:
    """One line for each thing that was otherwise when the run trained its first `steps` steps.

    Args:
        starts: of the run.
        now: the present environment, with `data`.
    """
    lines: list[str] = []
    for start in starts:
        if start.step >= steps and start is not starts[0]:
            break
        is_first = start is starts[0]
        where = "" if is_first else f"from step {start.step} on, "
        lines += [where + line for line in environment_differences(start.environment, now, is_first)]
        lines += [
            f"{where}{_printable(key)}: {_printable(is_now)} in {start.config_file}, {_printable(was)} in {CONFIG_FILE}"
            for key, was, is_now in changed_values(starts[0].config, start.config)
        ]
    return lines


def environment_differences(then: dict[str, Any], now: dict[str, Any], with_checkpoint: bool = True) -> list[str]:
    """One line for each thing that differs between two environments and that the bits of a loss may depend on.

    Args:
        then, now: as in environment.json.
        with_checkpoint: whether what the run began with is compared too.
    """
    # The revision says more to a reader, but is the same before and after a change that is not committed.
    if then.get("source_sha256") != now["source_sha256"]:
        revisions = [_code(environment) for environment in (then, now)]
        yours = [_short(environment.get("source_sha256")) for environment in (then, now)]
        pairs = [("muse-lightning", *(revisions if revisions[0] != revisions[1] else yours))]
    else:
        pairs = []
    pairs += [(key, _value(then, key), _value(now, key)) for key in ("python", "cuda", "driver", "devices")]
    pairs += [("data", _data(then), _data(now))]
    if with_checkpoint:
        pairs += [("checkpoint", _checkpoint(then), _checkpoint(now))]
    pairs += _packages(then, now)
    return [f"{key}: {was} then, {is_now} now" for key, was, is_now in pairs if was != is_now]


def _packages(then: dict[str, Any], now: dict[str, Any]) -> Iterator[tuple[str, str, str]]:
    builds = [environment.get("packages") or {} for environment in (then, now)]
    # With the build of torch (+cpu, +cu130), which its distribution need not say.
    torch_then, torch_now = (_printable(build.get("torch", _NOT_RECORDED)) for build in builds)
    yield "torch", torch_then, torch_now
    was, is_now = then.get("distributions"), now["distributions"]
    if not isinstance(was, dict):
        yield "installed packages", _NOT_RECORDED, _short(now["lock_sha256"])
        return
    for name in sorted((was.keys() | is_now.keys()) - {"torch"}):
        version_then, version_now = (_printable(found.get(name, "not installed")) for found in (was, is_now))
        yield _printable(name), version_then, version_now


def _value(environment: dict[str, Any], key: str) -> str:
    value = environment.get(key, _NOT_RECORDED)
    return "; ".join(map(_printable, value)) if isinstance(value, list) else _printable(value)


def _code(environment: dict[str, Any]) -> str:
    return _printable(environment.get("git_revision") or environment.get("muse_lightning", _NOT_RECORDED))


def _data(environment: dict[str, Any]) -> str:
    datasets = environment.get("data")
    if not isinstance(datasets, list) or not all(isinstance(dataset, dict) for dataset in datasets):
        return _NOT_RECORDED
    # Where it lies makes no difference.
    return ", ".join(_short(dataset.get("fingerprint")) for dataset in datasets)


def _checkpoint(environment: dict[str, Any]) -> str:
    checkpoint = environment.get("checkpoint")
    return "none" if not isinstance(checkpoint, dict) else _short(checkpoint.get("sha256"))


def _short(sha256: Any) -> str:
    return _printable(sha256)[:12]


def _printable(value: Any) -> str:
    """A value of somebody's file, as it may be printed on a terminal."""
    text = str(value)[:_LONGEST]
    return "".join(letter if letter.isprintable() else "?" for letter in text)
