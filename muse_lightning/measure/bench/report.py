"""Tables of a run: aligned text for the terminal, Markdown for `benchmarks/results/`."""

from collections.abc import Sequence
from typing import Any

from muse_lightning.measure.bench.error import HeadError
from muse_lightning.measure.bench.parts import Part
from muse_lightning.measure.bench.records import PASSES, Measured, Results
from muse_lightning.measure.bench.variants import LABELS

Row = Sequence[str]
NONE = "-"
PASS_NAMES = {"forward": "fwd", "forward_backward": "fwd+bwd"}


def timing_table(results: Results, num_tokens: int | None = None) -> list[Row]:
    """A row for each length and variant, of one length or of all; the header first."""
    head = ["N", "variant"]
    for of_pass in PASSES:
        name = PASS_NAMES[of_pass]
        head += [f"{name} ms", "min-p90", "x cuDNN", "x Flash"]
    head += ["of peak", "peak MiB"]
    rows: list[Row] = [head]
    chosen = [measured for measured in results.measured if num_tokens in (None, measured.num_tokens)]
    return [*rows, *(_timing_row(results, measured) for measured in chosen)]


def _timing_row(results: Results, measured: Measured) -> Row:
    cells = [f"{measured.num_tokens:,}", LABELS[measured.variant]]
    if measured.reason is not None:
        return [*cells, measured.reason]
    for of_pass in PASSES:
        timing = measured.timings[of_pass]
        cells += [_ms(timing.median_ms), f"{_ms(timing.min_ms)}-{_ms(timing.p90_ms)}"]
        cells += [_number(results.speedup(measured, other, of_pass), ".2f") for other in ("cudnn", "flash")]
    return [
        *cells,
        _number(measured.flops_fraction.get("forward_backward"), ".0%"),
        _number(measured.peak_mib, ",.0f"),
    ]


def parts_table(parts: Sequence[Part]) -> list[Row]:
    """A row for each part of MuSe's forward and backward pass."""
    rows: list[Row] = [["part", "ms", "share", "GFLOP", "of matmul", "GB", "of copy"]]
    rows += [
        [
            part.name,
            _ms(part.ms),
            f"{part.share:.0%}",
            _number(part.work.flops / 1e9 or None, ",.0f"),
            _number(part.flops_fraction, ".0%"),
            _number(part.work.bytes / 1e9 or None, ",.2f"),
            _number(part.bytes_fraction, ".0%"),
        ]
        for part in parts
    ]
    return rows


def error_table(errors: Sequence[HeadError]) -> list[Row]:
    """A row for each recorded head and setting."""
    rows: list[Row] = [["head", "tokens", "top_k", "squared error", "cos dq", "cos dk", "cos dv"]]
    for e in errors:
        cosines = [f"{cosine:.3f}" for cosine in (e.cosine_dq, e.cosine_dk, e.cosine_dv)]
        rows.append([e.head, f"{e.num_tokens:,}", str(e.top_k), f"{e.relative_squared_error:.4f}", *cosines])
    return rows


def aligned(rows: Sequence[Row]) -> str:
    """Rows as text: the first column and names to the left, numbers to the right. A short row runs on freely."""
    width = len(rows[0])
    widths = [max(len(row[i]) for row in rows if len(row) == width) for i in range(width)]
    is_text = [not any(row[i][:1].isdigit() for row in rows[1:] if len(row) == width) for i in range(width)]

    def is_left(row: Row, i: int) -> bool:
        return is_text[i] or (len(row) < width and i == len(row) - 1)

    lines = []
    for row in rows:
        cells = [cell.ljust(widths[i]) if is_left(row, i) else cell.rjust(widths[i]) for i, cell in enumerate(row)]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def markdown(rows: Sequence[Row]) -> str:
    """Rows as a Markdown table."""
    width = len(rows[0])
    lines = [rows[0], ["---"] * width, *([*row, *[""] * (width - len(row))] for row in rows[1:])]
    return "\n".join("| " + " | ".join(cell.replace("|", "/") for cell in line) + " |" for line in lines)


def machine_line(header: dict[str, Any]) -> str:
    """Device, driver and versions in one line."""
    packages = header["packages"]
    device = header["device"]
    return (
        f"{device}, driver {header['driver']}, CUDA {header['cuda']}, torch {packages['torch']}, "
        f"triton {packages['triton']}, Python {header['python']}, muse-lightning {header['muse_lightning']}"
    )


def results_page(results: Results) -> str:
    """The Markdown file of a run: what benchmarks/README.md asks for, as far as a program can know it."""
    header = dict(results.header)
    options, ceilings = header["options"], header["ceilings"]
    muse = ", ".join(f"{name} {value}" for name, value in options["muse"].items())
    rest = ", ".join(f"{name} {value}" for name, value in options.items() if name != "muse")
    sections = [
        f"# MuSe attention beside its alternatives, {header['device']}",
        "**Question.** How long does a forward and a forward and backward pass of MuSe attention take beside exact "
        "attention and other sparse attention, where does the time go, and how much memory does it need? "
        f"**Answer.** {_answer(results)}",
        f"Machine: {machine_line(header)}. Commit {header['git_revision'] or 'unknown'}. {header['date']}.",
        f"    {header['command']}",
        f"Shape: {rest}. MuSe: {muse}.",
        f"Before timing, MuSe's output and gradients passed each of {len(results.checks)} comparisons with the "
        "reference on this device. Measured ceilings: "
        f"{ceilings['flops_per_s'] / 1e12:.0f} TFLOP/s (8192^3 product), "
        f"{ceilings['bytes_per_s'] / 1e12:.2f} TB/s (copy, bytes read plus written).",
        "## Time",
        "Median, with the least and the 90th percentile, of runs of all variants in turn, in one process, by CUDA "
        "events; two warm-up runs, cache flushed before each. `x cuDNN`: how many times as fast as cuDNN. `of peak`: "
        "counted FLOPs of forward and backward over its time, as a share of the measured matrix product. `peak MiB`: "
        "memory of forward and backward above inputs and cotangent.",
        markdown(timing_table(results)),
        "![time and ratio against length](attention.png)",
    ]
    for num_tokens, parts in results.parts.items():
        sections += [f"## MuSe by part, {num_tokens:,} tokens, forward and backward", markdown(parts_table(parts))]
    if results.parts:
        sections.append(
            "Kernel times of a profiled run. GB: every input read once, every output written once, also where cache "
            "serves it; so a part can come out above the copy's ceiling."
        )
    if results.errors:
        sections += [
            "## Error on recorded heads",
            "Against exact attention in float32: relative squared error of the output, cosine of each gradient for a "
            "random cotangent.",
            markdown(error_table(results.errors)),
        ]
    sections.append("Not shown: other devices, shapes and inputs than these; the time of a whole training step.")
    return "\n\n".join(sections) + "\n"


def _answer(results: Results) -> str:
    said = []
    for measured in results.measured:
        ratio = results.speedup(measured, "cudnn", "forward_backward")
        if measured.variant == "muse" and ratio is not None:
            said.append(f"{ratio:.2f} at {measured.num_tokens:,}")
    if not said:
        return "See the table; cuDNN was not timed."
    return f"Times as fast as cuDNN, forward and backward: {', '.join(said)} tokens."


def _ms(value: float) -> str:
    return f"{value:.3f}" if value < 10 else f"{value:.1f}"


def _number(value: float | None, form: str) -> str:
    return NONE if value is None else format(value, form)
