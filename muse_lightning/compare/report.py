"""The table and the page of a comparison."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from muse_lightning.attention.description import heads_in_words
from muse_lightning.compare.results import Found, is_muse
from muse_lightning.measure.bench.report import NONE, Row, machine_line, markdown


def table(found: Sequence[Found]) -> list[Row]:
    """A row for each setting, with the columns for which anything was measured."""
    exact = found[0]
    columns: dict[str, list[str]] = {
        "attention": [each.setting.name for each in found],
        "loss": [f"{each.losses.mean:.4f}" for each in found],
        "rise": [_rise(each) for each in found],
        "bits/byte": [_number(each.losses.bits_per_byte, ".4f") for each in found],
        "error": [_number(each.mean_error, ".4f") for each in found],
        "near/retrieved/rest": [_mass(each) for each in found],
        "cos gradient": [_number(each.gradient_cosine, ".4f") for each in found],
        "pairs": [f"{each.pairs:.1%}" for each in found],
        "attention ms": [_ratio(each.attention_ms, exact.attention_ms) for each in found],
        "model fwd ms": [_ratio(each.forward_ms, exact.forward_ms) for each in found],
    }
    shown = {name: cells for name, cells in columns.items() if any(cell != NONE for cell in cells)}
    return [list(shown), *(list(row) for row in zip(*shown.values(), strict=True))]


LEGEND = (
    "`rise`: of the loss over the first row's, on the same blocks, with its standard error over blocks. `error`: "
    "relative squared error of attention's output on the q, k and v of the model with exact attention, mean over "
    "layers and heads. `near/retrieved/rest`: shares of softmax mass in the own chunk, in retrieved keys and in "
    "summaries. `cos gradient`: of the loss's gradient with the first row's, all parameters. `pairs`: query-key pairs "
    "that training works on, over the first row's. Times: of one layer's attention, forward and backward, on average "
    "where some layers or heads are exact, and of the model's forward pass, with how many times as fast as the first "
    "row."
)


def page(header: Mapping[str, Any], found: Sequence[Found], said: Sequence[str]) -> str:
    """The Markdown file of a comparison."""
    swept = [each for each in found if each.setting.is_swept]
    main = [each for each in found if not each.setting.is_swept]
    sections = [
        f"# {header['model']} under other attention, {header['seq_len']:,} tokens",
        f"    {header['command']}",
        f"Machine: {machine_line(dict(header))}. {header['date']}. Computed in {header['dtype']}.",
        f"Data: {header['data']} (fingerprint {header['fingerprint'][:12]}), split {header['split']}, "
        f"{len(header['blocks'])} blocks, {header['labels']:,} labels, documents "
        f"{'told apart' if header['document_mask'] else 'not told apart'}.",
        markdown(table(main)),
        LEGEND,
        "![loss by position, error, mass, cost](compare.png)",
    ]
    if swept:
        sections += ["## Sweep", markdown(table([main[0], *swept]))]
    sections += said
    return "\n\n".join(sections) + "\n"


def _rise(found: Found) -> str:
    rise, error = found.rise
    return f"{rise:+.4f}" + ("" if error is None else f" ± {error:.4f}")


def _mass(found: Found) -> str:
    return NONE if found.mean_mass is None else " / ".join(f"{share:.1%}" for share in found.mean_mass)


def _ratio(value: float | None, exact: float | None) -> str:
    return NONE if value is None or exact is None else f"{value:.2f} ({exact / value:.2f}x)"


def _number(value: float | None, form: str) -> str:
    return NONE if value is None else format(value, form)


def advice(
    found: Sequence[Found], recommended: Found | None, max_loss_increase: float, path: Path, *, is_sweep: bool
) -> list[str]:
    """What to make of it, in words.

    Args:
        path: of the overlay that trains with the recommended setting.
    """
    said = [
        f"Exact key-value heads of {each.setting.name}, by layer: {heads_in_words(each.setting.heads)}."
        for each in found
        if any(each.setting.heads.values()) and not each.setting.is_swept and not each.is_exact
    ]
    if said:
        said.append("They are those whose error adds most to the residual stream, not those of the largest error.")
    muse = [each for each in found if is_muse(each)]
    if any(each.is_exact for each in muse):
        are_all = all(each.is_exact for each in muse)
        which = "Every MuSe setting" if are_all else "Those MuSe settings with 100.0% of pairs"
        said.append(
            f"{which} attended these blocks exactly: rows, or documents, are of at most muse.exact_below tokens, by "
            "default 7 chunks and 2. A longer seq_len or a smaller --muse.chunk would tell more."
        )
    candidates = [each for each in muse if not each.is_exact]
    if not is_sweep or not candidates:
        return said
    has_error = found[0].rise[1] is not None
    how = "two standard errors included" if has_error else "from one block, so without a standard error"
    if recommended is None:
        nearest = min(candidates, key=lambda each: each.highest_rise)
        said.append(
            f"No MuSe setting keeps the rise of the loss, {how}, under {max_loss_increase}; the least is "
            f"{nearest.highest_rise:.4f}, of {nearest.setting.name}."
        )
    else:
        said.append(
            f"The cheapest MuSe setting under a rise of {max_loss_increase}, {how}: {recommended.setting.name} "
            f"({recommended.rise[0]:+.4f}). Train with it: muse fit --config RECIPE --config {path}"
        )
    return said
