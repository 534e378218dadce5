"""The table of a campaign, a line for each kind of fault."""

import statistics
from collections import defaultdict

from tests.faults.campaign.run import Record


def table(records: list[Record], seconds: float) -> str:
    """Markdown: for each kind how many struck, batches lost or repeated, steps computed again, seconds to the first
    step after it; then the sum."""
    by_kind: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        if record.has_struck:
            by_kind[record.kind].append(record)
    lines = [
        "| fault | n | lost | repeated | wrong | steps again: median, most | s to the first step: median, most |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    lines += [_line(kind, of_kind) for kind, of_kind in sorted(by_kind.items())]
    lines.append(_line("all", [record for of_kind in by_kind.values() for record in of_kind]))
    struck = sum(map(len, by_kind.values()))
    runs = len({record.seed for record in records})
    lines.append("")
    lines.append(
        f"{struck} injections in {runs} runs and {seconds / 60:.1f} minutes: {3600 * struck / seconds:.0f} an hour; "
        f"{len(records) - struck} more were planted where their start had ended before."
    )
    return "\n".join(lines)


def _line(name: str, records: list[Record]) -> str:
    again = [record.recomputed for record in records if record.recomputed is not None]
    first = [record.first_step_s for record in records if record.first_step_s is not None]
    cells = [
        name,
        str(len(records)),
        str(sum(record.lost for record in records)),
        str(sum(record.repeated for record in records)),
        str(sum(bool(record.problems) for record in records)),
        f"{statistics.median(again):g}, {max(again)}" if again else "",
        f"{statistics.median(first):.2f}, {max(first):.2f}" if first else "",
    ]
    return f"| {' | '.join(cells)} |"
