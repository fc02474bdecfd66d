"""study/study.py on runs made up here: which cells there are, what goes on record, and what
comes out of it again.

Bugs these tests guard against: a cell whose flags train.py refuses; a held-out problem among the
training problems; a number that changes between a run and the record; a cell run twice, or a failed
one taken for done; a dapo that is given more responses than the others.
"""

import json
import re
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

import train

sys.path.append(str(Path(__file__).resolve().parent.parent / "study"))
import compare

import study

# A process that leaves what a run of train.py leaves. Its arguments: the run's directory, its flags
# and the responses of each of its steps.
FAKE = """
import json, pathlib, signal, sys
signal.signal(signal.SIGTERM, signal.SIG_IGN)
run, flags, per_step = pathlib.Path(sys.argv[1]), json.loads(sys.argv[2]), int(sys.argv[3])
run.mkdir(parents=True)
(run / "model").mkdir()
(run / "run.json").write_text(json.dumps({"commit": "c", "flags": flags}))
for step in range(flags["steps"] + 1):
    correct = [(step + i + flags["seed"]) % 5 / 4 for i in range(8)]
    line = {"step": step, "k": 4, "responses": step * per_step, "per_problem": correct,
            "per_problem_maj": [1 / 3] * 8}
    with open(run / "eval.jsonl", "a") as file:
        file.write(json.dumps(line) + "\\n")
    line = {"step": step, "tokens": step * 1000, "seconds": 1.23456, "mixed": 0.25,
            "all_wrong": 0.75, "zero_gradient_groups": flags["idle"], "wrong_pushed_up": 0.05,
            "right_pushed_down": 0.0, "token_entropy": 0.5, "length_mean": 9.0,
            "loss": 0.1, "prompts_trained": 40, "prompts_drawn": per_step // 6,
            "responses": step * per_step}
    if flags["algo"] == "dapo" and step == flags["steps"] // 4:
        del line["token_entropy"]  # the last that counts had no update
    weight = int(flags["algo"] == "grpo")
    groups = [{"step": step, "correct": [0, 0], "weight": [weight] * 2, "local_adv": [0, 0],
               "global_adv": -1}]
    if step:
        for name, lines in (("metrics", [line]), ("groups", groups)):
            with open(run / f"{name}.jsonl", "a") as file:
                file.write("".join(json.dumps(line) + "\\n" for line in lines))
sys.exit(flags["seed"] == 4)
"""


@pytest.fixture
def fakes(tmp_path, monkeypatch):
    """make(names) runs the cells of these names with FAKE; what it prints is in capsys."""

    def command(cell, model):
        mix, configuration = "warm", ""
        if "/" in cell.name:
            mix, configuration = cell.name.rsplit("-", 1)[0].split("/")
        algo = next((word for word in ("grpo", "dapo") if word in configuration), "copo")
        flags = {
            "seed": cell.seed,
            "steps": cell.steps,
            "lr": 2e-4,
            "prompts_per_step": 40,
            "group_size": 6,
            "algo": algo,
            "model": "/somewhere/warm/model",
            "data": f"/x/data/{mix}_train.jsonl",
            "blend": configuration,
            "eval_data": f"/x/data/{mix}_test.jsonl",
            "global_coef": 1.0,
            "idle": 0.75 if algo == "grpo" else 0,
        }
        per_step = 960 if algo == "dapo" else 240
        directory = "warm" if mix == "warm" else cell.name
        return [sys.executable, "-c", FAKE, directory, json.dumps(flags), str(per_step)]

    def make(*patterns, jobs=2, again=False):
        argv = ["--runs", str(tmp_path / "runs"), "--jobs", str(jobs)]
        if again:
            argv.append("--again")
        for pattern in patterns:
            study.main([*argv, "--only", pattern])

    monkeypatch.setattr(study, "RECORD", tmp_path / "record/record.json")
    monkeypatch.setattr(study, "ATTACHMENTS", tmp_path / "docs")
    monkeypatch.setattr(study, "command", command)
    monkeypatch.setattr(study, "unsettled", lambda cell, record: "")
    return make


def test_every_cell_is_a_command_that_train_accepts(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    every = study.all_cells()
    names = [cell.name for cell in every]
    assert len(set(names)) == len(names) == 7 + 6 * 3 * 2 + 3 * 17 * 5 + 4 * 3 + 4 * 3
    assert {cell.part for cell in every if "/" in cell.name} == {
        *study.MIXES,
        "rate",
        "long",
        "smollm2",
    }
    for cell in every:
        args = train.parse_args(study.command(cell, "SmolLM2")[2:])
        assert args.seed == cell.seed and args.run_dir in (cell.name, "warm")
        assert args.steps == cell.steps
        if "smollm2" not in cell.name and args.steps > 0:
            assert args.prompts_per_step * args.group_size == study.RESPONSES
    # Seed by seed, so that whatever is finished is balanced
    places = [names.index(f"hard/ngrpo-{seed}") for seed in range(5)]
    assert places == sorted(places)


def test_mixes_hold_the_shares_they_name_and_their_held_out_problems_are_new(tmp_path):
    study.make_mixes(tmp_path / "data")
    for mix, shares in study.MIXES.items():
        both = []
        for name, size in (("train", study.TRAIN_PROBLEMS), ("test", study.TEST_PROBLEMS)):
            text = (tmp_path / f"data/{mix}_{name}.jsonl").read_text()
            rows = [json.loads(line) for line in text.splitlines()]
            assert len(rows) == size
            both.append({row["problem"].split()[1] for row in rows})
            for (level, question), percent in shares.items():
                alike = []
                for row in rows:
                    if row["level"] == level and row["problem"].startswith(question):
                        alike.append(row)
                assert len(alike) == len(rows) * percent // 100
                for row in alike:
                    expression = row["problem"].removeprefix(question).strip()
                    assert re.fullmatch(r"[\d*+-]+", expression)
                    assert eval(expression) == int(row["answer"])
                    assert 0 <= int(row["answer"]) <= 39
        assert not both[0] & both[1]


def test_a_record_gives_back_the_figures_of_the_runs(fakes, tmp_path, capsys):
    fakes("easy/grpo-0", "easy/copo-0")
    assert "warm-0: " in (said := capsys.readouterr().out) and said.count("easy/grpo-0: ") == 1
    study.main(["--unpack", str(tmp_path / "out")])
    for name in ("easy/grpo-0", "easy/copo-0"):
        raw = compare.load_run(tmp_path / "runs/seed-0" / name)
        back = compare.load_run(tmp_path / "out" / name)
        for step, line in back.evaluations.items():
            assert line["per_problem"] == raw.evaluations[step]["per_problem"]
            assert line["per_problem_maj"] == raw.evaluations[step]["per_problem_maj"]
        assert sorted(back.evaluations) == list(range(0, study.STEPS + 1, study.EVAL_EVERY))
        ours = compare.run_statistics(back, back.evaluations)
        theirs = compare.run_statistics(raw, back.evaluations)
        assert ours.keys() == theirs.keys()
        for statistic, values in ours.items():
            # Seconds have four decimals.
            assert values == pytest.approx(theirs[statistic], abs=1e-4 * study.STEPS)
    assert "/somewhere" not in study.RECORD.read_text() and "/x/" not in study.RECORD.read_text()


def test_what_is_on_record_is_not_run_again_unless_asked(fakes, tmp_path, capsys):
    fakes("easy/grpo-0")
    before = study.RECORD.read_text()
    capsys.readouterr()
    fakes("easy/grpo-0")
    assert capsys.readouterr().out == "" and study.RECORD.read_text() == before
    fakes("easy/grpo-0", again=True)
    assert "every number is the one on record" in capsys.readouterr().out
    assert study.RECORD.read_text() == before
    study.RECORD.write_text(before.replace('"mixed":[0.25', '"mixed":[0.5'))
    fakes("easy/grpo-0", again=True)
    assert "NOT the one on record" in capsys.readouterr().out


def test_a_cell_that_fails_is_named_and_the_rest_goes_on(fakes, tmp_path, capsys):
    (tmp_path / "runs/seed-4/warm/model").mkdir(parents=True)
    (tmp_path / "runs/seed-0/warm/model").mkdir(parents=True)
    with pytest.raises(SystemExit, match="failed: hard/copo-4"):
        fakes("hard/copo-[04]")
    assert set(study.load_record()) == {"hard/copo-0"}
    assert re.search(r"hard/copo-4: \d+ s, FAILED", capsys.readouterr().out)


def made_up_cell(*means):
    """A cell on record with these held-out means of one problem, of a hundred samples."""
    lines = []
    for step, mean in enumerate(means):
        lines.append({"step": step, "k": 100, "correct": [round(100 * mean)]})
    return {"held_out": lines}


def test_the_area_is_the_mean_accuracy_along_the_way():
    # Trapezoids between four points: (0 + .2)/2, (.2 + .4)/2, (.4 + .2)/2, their mean
    assert study.area(made_up_cell(0, 0.2, 0.4, 0.2)) == pytest.approx((0.1 + 0.3 + 0.3) / 3)


def test_a_cell_waits_for_its_rules_learning_rate(tmp_path, monkeypatch, capsys):
    cells = {cell.name: cell for cell in study.all_cells()}
    record = {}
    for rate, first, second in (("1e-4", 0.2, 0.3), ("2e-4", 0.5, 0.1), ("4e-4", 0.3, 0.1)):
        for rule in ("grpo", "copo-forced"):
            record[f"rate/{rule}@{rate}-5"] = made_up_cell(0, 2 * first)
            record[f"rate/{rule}@{rate}-6"] = made_up_cell(0, 2 * second)
    assert study.best_rate(record, "grpo") == "2e-4"
    monkeypatch.setitem(study.LEARNING_RATES, "grpo", "2e-4")
    monkeypatch.setitem(study.LEARNING_RATES, "copo-forced", "1e-4")
    for name in ("hard/grpo-0", "easy/placebo-4", "hard/sign-0", "rate/copo@1e-4-5", "long/grpo-0"):
        assert study.unsettled(cells[name], record) == ""
    for name in ("hard/copo-forced-0", "even/copo-forced-0.3-1", "long/copo-forced-2"):
        assert "copo-forced's best learning rate is 2e-4" in study.unsettled(cells[name], record)
    assert study.unsettled(cells["smollm2/copo-forced-0"], {}) == ""
    del record["rate/grpo@4e-4-6"]
    for name in ("hard/grpo-0", "easy/placebo-4"):
        assert "--only 'rate/grpo@*'" in study.unsettled(cells[name], record)

    monkeypatch.setattr(study, "RECORD", tmp_path / "record.json")
    (tmp_path / "runs/seed-0/warm/model").mkdir(parents=True)
    with pytest.raises(SystemExit) as stop:
        study.main(["--only", "hard/grpo-0", "--runs", str(tmp_path / "runs")])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1 and "hard/grpo-0" in error


def test_a_place_that_cannot_be_written_ends_unpack_in_one_line(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit) as stop:
        study.main(["--unpack", str(tmp_path / "file/runs")])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1 and "file/runs" in error


def test_the_long_run_waits_for_the_best_other_rule(monkeypatch):
    record = {}
    for name in study.CONFIGURATIONS:
        for seed in range(3):
            top = 0.9 if name in study.NOT_OTHER else 0.3 + 0.01 * (name == "sign")
            record[f"hard/{name}-{seed}"] = made_up_cell(0.1, top)
    assert study.best_other(record) == "sign"
    monkeypatch.setattr(study, "BEST_OTHER", "batch")
    cell = study.long_cells(0)[-1]
    assert cell.configuration == "batch" and "is sign" in study.unsettled(cell, record)
    monkeypatch.setattr(study, "BEST_OTHER", "sign")
    assert study.unsettled(study.long_cells(0)[-1], record) == ""
    del record["hard/dapo-2"]
    assert "hard/*-[012]" in study.unsettled(study.long_cells(0)[-1], record)


def test_what_is_filled_in_by_hand_is_what_the_record_says():
    record = study.load_record()
    for rule, rate in study.LEARNING_RATES.items():
        assert study.best_rate(record, rule) in (rate, None)
    assert study.best_other(record) in (study.BEST_OTHER, None)


def test_groups_of_equal_verdicts_by_hand(tmp_path):
    lines = [
        # All wrong, w 0: A is coef · A^g = -0.5
        {"step": 1, "correct": [0, 0], "weight": [0, 0], "local_adv": [0, 0], "global_adv": -1},
        {"step": 1, "correct": [0, 0], "weight": [1, 1], "local_adv": [0, 0], "global_adv": -1},
        {"step": 1, "correct": [1, 0], "weight": [0, 0], "local_adv": [1, -1], "global_adv": 3},
        # All right: ¾ · 2 + ½ · ¼ · 4 and ½ · 1 · 4
        {"step": 2, "correct": [1, 1], "weight": [0.75, 0], "local_adv": [2, 9], "global_adv": 4},
    ]
    study.write_lines(tmp_path / "groups.jsonl", lines)
    study.write_lines(tmp_path / "metrics.jsonl", [{"step": step} for step in (1, 2, 3)])
    assert study.equal_groups(tmp_path, 0.5) == {
        "all_wrong_share": [0.5, None, None],
        "all_wrong_adv": [-0.25, None, None],
        "all_right_share": [None, 1, None],
        "all_right_adv": [None, 2, None],
    }


def test_two_commands_keep_each_others_records(fakes, tmp_path, monkeypatch):
    """What another command has put on record while a cell ran stays there."""
    fakes("easy/grpo-0")
    cell = study.load_record()["easy/grpo-0"]
    original = study.start

    def start(cell_started, runs, model):
        with study.record_lock():
            study.save_record(study.load_record() | {"easy/other-0": cell})
        return original(cell_started, runs, model)

    monkeypatch.setattr(study, "start", start)
    fakes("easy/copo-0")
    assert set(study.load_record()) == {"easy/grpo-0", "easy/other-0", "easy/copo-0"}


def test_dapo_is_measured_in_the_responses_that_the_others_had(fakes):
    fakes("easy/dapo-0")
    cell = study.load_record()["easy/dapo-0"]
    # Each of its steps samples what four of the others do.
    assert cell["metrics"]["step"] == [4.0 * n for n in range(1, study.STEPS // 4 + 1)]
    firsts = [line["correct"][0] for line in cell["held_out"]]
    assert firsts == [n % 5 for n in range(study.STEPS // study.EVAL_EVERY + 1)]
    assert study.gradient_share(cell) == 0.25


def test_a_step_without_an_update_goes_on_record(fakes, tmp_path):
    fakes("easy/dapo-0")
    cell = study.load_record()["easy/dapo-0"]
    assert cell["metrics"]["token_entropy"] == [0.5] * 3 + [None]
    study.unpack({"easy/dapo-0": cell}, tmp_path / "unpacked")
    run = study.compare.load_run(str(tmp_path / "unpacked/easy/dapo-0"))
    statistics = study.compare.run_statistics(run, run.evaluations)
    assert "token entropy, last step" not in statistics
    assert statistics["response length, last step"] == 9.0


def tables_of(printed):
    """{title: {first cell of a row: its other cells}}"""
    blocks = printed.rstrip().split("\n\n")
    tables = {}
    for title, table in zip(blocks[::2], blocks[1::2]):
        rows = [line.strip("| ").split(" | ") for line in table.splitlines()]
        tables[title] = {name: cells for name, *cells in rows}
    return tables


def test_tables_tell_what_is_on_record(fakes, tmp_path, capsys):
    fakes("hard/*-[01]", "rate/ngrpo@2e-4-[56]", "long/grpo-0")
    capsys.readouterr()
    study.main(["--tables"])
    tables = tables_of(capsys.readouterr().out)
    found = {title.split(":")[0]: table for title, table in tables.items()}
    assert found["The search"]["ngrpo"] == ["", "50.0%"]
    # Of eight problems, 13 of 32 samples are correct at step 0 (16 with seed 1), 15 (13), 17 (15)
    # and 19 (17) at steps 4, 8 and 12, 16 (19) at step 16.
    assert found["The mixes"]["hard"][:4] == ["75.0%", "25.0%", "0.0%", "45.3%"]
    assert found["The mixes"]["hard"][4].startswith("+9.4% [")
    grpo, copo = tables["hard: accuracy"]["grpo"], tables["hard: accuracy"]["copo"]
    assert grpo[:2] == ["2e-4", "2"] and grpo[2].startswith("54.7% [")
    assert grpo[3] == "" and grpo[4].startswith("50.0% [") and len(grpo) == 5
    assert copo[3] == copo[5] == "+0.0% [+0.0%, +0.0%]"
    beside = tables["hard: what goes with it"]
    # One of the eight has no correct sample at step 16.
    numbers = ["87.5%", "33.3%", "100.0%", "0.500", "9.0", "5.0%"]
    assert beside["grpo"] == [*numbers, "25.0%"] and beside["copo"] == [*numbers, "100.0%"]
    along = tables["long: mean@4 along the way"]
    assert along["configuration"][-2:] == ["step 64", "each seed, last step"]
    assert along["grpo"][:5] == ["40.6%", "53.1%", "50.0%", "46.9%", "59.4%"]
    assert along["grpo"][-2:] == ["46.9%", "46.9%"]
    equal = found["Groups of equal verdicts"]  # no group was all right
    assert equal["grpo"] == ["0%, +0.00"] and equal["copo"] == ["100%, -1.00"]
    text = (tmp_path / "docs/hard.txt").read_text()
    assert "minus grpo" in text and "16 of" not in text
    if find_spec("matplotlib"):
        drawn = {path.name for path in (tmp_path / "docs").glob("*.png")}
        assert drawn == {"hard.png", "long.png", "study.png"}


def test_students_t_with_four_degrees_of_freedom():
    # Every table of Student's t has these.
    for t, below in ((0, 0.5), (2.131847, 0.95), (2.776445, 0.975), (4.604095, 0.995)):
        assert study.student_cdf(t) == pytest.approx(below, abs=1e-6)
        assert study.student_cdf(-t) == pytest.approx(1 - below, abs=1e-6)
    # Its density, integrated: Γ(5/2) / (√(4π) Γ(2)) (1 + x²/4)^(-5/2) = ⅜ (1 + x²/4)^(-5/2)
    xs = np.linspace(0, 1.3, 10_001)
    integral = np.trapezoid(3 / 8 * (1 + xs * xs / 4) ** -2.5, xs)
    assert study.student_cdf(1.3) == pytest.approx(0.5 + integral, abs=1e-8)


def test_p_value_by_hand():
    # Mean 3, standard deviation √2.5, so t = 3 / √(2.5 / 5) = 3 √2; sinθ = t / √(4 + t²) = √(9/11)
    s = (9 / 11) ** 0.5
    by_hand = 2 * (0.5 - 0.75 * (s - s**3 / 3))
    assert study.p_value([1, 2, 3, 4, 5]) == pytest.approx(by_hand)
    assert study.p_value([-1, -2, -3, -4, -5]) == pytest.approx(by_hand)
    assert by_hand == pytest.approx(0.0132, abs=1e-4)
    assert study.p_value([1, -1, 1, -1, 0]) == 1
    assert study.p_value([0] * 5) == 1 and study.p_value([0.25] * 5) == 0


def test_holm_by_hand():
    # 4 · .01, 3 · .015, 2 · .04 and 1 · .03, which must not be below the one before it
    corrected = study.holm({"a": 0.04, "b": 0.01, "c": 0.015, "d": 0.03})
    assert corrected == pytest.approx({"b": 0.04, "c": 0.045, "d": 0.06, "a": 0.06})
    assert study.holm({"a": 0.7, "b": 0.6}) == {"b": 1, "a": 1}


def made_up_report(differences, interval):
    row = {"difference": {"runs": differences, "mean": 0.1, "interval": interval}}
    last = {"statistic": study.LAST, **row}
    area = {"statistic": study.AREA, **row}
    return {study.LAST: last, study.AREA: area}


def test_marks_are_counted_over_rules_and_mixes():
    none = {"difference": None}
    reports = {
        "hard": {
            "grpo": {study.LAST: none, study.AREA: none},
            "copo": made_up_report([0.1, 0.11, 0.1, 0.11, 0.1], [0.05, 0.2]),
            "sign": made_up_report([0.1, -0.1, 0.2, 0.1, 0.1], [-0.1, 0.2]),
        },
        "easy": {
            "copo": made_up_report([0.1, 0.0, 0.2, 0.1, 0.0], [0.1, 0.2]),
            "sign": made_up_report([0.1, 0.1], [0.1, 0.2]),  # two seeds
        },
        "long": {"copo": made_up_report([0.1, 0.11, 0.1, 0.11, 0.1], [0.05, 0.2])},  # no mix
    }
    p_values = study.area_tests(reports)
    assert set(p_values) == {("hard", "copo"), ("hard", "sign"), ("easy", "copo")}
    corrected = study.holm(p_values)
    (table,) = tables_of(study.marks_table(reports, corrected)).values()
    # Three comparisons: 5 % of them
    assert table[f"* {study.LAST}"] == table[f"* {study.AREA}"] == ["3", "2", "0.1"]
    # t of easy/copo is .08 / (.0837 / √5) = 2.14: p .0993
    assert p_values["easy", "copo"] == pytest.approx(0.0993, abs=1e-3)
    assert table[f"† {study.AREA}"] == ["3", "1", "0.05 at most"]


def test_the_tables_of_the_document_are_those_of_the_record(tmp_path, monkeypatch):
    """What stands in docs/study.md and in docs/study/ comes out of study/record.json."""
    record = study.load_record()
    documented = study.ATTACHMENTS
    monkeypatch.setattr(study, "ATTACHMENTS", tmp_path / "docs")  # the documents are not to change
    reports = study.compare_parts(record, tmp_path / "runs")
    printed = study.make_tables(record, reports).splitlines()
    document = (study.ROOT / "docs/study.md").read_text()
    rows = [line for line in document.splitlines() if line.startswith("|")]
    assert bool(rows) == bool(record) and set(rows) <= set(printed)
    texts = {path.name: path.read_text() for path in documented.glob("*.txt")}
    assert texts == {f"{part}.txt": (tmp_path / f"docs/{part}.txt").read_text() for part in reports}


def test_flags_that_are_not_shared_stand_with_their_cell(tmp_path, monkeypatch):
    """Cells of several versions: a flag that some of them lack stays with those that have it."""
    monkeypatch.setattr(study, "RECORD", tmp_path / "record.json")
    record = {
        "a/copo-0": {"flags": {"algo": "copo", "eval_seed": 0, "gamma": 5.0}},
        "b/copo-0": {"flags": {"algo": "copo", "gamma": 20.0}},
    }
    study.save_record(record)
    assert study.load_record() == record
    assert json.loads((tmp_path / "record.json").read_text())["flags"] == {"algo": "copo"}
