"""study/compare.py on runs made up here, by hand; study/authors_metrics.py against verl's own way.

Bugs these tests guard against: a comparison that pairs seeds or problems with others, sets half a
run against a whole one, or counts a failed run; flags of speed, of another version or of another
place that make two configurations of one.
"""

import json
import math
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import tiny_runs

import train
from eval import maj_at_k, metrics_per_problem, pass_at_k

sys.path.append(str(Path(__file__).resolve().parent.parent / "study"))
import authors_metrics
import compare
from authors_metrics import bootstrap_best_at_k, bootstrap_maj_at_k

import study


def refused(capsys, arguments, main=compare.main):
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in arguments])
    output = capsys.readouterr()
    assert stop.value.code == 2 and output.err.count("\n") == 1 and output.out == ""
    return output.err


# -------------------------------------------------------------------------------------- comparison

FLAGS_OF_A_RUN = {
    "algo": "copo",
    "blend": "soft-zero",
    "gamma": 5.0,
    "seed": 0,
    "steps": 20,
    "micro_tokens": 64,
    "data": "/here/data/train.jsonl",
    "eval_data": "/here/data/test.jsonl",
    "run_dir": "x",
}


def fake_run(path, evaluations, metrics, **flags):
    """A run's files: evaluations {step: (per problem, per problem of the vote)}, metrics [(step,
    tokens, ...)]; token entropy and length follow from the step."""
    path.mkdir(parents=True)
    flags = FLAGS_OF_A_RUN | {"run_dir": str(path)} | flags
    (path / "run.json").write_text(json.dumps({"flags": flags}))
    names = ("step", "tokens", "seconds", "mixed", "zero_gradient_groups", "wrong_pushed_up")
    lines = []
    for row in metrics:
        line = dict(zip(names, row)) | {"loss": 0.1, "prompts_trained": 4}
        lines.append(line | {"token_entropy": row[0] / 100, "length_mean": row[0] + 0.5})
    write_lines(path / "metrics.jsonl", lines)
    lines = []
    for step, (means, votes) in evaluations.items():
        lines.append({"step": step, "k": 2, "per_problem": means, "per_problem_maj": votes})
    write_lines(path / "eval.jsonl", lines)


def write_lines(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def change_info(path, **fields):
    """Add fields to a run's run.json."""
    info = json.loads((path / "run.json").read_text())
    (path / "run.json").write_text(json.dumps(info | fields))


@pytest.fixture
def three_runs(tmp_path):
    """copo with seeds 0 and 1; grpo with seed 0, which stopped half way."""
    fake_run(
        tmp_path / "copo-0",
        {
            0: ([0, 0, 0.5, 0.5], [0] * 4),
            10: ([1, 1, 0.5, 0.5], [1, 1, 0, 0.5]),
            20: ([1, 0.5, 0.5, 0], [1, 0.5, 0, 0]),
        },
        [(1, 100, 2.0, 0.5, 0.0, 0.1), (20, 300, 3.0, 0.25, 0.5, 0.3)],
    )
    fake_run(
        tmp_path / "copo-1",
        {
            0: ([0] * 4, [0] * 4),
            10: ([0.5, 0.5, 0, 0], [0.5, 0.5, 0, 0]),
            20: ([1, 1, 1, 0], [1, 1, 1, 0]),
        },
        [(20, 500, 7.0, 0.5, 0.0, 0.4)],
        seed=1,
        data="/there/data/train.jsonl",
        micro_tokens=99,
    )
    fake_run(
        tmp_path / "grpo-0",
        {0: ([0, 0, 0.5, 0.5], [0, 0, 0, 1]), 10: ([0.5] * 4, [0, 0, 0, 1])},
        [(1, 60, 1.0, 0.5, 0.5, 0.0), (12, 900, 9.0, 0.0, 1.0, 0.0)],
        algo="grpo",
        blend="local",
    )
    return tmp_path


def compared(capsys, tmp_path, *arguments):
    compare.main([*map(str, arguments), "--json", str(tmp_path / "out.json")])
    report = json.loads((tmp_path / "out.json").read_text())
    statistics = {(row["configuration"], row["statistic"]): row for row in report["statistics"]}
    return capsys.readouterr().out, report, statistics


def test_three_runs_by_hand(capsys, three_runs):
    paths = three_runs / "*-0", three_runs / "copo-1"
    text, report, statistics = compared(capsys, three_runs, *paths, "--baseline", "grpo")
    assert report["flags"] == {
        "copo": {"algo": "copo", "blend": "soft-zero"},
        "grpo": {"algo": "grpo", "blend": "local"},
    }
    assert (report["problems"], report["baseline"], report["failed"]) == (4, "grpo", {})
    runs = [(run["seed"], run["step"], run["of"]) for run in report["runs"]["copo"]]
    assert runs == [(0, 20, 20), (1, 20, 20)]
    assert "0 (unfinished: step 10 of 20)" in text and "One seed, so over problems only" in text
    # copo, seeds 0 and 1, by hand. Curves of seed 0 by problem, steps 0 10 20: 0 1 1, 0 1 ½,
    # ½ ½ ½, ½ ½ 0; trapezoids over 20 steps: .75, .625, .5, .375. Of seed 1: 0 ½ 1, 0 ½ 1, 0 0 1,
    # 0 0 0: .5, .5, .25, 0. Seed 0 is best at 10.
    by_hand = {
        "mean@2, last step": (0.5, 0.75),
        "mean@2, best step": (0.75, 0.75),
        "maj@2, last step": (0.375, 0.75),
        "maj@2, best step": (0.625, 0.75),
        "mean@2, area under the curve": (0.5625, 0.3125),
        "mean@2, gain": (0.25, 0.75),
        "pass@2, last step": (0.75, 0.75),
        # Seed 0: problems 1 and 2, both solved; seed 1: all, three of them solved
        "recovery": (1, 0.75),
        "tokens sampled": (300, 500),
        "seconds": (5, 7),
        "token entropy, last step": (0.2, 0.2),
        "response length, last step": (20.5, 20.5),
        "groups of equal verdicts": (0.625, 0.5),
        "groups without gradient": (0.25, 0),
        "wrong responses pushed up": (0.2, 0.4),
    }
    assert list(by_hand) == list(dict.fromkeys(row["statistic"] for row in report["statistics"]))
    for name, runs in by_hand.items():
        assert statistics["copo", name]["runs"] == pytest.approx(runs)
        assert statistics["copo", name]["mean"] == pytest.approx(sum(runs) / 2)
    # grpo: its line of step 12 lies beyond its last evaluation and counts nowhere
    by_hand = (0.5, 0.5, 0.25, 0.25, 0.375, 0.25, 1, 1, 60, 1, 0.01, 1.5, 0.5, 0.5, 0)
    grpo = [row for row in report["statistics"] if row["configuration"] == "grpo"]
    assert [row["mean"] for row in grpo] == pytest.approx(by_hand)
    assert all(row["difference"] is None for row in grpo)
    # Differences: of seed 0 alone, and up to step 10 alone, where both are. copo-0 there: mean ¾,
    # maj ⅝, area ½, gain ½, all four solved, its first line of metrics.
    by_hand = (0.25, 0.25, 0.375, 0.375, 0.125, 0.25, 0, 0, 40, 1, 0, 0, 0, -0.5, 0.1)
    copo = [row for row in report["statistics"] if row["configuration"] == "copo"]
    assert [row["difference"]["mean"] for row in copo] == pytest.approx(by_hand)
    # Intervals. Two seeds, one number each: both bounds are drawn with chance ¼. One seed and
    # ½ ½ 0 0 over problems: a sixteenth for 0, another for ½. One seed, one number: none.
    # Two seeds and four problems, all 4 · 256 draws: 1.2 % are below 3/16, 2.7 % at most 3/16;
    # 8.2 % are 1.
    assert statistics["copo", "mean@2, last step"]["interval"] == [3 / 16, 1]
    assert statistics["copo", "tokens sampled"]["interval"] == [300, 500]
    assert statistics["copo", "mean@2, last step"]["difference"]["interval"] == [0, 0.5]
    assert statistics["copo", "tokens sampled"]["difference"]["interval"] is None
    assert statistics["grpo", "seconds"]["interval"] is None
    assert statistics["grpo", "mean@2, last step"]["interval"] == [0.5, 0.5]
    # The table says what the file says.
    rows = []
    for line in text.splitlines():
        if line.startswith("|"):
            rows.append([cell.strip() for cell in line.split("|")[1:-1]])
    assert ["mean@2, last step", "copo", "62.5% [18.8%, 100.0%]", "+25.0% [+0.0%, +50.0%]"] in rows
    assert ["tokens sampled", "copo", "400 [300, 500]", "+40"] in rows
    assert ["groups without gradient", "copo", "12.5% [0.0%, 25.0%]", "-50.0%"] in rows
    assert ["token entropy, last step", "copo", "0.200 [0.200, 0.200]", "+0.000"] in rows
    assert ["response length, last step", "copo", "20.5 [20.5, 20.5]", "+0.0"] in rows
    assert "chosen on these same problems" in text and "No stars: they take 5 seeds" in text


@pytest.mark.parametrize("seeds", [4, 5])
def test_a_marked_difference_excludes_zero_over_five_seeds(capsys, tmp_path, seeds):
    for seed in range(seeds):
        for algo, value in (("copo", 0.75), ("grpo", 0.5)):
            pair = ([value] * 4, [value, 0.5, 0.5, 0.5])
            fake_run(tmp_path / f"{algo}{seed}", {0: pair}, [], algo=algo, seed=seed, steps=0)
    arguments = [tmp_path / "*o[0-4]", "--baseline", tmp_path / "grpo1"]
    text, _, statistics = compared(capsys, tmp_path, *arguments)
    assert "+25.0% [+25.0%, +25.0%]" in text
    assert ("+25.0% [+25.0%, +25.0%] *" in text) == (seeds == 5)
    # Mean and maj at the last and the best step, area, last minus first, pass
    assert ("of 7 such differences that were all 0, 0.3 would" in text) == (seeds == 5)
    # A problem may be drawn never.
    assert statistics["copo", "maj@2, last step"]["difference"]["interval"][0] == 0
    assert "tokens sampled" not in text and "unfinished" not in text
    assert "| recovery" not in text  # every problem was solved at first


def test_groups_that_dynamic_sampling_dropped_count_as_equal(capsys, tmp_path):
    fake_run(tmp_path / "dapo", {1: ([1] * 4, [1] * 4)}, [(1, 60, 1.0, 1.0, 0.0, 0.0)], algo="dapo")
    line = json.loads((tmp_path / "dapo/metrics.jsonl").read_text())
    write_lines(tmp_path / "dapo/metrics.jsonl", [line | {"equal_groups_drawn": 0.75}])
    _, _, statistics = compared(capsys, tmp_path, tmp_path / "dapo")
    assert statistics["dapo", "groups of equal verdicts"]["mean"] == 0.75


def test_configurations_are_named_by_what_sets_them_apart(capsys, three_runs):
    curve = {0: ([0] * 4, [0] * 4)}
    fake_run(three_runs / "soft", curve, [], blend="soft", gamma=20.0)
    text, report, _ = compared(capsys, three_runs, three_runs / "*")
    # What is the preset's own goes without saying.
    names = ["copo", "grpo", "copo blend=soft gamma=20.0"]
    assert list(report["flags"]) == names
    assert report["baseline"] is None and "| minus" not in text and "Differences" not in text
    assert report["flags"]["grpo"] == {"algo": "grpo", "blend": "local", "gamma": 5.0}
    # A flag that the others lack
    fake_run(three_runs / "newer", curve, [], algo="dapo", blend="local", kl_coef=0.5)
    text, report, _ = compared(capsys, three_runs, three_runs / "*")
    assert report["flags"]["dapo"]["kl_coef"] == 0.5 and report["flags"]["grpo"]["kl_coef"] is None
    assert len({line.count("|") for line in text.split("\n\n")[0].splitlines()}) == 1
    fake_run(three_runs / "again", curve, [], seed=1, save_every=3)
    # The same seed of the same configuration
    assert "copo-1" in refused(capsys, [three_runs / "*"])


def test_flags_of_speed_make_no_configuration():
    """What may change on resume without a word, lengths apart, tells no configurations apart; new
    flags of that kind neither."""
    known = set(vars(train.build_parser().parse_args([])))
    assert known.issuperset(compare.NOT_A_CONFIGURATION) and not known & compare.FORMER_FLAGS
    may_change = set(train.MAY_CHANGE_ON_RESUME) - {"steps", "eval_every"}
    assert compare.NOT_A_CONFIGURATION.issuperset(may_change)


def test_runs_of_both_formats_are_one_configuration(capsys, tmp_path):
    curve = {0: ([0.5] * 4, [0.5] * 4)}
    former = {"eval_seed": 0, "max_bad_updates": 5, "rollout_memory": 0.0, "samples_every": 10}
    fake_run(tmp_path / "old", curve, [], seed=0, kl_coef=0.5, **former)
    later = {"kl_estimator": "k3", "reward": None}
    fake_run(tmp_path / "new", curve, [], seed=1, kl_coef=0.5, **later)
    change_info(tmp_path / "new", format=2)
    _, report, _ = compared(capsys, tmp_path, tmp_path / "old", tmp_path / "new")
    assert list(report["runs"]) == ["copo"] and len(report["runs"]["copo"]) == 2
    fake_run(tmp_path / "rewarded", curve, [], seed=1, kl_coef=0.5, reward="a.py:f")
    _, report, _ = compared(capsys, tmp_path, tmp_path / "old", tmp_path / "rewarded")
    assert list(report["runs"]) == ["copo reward=None", "copo reward=a.py:f"]
    change_info(tmp_path / "new", format=3)
    _, report, _ = compared(capsys, tmp_path, tmp_path / "old", tmp_path / "new")
    assert "format 3; this program reads 1 and 2" in report["failed"][str(tmp_path / "new")]


def test_the_record_and_its_commands_today_are_one_configuration(tmp_path, monkeypatch):
    """Each cell of the study, as on record and with the flags that train.py makes of it now."""
    record = study.load_record()
    monkeypatch.chdir(tmp_path)
    for cell in study.all_cells():
        if cell.name not in record:
            continue
        argv = study.command(cell, record[cell.name]["flags"]["model"])[2:]
        today = vars(train.parse_args(argv))
        today["model"] = record[cell.name]["flags"]["model"]  # the last two names of a path
        configs = [compare.configuration(record[cell.name]["flags"]), compare.configuration(today)]
        assert configs[0] == configs[1]


def test_failed_runs_are_listed_and_unfinished_ones_count(capsys, three_runs):
    runs = three_runs / "bad"
    (runs / "empty").mkdir(parents=True)
    fake_run(runs / "killed-in-warm-start", {}, [])
    fake_run(runs / "diverged", {0: ([0] * 4, [0] * 4)}, [(7, 1, 1.0, 0.5, 0.0, 0.0)])
    line = json.loads((runs / "diverged/metrics.jsonl").read_text())
    write_lines(runs / "diverged/metrics.jsonl", [line | {"loss": None}])
    fake_run(runs / "damaged", {0: ([0] * 4, [0] * 4)}, [])
    (runs / "damaged/eval.jsonl").write_text('{"step": 0,\n{"step": 1}\n')
    fake_run(runs / "older", {1: ([0] * 4, [0] * 4)}, [])
    (runs / "older/metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n')
    fake_run(runs / "changed", {1: ([0] * 4, [0] * 4)}, [])
    resumed = [{"step": 0, "changed": {}}, {"step": 1, "changed": {"gamma": [1.0, 5.0]}}]
    change_info(runs / "changed", resumed=resumed)
    for name, how in (("stopped", "stopped"), ("broken", "failed")):
        fake_run(runs / name, {0: ([0] * 4, [0] * 4)}, [], algo="dapo", seed=len(name))
        change_info(runs / name, ended={"how": how, "step": 3, "why": "OSError: disk full"})
    with open(three_runs / "copo-1/eval.jsonl", "a") as file:
        file.write('{"step": 30, "k":')  # killed while writing: the line before counts
    text, report, _ = compared(capsys, three_runs, three_runs / "copo-*", runs / "*")
    reasons = {path.split("/")[-1]: reason for path, reason in report["failed"].items()}
    names = "empty killed-in-warm-start diverged damaged older changed broken"
    assert sorted(reasons) == sorted(names.split())
    assert reasons["broken"] == "failed after step 3: OSError: disk full"
    assert [Path(run["path"]).name for run in report["runs"]["dapo"]] == ["stopped"]
    assert "resumed with another gamma" in reasons["changed"]
    assert "run.json" in reasons["empty"] and "no evaluation" in reasons["killed-in-warm-start"]
    assert "step, 7, was finite" in reasons["diverged"]
    assert "unreadable: JSONDecodeError" in reasons["damaged"]
    assert "'tokens'" in reasons["older"]
    assert text.count("failed, and in no statistic") == 7 and len(report["runs"]["copo"]) == 2


def test_a_step_without_an_update_lacks_only_what_it_lacks(capsys, three_runs):
    """dapo without a mixed group: no token entropy; the row is there of the runs that have it."""
    path = three_runs / "copo-0/metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    del lines[-1]["token_entropy"]
    write_lines(path, lines)
    _, report, statistics = compared(capsys, three_runs, three_runs / "copo-*")
    assert not report["failed"]
    assert len(statistics["copo", "token entropy, last step"]["runs"]) == 1
    assert len(statistics["copo", "response length, last step"]["runs"]) == 2


def test_a_flag_that_makes_no_configuration_may_change_on_resume(capsys, three_runs):
    resumed = [{"step": 1, "changed": {"verifier_memory": [1024, 2048]}}]
    change_info(three_runs / "copo-0", resumed=resumed)
    _, report, _ = compared(capsys, three_runs, three_runs / "copo-*")
    assert not report["failed"] and len(report["runs"]["copo"]) == 2


def test_a_real_run_is_read(capsys, tmp_path, monkeypatch):
    """Field names are those that train.py writes: runs made here and now show every statistic."""
    monkeypatch.setattr(train, "Verifier", tiny_runs.Judge)
    runs = tiny_runs.Runs(tmp_path)
    for algo in ("copo", "grpo"):
        train.main(runs.argv(algo=algo, run_dir=tmp_path / algo))
    arguments = [tmp_path / "copo", tmp_path / "grpo", "--baseline", "copo"]
    _, report, statistics = compared(capsys, tmp_path, *arguments)
    assert report["failed"] == {} and len(statistics) == 2 * 15
    assert list(report["flags"]) == ["copo", "grpo"]
    assert list(report["flags"]["grpo"]) == ["algo", "blend"]


def test_plot_of_curves(capsys, three_runs, monkeypatch):
    arguments = [three_runs / "*o-?", "--plot", three_runs / "curves.png"]
    monkeypatch.setattr(compare, "find_spec", lambda name: None)
    assert "pip install matplotlib" in refused(capsys, arguments)
    monkeypatch.undo()
    pytest.importorskip("matplotlib")
    compared(capsys, three_runs, *arguments)
    assert (three_runs / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_wrong_comparisons_end_in_one_line(capsys, three_runs):
    def message(*arguments):
        return refused(capsys, arguments)

    assert "no such directory" in message(three_runs / "nowhere*")
    assert "RUN" in message()
    assert "--model" in message(three_runs / "copo-0", "--model", "x")
    assert "--baseline dapo is neither" in message(three_runs / "*", "--baseline", "dapo")
    (three_runs / "nothing").mkdir()
    assert "nothing to compare" in message(three_runs / "nothing")
    assert "json" in message(three_runs / "copo-0", "--json", three_runs / "no" / "where.json")
    fake_run(three_runs / "other", {0: ([0], [0])}, [], algo="dapo")
    words = "different things, (k, problems, file): [(2, 1, 'test.jsonl'), (2, 4"
    assert words in message(three_runs / "*")


@pytest.mark.parametrize(
    "command",
    [
        f"{compare.__file__} copo-0 copo-1",
        f"{study.__file__} --list",
        study.ROOT / "copo.py",
    ],
    ids=["compare", "study", "copo"],
)
def test_a_reader_that_hangs_up_ends_it_quietly(three_runs, command):
    """As `| head` does, but before the first line."""
    pipe = f"{sys.executable} {command} | true"
    done = subprocess.run(
        ["bash", "-c", pipe], cwd=three_runs, capture_output=True, text=True, timeout=120
    )
    assert done.stderr == ""


def test_as_a_script(three_runs):
    """From another directory, and without the path that pytest adds."""
    command = [sys.executable, compare.__file__, "copo-0", "copo-1"]
    done = subprocess.run(command, cwd=three_runs, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stdout.startswith("| configuration | seeds |"), done.stderr


# ------------------------------------------------------------------------------ authors' bootstrap


def test_bootstrap_metrics_are_verls_to_the_digit():
    """The definition written out as a loop: numpy's old generator, one seed for every problem, the
    first of a tie wins."""
    correct = np.array([[1, 0, 0, 1, 0], [0, 0, 0, 0, 0], [1, 1, 1, 1, 1]], bool)
    classes = np.array([[2, 0, 0, 2, -1], [-1, -1, 4, 4, 4], [0, 0, 0, 0, 0]])
    for k in (2, 3, 5):
        maj = []
        best = []
        for row, labels in zip(correct, classes):
            np.random.seed(42)
            votes = []
            hits = []
            for _ in range(1000):
                drawn = np.random.choice(5, size=k, replace=True)
                # most_common keeps the order of first sight among equals.
                ((winner, _),) = Counter(labels[drawn].tolist()).most_common(1)
                votes.append(row[list(labels).index(winner)])
                hits.append(row[drawn].any())
            maj.append(np.mean(votes))
            best.append(np.mean(hits))
        assert bootstrap_maj_at_k(correct, classes, k).tolist() == maj
        assert bootstrap_best_at_k(correct, k).tolist() == best


def test_bootstrap_metrics_by_hand():
    # Two samples, one correct. Drawn with replacement, two hold a correct one with chance 3/4
    # (without: always), and the vote is correct where the correct one is drawn first: 1/2, up to
    # the noise of 1,000 draws (3 standard errors: .047)
    correct = [[True, False]]
    classes = [[0, 1]]
    assert bootstrap_best_at_k(correct, 2)[0] == pytest.approx(3 / 4, abs=0.041)
    assert bootstrap_maj_at_k(correct, classes, 2)[0] == pytest.approx(1 / 2, abs=0.047)
    assert pass_at_k(correct, 2)[0] == 1
    # One correct and three silent: silence loses a tie half the time, and to three or four; exact
    # maj@4 says 1.
    wins = [0, 0, 0.5, 1, 1]
    chance = sum(math.comb(4, c) * 0.25**c * 0.75 ** (4 - c) * wins[c] for c in range(5))
    assert chance == pytest.approx(0.15625)
    silent = [[0, -1, -1, -1]]
    assert bootstrap_maj_at_k([[1, 0, 0, 0]], silent, 4)[0] == pytest.approx(chance, abs=0.035)
    assert maj_at_k(np.array([[1, 0, 0, 0]], bool), np.array(silent))[0] == 1
    for value in (0, 1):  # no noise where there is no doubt
        assert bootstrap_maj_at_k([[value] * 4], [[0] * 4], 3)[0] == value
        assert bootstrap_best_at_k([[value] * 4], 3)[0] == value


def write_responses(path, correct, classes):
    lines = []
    for row, (verdicts, labels) in enumerate(zip(correct, classes)):
        for verdict, label in zip(verdicts, labels):
            lines.append({"row": row, "correct": verdict, "class": label, "response": "x"})
    write_lines(path, lines)


def test_authors_metrics_are_printed_beside_ours(capsys, tmp_path):
    correct = [[True, False, False, True], [False] * 4]
    classes = [[0, 1, -1, 0], [-1, 0, 1, 1]]
    write_responses(tmp_path / "out", correct, classes)
    authors_metrics.main([str(tmp_path / "out")])
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    for name, values in metrics_per_problem(correct, classes).items():
        assert [name, f"{values.mean():.1%}"] in lines
    assert any("with replacement," in " ".join(line) for line in lines)
    for k in (2, 4):
        maj = f"{bootstrap_maj_at_k(correct, classes, k).mean():.1%}"
        best = f"{bootstrap_best_at_k(correct, k).mean():.1%}"
        assert ["bootstrap", f"maj@{k}", maj, "bootstrap", f"best@{k}", best] in lines


def test_files_without_a_vote_end_in_one_line(capsys, tmp_path):
    def message(path):
        return refused(capsys, [path], authors_metrics.main)

    assert "nowhere" in message(tmp_path / "nowhere")
    (tmp_path / "empty").write_text("")
    assert "none at all" in message(tmp_path / "empty")
    write_responses(tmp_path / "one", [[True], [False]], [[0], [0]])
    assert "no vote of one" in message(tmp_path / "one")
    write_responses(tmp_path / "uneven", [[True], [False, True]], [[0], [0, 0]])
    assert "different numbers of responses" in message(tmp_path / "uneven")
    (tmp_path / "other").write_text('{"row": 0, "correct": true, "class": 0}\n{"row": 0}\n')
    assert "other:2 is no line of eval.py --out (KeyError: 'correct')" in message(
        tmp_path / "other"
    )
