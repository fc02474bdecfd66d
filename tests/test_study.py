"""docs/study.py on runs made up here: which cells there are, what goes on record, and what comes out of it again.

Bugs these tests guard against: a cell whose flags train.py refuses; a held-out problem among the training problems; a
figure that changes between a run and the record; a cell run twice, or a failed one taken for done; a dapo that is
given more responses than the others.
"""

import argparse
import json
import re
import sys
import tempfile
from pathlib import Path

import pytest

import eval as evaluation
import train

sys.path.append(str(Path(__file__).resolve().parent.parent / "docs"))
import study

# A process that does what a run of train.py leaves: RUN_DIR, SEED and RESPONSES, those of each of its steps, are given.
FAKE = """
import json, pathlib, signal, sys
signal.signal(signal.SIGTERM, signal.SIG_IGN)
run, flags, per_step = pathlib.Path(sys.argv[1]), json.loads(sys.argv[2]), int(sys.argv[3])
run.mkdir(parents=True)
(run / "model").mkdir()
(run / "run.json").write_text(json.dumps({"commit": "c", "flags": flags}))
for step in range(flags["steps"] + 1):
    right = [(step + i + flags["seed"]) % 5 / 4 for i in range(8)]
    line = {"step": step, "k": 4, "responses": step * per_step, "per_problem": right, "per_problem_maj": [1 / 3] * 8}
    with open(run / "eval.jsonl", "a") as file:
        file.write(json.dumps(line) + "\\n")
    line = {"step": step, "tokens": step * 1000, "seconds": 1.23456, "mixed": 0.25, "all_wrong": 0.75, "loss": 0.1,
            "zero_gradient_groups": flags["idle"], "wrong_pushed_up": 0.05, "prompts_trained": 40,
            "prompts_drawn": per_step // 6, "responses": step * per_step}
    if step:
        with open(run / "metrics.jsonl", "a") as file:
            file.write(json.dumps(line) + "\\n")
sys.exit(flags["seed"] == 4)
"""


@pytest.fixture
def fakes(tmp_path, monkeypatch):
    """make(names) runs the cells of these names with FAKE; what it prints is in capsys."""

    def command(cell, args):
        mix, configuration = cell.name.rsplit("-", 1)[0].split("/") if "/" in cell.name else ("warm", "")
        algo = next((word for word in ("grpo", "dapo") if word in configuration), "copo")
        flags = {"seed": cell.seed, "steps": study.STEPS, "prompts_per_step": 40, "group_size": 6, "algo": algo,
                 "model": "/somewhere/warm/model", "data": f"/x/data/{mix}_train.jsonl", "blend": configuration,
                 "eval_data": f"/x/data/{mix}_test.jsonl", "idle": 0.75 * (algo == "grpo")}  # fmt: skip
        run = "warm" if mix == "warm" else cell.name
        return [sys.executable, "-c", FAKE, run, json.dumps(flags), str(240 * (4 if algo == "dapo" else 1))]

    def make(*patterns, jobs=2, again=False):
        argv = ["--runs", str(tmp_path / "runs"), "--jobs", str(jobs), *["--again"] * again]
        for pattern in patterns:
            study.main([*argv, "--only", pattern])

    monkeypatch.setattr(study, "RECORD", tmp_path / "docs/results.json")
    monkeypatch.setattr(study, "command", command)
    return make


def test_every_cell_is_a_command_that_train_accepts(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    every = study.cells()
    names = [cell.name for cell in every]
    assert len(set(names)) == len(names) == 5 + 3 * 9 * 5 + 8 * 2 + 3 * 2 + 3 * 3
    assert {name.split("/")[0] for name in names if "/" in name} == {*study.MIXES, "single", "grid", "smollm2"}
    for cell in every:
        args = train.parse_args(study.command(cell, argparse.Namespace(model="SmolLM2"))[2:])
        assert args.seed == cell.seed and args.run_dir in (cell.name, "warm")
        assert args.prompts_per_step * args.group_size == study.RESPONSES or "smollm2" in cell.name or args.steps == 0
    # seed by seed, so that whatever is finished is balanced
    assert [names.index(f"hard/ngrpo-{seed}") for seed in range(5)] == sorted(
        names.index(f"hard/ngrpo-{seed}") for seed in range(5))  # fmt: skip


def test_mixes_hold_the_shares_they_name_and_their_held_out_problems_are_new(tmp_path):
    study.make_mixes(tmp_path / "data")
    for mix, shares in study.MIXES.items():
        train_rows, test_rows = (
            [json.loads(line) for line in (tmp_path / f"data/{mix}_{name}.jsonl").read_text().splitlines()]
            for name in ("train", "test")
        )
        assert (len(train_rows), len(test_rows)) == (study.TRAIN, study.HELD_OUT)
        for rows in (train_rows, test_rows):
            for (level, question), percent in shares.items():
                alike = [r for r in rows if r["level"] == level and r["problem"].startswith(question)]
                assert len(alike) == len(rows) * percent // 100
                for row in alike:
                    expression = row["problem"].removeprefix(question).strip()
                    assert re.fullmatch(r"[\d*+-]+", expression) and eval(expression) == int(row["answer"])
                    assert 0 <= int(row["answer"]) <= 39
        expressions = [{r["problem"].split()[1] for r in rows} for rows in (train_rows, test_rows)]
        assert not expressions[0] & expressions[1]


def test_a_record_gives_back_the_figures_of_the_runs(fakes, tmp_path, capsys):
    fakes("easy/grpo-0", "easy/copo-0")
    assert "warm-0: " in (said := capsys.readouterr().out) and said.count("easy/grpo-0: ") == 1
    study.main(["--unpack", str(tmp_path / "out")])
    for name in ("easy/grpo-0", "easy/copo-0"):
        raw, back = evaluation.load_run(tmp_path / "runs/seed-0" / name), evaluation.load_run(tmp_path / "out" / name)
        for step, line in back.evaluations.items():
            assert line["per_problem"] == raw.evaluations[step]["per_problem"]
            assert line["per_problem_maj"] == raw.evaluations[step]["per_problem_maj"]
        assert sorted(back.evaluations) == list(range(0, study.STEPS + 1, study.EVERY))
        ours, theirs = (evaluation.run_figures(run, back.evaluations) for run in (back, raw))
        assert ours.keys() == theirs.keys()
        for figure, values in ours.items():
            assert values == pytest.approx(theirs[figure], abs=1e-4 * study.STEPS)  # seconds have four decimals
    assert "/somewhere" not in study.RECORD.read_text() and "/x/" not in study.RECORD.read_text()


def test_what_is_on_record_is_not_run_again_unless_asked(fakes, tmp_path, capsys):
    fakes("easy/grpo-0")
    before = study.RECORD.read_text()
    capsys.readouterr()
    fakes("easy/grpo-0")
    assert capsys.readouterr().out == "" and study.RECORD.read_text() == before
    fakes("easy/grpo-0", again=True)
    assert "every figure is the one on record" in capsys.readouterr().out and study.RECORD.read_text() == before
    study.RECORD.write_text(before.replace('"mixed": [0.25', '"mixed": [0.5'))
    fakes("easy/grpo-0", again=True)
    assert "NOT the one on record" in capsys.readouterr().out


def test_a_cell_that_fails_is_named_and_the_rest_goes_on(fakes, tmp_path, capsys):
    (tmp_path / "runs/seed-4/warm/model").mkdir(parents=True)
    (tmp_path / "runs/seed-0/warm/model").mkdir(parents=True)
    with pytest.raises(SystemExit, match="failed: hard/copo-4"):
        fakes("hard/copo-[04]")
    assert set(study.load_record()) == {"hard/copo-0"}
    assert re.search(r"hard/copo-4: \d+ s, FAILED", capsys.readouterr().out)


def test_dapo_is_measured_in_the_responses_that_the_others_had(fakes):
    fakes("easy/dapo-0")
    cell = study.load_record()["easy/dapo-0"]
    # each of its steps samples what four of the others do
    assert cell["metrics"]["step"] == [4.0 * n for n in range(1, study.STEPS // 4 + 1)]
    firsts = [line["right"][0] for line in cell["held_out"]]
    assert firsts == [n % 5 for n in range(study.STEPS // study.EVERY + 1)]
    assert study.alive(cell) == [0.25] * (study.STEPS // 4)


def test_tables_tell_what_is_on_record(fakes, tmp_path, capsys):
    fakes("hard/*-[01]", "grid/γ1ρ1-[01]")
    capsys.readouterr()
    study.main(["--tables"])
    printed = capsys.readouterr().out
    assert "| hard | 75.0% | 25.0% | 0.0% |" in printed
    assert "| hard | 1 | 25.0% | 100.0% | 4.00 |" in printed
    rows = [line.split(" | ") for line in printed.splitlines() if line.startswith("| copo |")]
    assert rows[0][1] == "2" and rows[0][3].startswith("+0.0%")  # the same figures as grpo's
    full = (tmp_path / "docs/hard.txt").read_text()
    assert "minus grpo" in full and "16 of" not in full


def test_the_tables_of_the_document_are_those_of_the_record():
    """What stands in docs/study.md comes out of docs/study/results.json, row by row."""
    record, document = study.load_record(), (study.ROOT / "docs/study.md").read_text()
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(study, "RECORD", Path(folder) / "results.json")  # its tables and pictures are not to change
        printed = study.tables(record, study.compared(record, Path(folder))).splitlines()
    rows = [line for line in document.splitlines() if line.startswith("|")]
    assert rows and set(rows) <= set(printed)
