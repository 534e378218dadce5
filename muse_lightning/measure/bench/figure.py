"""The figure of a run: time against length, and how many times faster than cuDNN."""

import io

from matplotlib.figure import Figure

from muse_lightning.measure.bench.records import Results
from muse_lightning.measure.bench.variants import LABELS

COLORS = {
    "muse": "tab:red",
    "cudnn": "black",
    "flash": "tab:gray",
    "flex": "tab:blue",
    "nsa": "tab:green",
    "reference": "tab:orange",
}
"""The same for the same variant in every figure."""


def draw(results: Results) -> bytes:
    """A PNG: solid lines are forward and backward, dashed ones forward alone."""
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    times, ratios = figure.subplots(1, 2)
    for variant in dict.fromkeys(m.variant for m in results.measured if m.timings):
        measured = sorted(
            (m for m in results.measured if m.variant == variant and m.timings), key=lambda m: m.num_tokens
        )
        lengths = [m.num_tokens for m in measured]
        for of_pass, line in (("forward_backward", "-o"), ("forward", "--o")):
            style = {"color": COLORS[variant], "markersize": 4}
            label = LABELS[variant] if of_pass == "forward_backward" else None
            times.plot(lengths, [m.timings[of_pass].median_ms for m in measured], line, label=label, **style)
            speedups = [(m.num_tokens, results.speedup(m, "cudnn", of_pass)) for m in measured]
            found = [(length, ratio) for length, ratio in speedups if ratio is not None]
            if found:
                ratios.plot(*zip(*found, strict=True), line, label=label, **style)
    for axes, label in ((times, "time, ms"), (ratios, "times as fast as cuDNN")):
        axes.set(xscale="log", yscale="log", xlabel="tokens", ylabel=label)
        lengths = sorted({m.num_tokens for m in results.measured})
        axes.set_xticks(lengths, [f"{length:,}" for length in lengths], minor=False)
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    ratios.axhline(1, color="black", linewidth=0.8)
    ratios.set_yscale("log", base=2)
    for axes in (times, ratios):
        axes.yaxis.set_major_formatter("{x:g}")
    times.legend(fontsize=8, title="solid: forward + backward, dashed: forward", title_fontsize=8)
    figure.suptitle(str(results.header["device"]), fontsize=10)
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=150)
    return content.getvalue()
