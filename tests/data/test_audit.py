"""The audit of ledgers made from plans, whole and with each thing that must not be."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from muse_lightning.cli import main
from muse_lightning.data.audit import audit, audit_run
from muse_lightning.data.ledger import LedgerDataset, LedgerHeader, batch_line, ledger_path
from muse_lightning.data.mixing import Part, Plan
from muse_lightning.errors import UserError

CODE, SCIENCE = Part("code", "c0de", (7, 9, 4), 0.75), Part("science", "5c1e", (5, 6), 0.25)
BATCH_SIZE, SEQ_LEN = 2, 64


def write(
    run: Path, steps: int, parts=(CODE,), world_size: int = 1, ranks_per_block: int = 1, first: int = 0
) -> dict[int, list[str]]:
    """Write the ledger of a run of so many steps; its lines by rank."""
    readers = world_size // ranks_per_block
    plan = Plan(parts, seed=0, global_batch=BATCH_SIZE * readers)
    position = plan.start()
    datasets = [LedgerDataset(part.name, part.fingerprint, part.weight, list(part.counts)) for part in parts]
    lines = {
        rank: [LedgerHeader(datasets, rank, world_size, ranks_per_block, BATCH_SIZE, SEQ_LEN, first).to_line()]
        for rank in range(world_size)
    }
    for step in range(steps):
        blocks, position = plan.take(plan.begin(position))
        for rank, of_rank in lines.items():
            mine = blocks[rank // ranks_per_block * BATCH_SIZE :][:BATCH_SIZE]
            ids = [list(block) for block in mine]
            of_rank.append(batch_line(step + 1, first + step, f'"hash":"{hash(tuple(mine)):x}","blocks":{ids}'))
    (run / "ledger").mkdir(parents=True, exist_ok=True)
    save(run, lines)
    return lines


def save(run: Path, lines: dict[int, list[str]]) -> None:
    for rank, of_rank in lines.items():
        ledger_path(run / "ledger", rank).write_text("".join(of_rank))


@pytest.mark.parametrize(("world_size", "ranks_per_block"), [(1, 1), (2, 1), (4, 2)])
def test_one_dataset_over_its_epochs(tmp_path, capsys, world_size, ranks_per_block):
    readers = world_size // ranks_per_block
    whole = 20 // (2 * readers)
    write(tmp_path, whole + 3, world_size=world_size, ranks_per_block=ranks_per_block)
    audit(tmp_path)
    found = audit_run(tmp_path)
    assert found.problems == []
    first, second = found.epochs.values()
    assert (first.seen, first.repeats, first.epoch) == (whole * 2 * readers, 0, 1)
    assert (second.seen, second.repeats, second.epoch) == (6 * readers, 0, 2)
    assert [rank.tokens for rank in found.ranks.values()] == [(whole + 3) * 2 * SEQ_LEN] * world_size
    out, _ = capsys.readouterr()
    assert f"  code 1: {first.seen} of 20 (" in out
    assert out.endswith("problems: 0\n")


def test_a_mixture(tmp_path, capsys):
    write(tmp_path, 40, parts=(CODE, SCIENCE), world_size=2)
    audit(tmp_path)
    found = audit_run(tmp_path)
    assert {(count.dataset.name, count.epoch): count.seen for count in found.epochs.values()} == {
        **{("code", epoch): 20 for epoch in range(1, 7)},
        **{("science", epoch): 11 for epoch in (1, 2, 3)},
        ("science", 4): 7,
    }
    assert sum(rank.by_dataset["code"] for rank in found.ranks.values()) == 120 * SEQ_LEN
    assert "science 4: 7 of 11 (63.6%), 0 repeats, 448 tokens" in capsys.readouterr().out


def remove(lines: dict[int, list[str]], number: int = 4) -> None:
    for of_rank in lines.values():
        del of_rank[number]


def repeat(lines: dict[int, list[str]]) -> None:
    for of_rank in lines.values():
        of_rank.append(of_rank[3].replace('"batch":2', f'"batch":{len(of_rank) - 1}'))


def lose_a_rank(lines: dict[int, list[str]]) -> None:
    del lines[1][-1]


def read_others(lines: dict[int, list[str]]) -> None:
    lines[1][2] = lines[1][2].replace('"hash":"', '"hash":"f')


def skip(lines: dict[int, list[str]]) -> None:
    """Leave out a batch so that the numbers do not show it."""
    for of_rank in lines.values():
        del of_rank[4]
        for number in range(4, len(of_rank)):
            of_rank[number] = of_rank[number].replace(f'"batch":{number}', f'"batch":{number - 1}')


@pytest.mark.parametrize(
    ("damage", "ranks_per_block", "problem"),
    [
        (remove, 1, "rank 0: batch 4 follows where 3 was due"),
        (repeat, 1, "code, epoch 1: 4 block(s) read again"),
        (skip, 1, "code, epoch 1: 4 block(s) never read, though the next epoch has begun"),
        (lose_a_rank, 1, "rank 1: 7 batches, 8 were due: as many as rank 0 has read"),
        (read_others, 2, "batch 1: ranks 0 and 1 share blocks and read others"),
    ],
)
def test_what_must_not_be_is_found(
    tmp_path, capsys, damage: Callable[[dict[int, list[str]]], None], ranks_per_block: int, problem: str
):
    lines = write(tmp_path, 8, world_size=2, ranks_per_block=ranks_per_block)
    assert audit_run(tmp_path).problems == []
    damage(lines)
    save(tmp_path, lines)
    with pytest.raises(SystemExit) as stop:
        audit(tmp_path)
    assert stop.value.code == 1
    assert f"problem: {problem}\n" in capsys.readouterr().err


def test_ranks_may_come_and_go(tmp_path):
    """Two ranks, then one, then two, in one sequence of blocks."""
    lines: dict[int, list[str]] = {0: [], 1: []}
    plan, taken, batch = Plan((CODE,), seed=0, global_batch=1), 0, 0
    for world_size, steps in ((2, 2), (1, 3), (2, 1)):
        for rank in range(world_size):
            lines[rank].append(
                LedgerHeader(
                    [LedgerDataset("code", "c0de", 1.0, list(CODE.counts))], rank, world_size, 1, BATCH_SIZE, 64, batch
                ).to_line()
            )
        for _ in range(steps):
            for rank in range(world_size):
                ids = [[0, 1, *plan.order(0, 1)[taken + number]] for number in range(BATCH_SIZE)]
                lines[rank].append(batch_line(batch + 1, batch, f'"hash":"00","blocks":{ids}'))
                taken += BATCH_SIZE
            batch += 1
    (tmp_path / "ledger").mkdir()
    save(tmp_path, lines)
    found = audit_run(tmp_path)
    assert found.problems == []
    assert [rank.batches for rank in found.ranks.values()] == [6, 3]
    assert [count.seen for count in found.epochs.values()] == [18]


def test_a_ledger_that_does_not_begin_at_the_start_says_so(tmp_path):
    write(tmp_path, 3, first=12)
    assert audit_run(tmp_path).problems == ["rank 0: the ledger begins at batch 12"]


def test_a_line_that_a_kill_cut_short_is_no_gap(tmp_path):
    """The other rank has noted the batch, whichever of them it is."""
    for rank in (0, 1):
        write(tmp_path, 8, world_size=2)
        path = ledger_path(tmp_path / "ledger", rank)
        path.write_text(path.read_text()[:-9])
        assert audit_run(tmp_path).problems == []
        path.write_text(path.read_text().rpartition("\n")[0] + "\n")
        assert len(audit_run(tmp_path).problems) == 1


def test_exit_codes_of_the_command(tmp_path, monkeypatch, capsys):
    lines = write(tmp_path, 8)
    monkeypatch.setattr(sys, "argv", ["muse", "data", "audit", str(tmp_path)])

    def code() -> int:
        try:
            return main()
        except SystemExit as stop:
            return stop.code
        finally:
            assert "Traceback" not in capsys.readouterr().err

    assert code() == 0
    repeat(lines)
    save(tmp_path, lines)
    assert code() == 1
    lines[0].insert(4, "garbage\n")
    save(tmp_path, lines)
    assert code() == 2
    ledger_path(tmp_path / "ledger", 0).unlink()
    assert code() == 2


def test_a_header_of_a_trillion_blocks_takes_no_memory_for_them(tmp_path):
    lines = write(tmp_path, 4)
    lines[0][0] = lines[0][0].replace("[7,9,4]", f"[{(1 << 40) - 14},9,4]")
    save(tmp_path, lines)
    (count,) = audit_run(tmp_path).epochs.values()
    assert (count.seen, count.repeats, count.total) == (8, 0, (1 << 40) - 1)


def test_no_ledger_is_one_line(tmp_path):
    with pytest.raises(UserError, match=r"no ledger/rank0.jsonl found; give the folder of a run"):
        audit(tmp_path)
    write(tmp_path, 2)
    path = ledger_path(tmp_path / "ledger", 0)
    path.write_text("".join(path.read_text().splitlines(keepends=True)[1:]))
    with pytest.raises(UserError, match=r"rank0.jsonl:1 is damaged: the first line does not describe what follows"):
        audit(tmp_path)
