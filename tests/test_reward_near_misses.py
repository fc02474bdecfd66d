"""Kinds of wrong answers that the checker once accepted, each as a generator of near misses beside
the spellings that must stay equal. Guards against: equality that looks only near zero, or swallows
small terms; lists, moduli, templates, ratios, times, labels and connectives that lose a part of
what they say; words that change a number; a question that passes as its own answer.
"""

import random

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import reward

steady = settings(derandomize=True, max_examples=60, deadline=None, database=None)
small = st.integers(2, 40)
shuffles = st.randoms(use_true_random=False)


def equal(left: str, right: str) -> bool:
    verdict = reward.is_equivalent(left, right)
    assert verdict == reward.is_equivalent(right, left), (left, right)
    return verdict


# -- values at points
@steady
@given(st.integers(3, 10**6), st.sampled_from("xyt"))
def test_an_absolute_value_that_agrees_near_zero(c, x):
    near = [
        (rf"|{x}-{c}|", f"{c}-{x}"),
        (rf"|{x}+{c}|", f"{x}+{c}"),
        (rf"\sqrt{{({x}-{c})^2}}", f"{c}-{x}"),
        (rf"\sqrt{{{x}^2-{2 * c}{x}+{c * c}}}", f"{c}-{x}"),
        (rf"\ln|{x}-{c}|", rf"\ln({c}-{x})"),
        (rf"|{x}^2-{c * c}|", f"{c * c}-{x}^2"),
        (rf"|{x}-{c}|+|{x}-{c + 1}|", rf"|2{x}-{2 * c + 1}|"),
        (rf"\sqrt[4]{{({x}-{c})^4}}", f"{c}-{x}"),
    ]
    for left, right in near:
        assert not equal(left, right), (left, right)
    assert equal(rf"|{x}-{c}|", rf"|{c}-{x}|")
    assert equal(rf"\sqrt{{({x}-{c})^2}}", rf"|{x}-{c}|")
    assert equal(rf"\ln|{x}-{c}|", rf"\frac12\ln(({c}-{x})^2)")


@steady
@given(st.integers(1, 9), st.integers(0, 30), st.integers(2, 12), st.sampled_from("nmk"))
def test_floors_are_compared_at_integers_small_and_large(a, b, d, n):
    assume(a % d)
    inner = f"{a}{n}+{b}"
    floor = rf"\left\lfloor \frac{{{inner}}}{{{d}}} \right\rfloor"
    assert equal(floor, rf"\lceil ({inner}-{d - 1})/{d} \rceil")
    assert equal(floor, rf"\lfloor ({inner}+{d})/{d} \rfloor - 1")
    for wrong in (
        rf"\lfloor ({inner})/{d + 1} \rfloor",
        rf"\lfloor ({inner}+{d})/{d} \rfloor",
        rf"\lfloor ({inner}+{d - 1})/{d} \rfloor",
        rf"\lceil ({inner})/{d} \rceil",
        rf"\frac{{{inner}}}{{{d}}}",
    ):
        assert not equal(floor, wrong), wrong


@steady
@given(st.integers(60, 900), st.sampled_from(["e", r"\pi", "(x+y+3)", r"(3+\sqrt2)", r"\sqrt{11}"]))
def test_a_small_term_counts(k, base):
    big = f"{base}^{{{k}}}"
    tiny = f"{base}^{{-{k}}}"
    for left, right in (
        (f"{big}+1", big),
        (f"1-{tiny}", "1"),
        (f"{big}+{tiny}", big),
        (f"{tiny}", f"2{tiny}"),
        (tiny, "0"),
        (rf"\sqrt{{1+{tiny}}}", "1"),
        (rf"\frac{{{big}+1}}{{{big}}}", "1"),
    ):
        assert not equal(left, right), (left, right)
    assert equal(f"({big}+1)-{big}", "1")
    assert equal(f"({big}+1)^2", f"{base}^{{{2 * k}}}+2{big}+1")
    assert equal(f"{big}{tiny}", "1")


def test_saturating_functions_and_budgets():
    for k in (30, 50, 400, 5_000):
        assert not equal(rf"\tanh {k}", "1")
        assert not equal(rf"\cosh {k}", rf"\sinh {k}")
        assert not equal(f"e^{{{k}}}+1", f"e^{{{k}}}")
    assert equal(r"\tanh 50", r"\frac{e^{100}-1}{e^{100}+1}")


def test_what_stays_equal_at_the_complex_points():
    for left, right in (
        (r"\frac{x^2-1}{x-1}", "x+1"),
        (r"\sqrt a\sqrt b", r"\sqrt{ab}"),
        (r"\ln x^2", r"2\ln x"),
        ("n!/(n-2)!", "n(n-1)"),
        (r"\ln\frac{1+x}{1-x}", r"\ln(1+x)-\ln(1-x)"),
        (r"\lfloor x\rfloor+\lfloor x+\frac12\rfloor", r"\lfloor 2x\rfloor"),
    ):
        assert equal(left, right), (left, right)
    assert not equal(r"\lfloor x \rfloor", "x")


# -- collections
@steady
@given(st.lists(st.integers(-9, 9), min_size=2, max_size=5, unique=True), shuffles)
def test_a_list_keeps_how_often_a_value_stands_in_it(values, shuffle):
    values = values + shuffle.choices(values, k=shuffle.randint(1, 3))
    text = ", ".join(map(str, values))
    again = values[:]
    shuffle.shuffle(again)
    assert equal(text, ", ".join(map(str, again)))
    place = next(i for i, value in enumerate(values) if values.count(value) > 1)
    others = [value for value in values if value != values[place]]
    dropped = values[:place] + values[place + 1 :]
    changed = [*dropped, shuffle.choice(others)]
    for wrong in (dropped, changed, [*values, values[place]]):
        assert not equal(text, ", ".join(map(str, wrong))), wrong
    assert equal(rf"\{{{text}\}}", rf"\{{{', '.join(map(str, dict.fromkeys(values)))}\}}")


@steady
@given(st.integers(2, 60), st.integers(0, 200), st.integers(-5, 5), st.sampled_from("nxk"))
def test_a_modulus_counts(modulus, remainder, turns, name):
    spellings = [
        rf"{name} \equiv {remainder} \pmod{{{modulus}}}",
        rf"{name}\equiv {remainder + turns * modulus}\ (\bmod {modulus})",
        rf"{name} ≡ {remainder} (mod {modulus})",
        rf"{name} \equiv {remainder - modulus} \mod {modulus}",
    ]
    for spelling in spellings:
        assert equal(spellings[0], spelling), spelling
    for wrong in (
        rf"{name} \equiv {remainder} \pmod{{{modulus + 1}}}",
        rf"{name} \equiv {remainder} \pmod{{{2 * modulus}}}",
        rf"{name} \equiv {remainder + 1} \pmod{{{modulus}}}",
        rf"m \equiv {remainder} \pmod{{{modulus}}}",
        f"{remainder}",
    ):
        assert not equal(spellings[0], wrong), wrong
    several = rf"{name} \equiv {remainder}, {remainder + 1} \pmod{{{modulus}}}"
    assert equal(several, rf"{name} \equiv {remainder + 1}, {remainder} \pmod{{{modulus}}}")
    assert not equal(several, several.replace(f"{{{modulus}}}", f"{{{modulus + 2}}}"))


@steady
@given(small, st.integers(0, 9), st.sampled_from("kmn"), st.sampled_from("jst"))
def test_a_set_template_counts_and_its_variable_has_any_name(a, b, one, other):
    text = rf"\{{{a}{one}+{b} \mid {one} \in \mathbb{{Z}}\}}"
    assert equal(text, rf"\{{ {b}+{a}{other} : {other}\in\mathbb Z \}}")
    assert equal(rf"{a}{one}\pi, {one} \in \mathbb{{Z}}", rf"{a}{one}\pi")
    for wrong in (
        rf"\{{{a + 1}{other}+{b} \mid {other} \in \mathbb{{Z}}\}}",
        rf"\{{{a}{other}+{b + 1} \mid {other} \in \mathbb{{Z}}\}}",
        rf"\{{{a}{other}+{b} \mid {other} \in \mathbb{{N}}\}}",
        rf"\{{{other} \mid {other} \in \mathbb{{Z}}\}}",
    ):
        assert not equal(text, wrong), wrong


@steady
@given(st.lists(st.integers(1, 60), min_size=3, max_size=4, unique=True), small, shuffles)
def test_a_ratio_of_three_terms_is_no_quotient(terms, factor, shuffle):
    text = ":".join(map(str, terms))
    assert equal(text, " : ".join(str(factor * term) for term in terms))
    names = ":".join("abcd"[: len(terms)])
    assert equal(f"{names}={text}", text)
    place = shuffle.randrange(len(terms) - 1)
    swapped = terms[:]
    swapped[place], swapped[place + 1] = swapped[place + 1], swapped[place]
    more = [*terms[:-1], terms[-1] + 1]
    for wrong in (swapped, more, terms[:-1], [*terms, 1]):
        assert not equal(text, ":".join(map(str, wrong))), wrong


@steady
@given(st.integers(1, 12), st.integers(0, 59), st.sampled_from(["am", "pm"]), shuffles)
def test_a_time_of_day_is_no_quotient(hour, minute, half, shuffle):
    hours = hour % 12 + (12 if half == "pm" else 0)
    dotted = f"{half[0]}.m."
    time = f"{hour}:{minute:02d}"
    spellings = [rf"{time} \text{{ {dotted}}}", f"{time} {half.upper()}", f"{hours}:{minute:02d}"]
    for spelling in spellings:
        assert reward.is_equivalent(spelling, f"{time} {half}"), spelling
    other_hour = shuffle.choice([h for h in range(1, 13) if h != hour])
    other_half = "am" if half == "pm" else "pm"
    for wrong in (
        f"{hour}:{(minute + 1) % 60:02d} {half}",
        f"{other_hour}:{minute:02d} {half}",
        f"{time} {other_half}",
        f"{hour + 1}:{2 * minute:02d} {half}",
        f"{2 * hour}:{2 * minute:03d} {half}",
    ):
        assert not equal(wrong, f"{time} {half}"), wrong
    assert not reward.is_equivalent(f"{2 * hour}:{(2 * minute) % 100:02d}", time) or minute == 0


LABELS = [
    (r"\angle A", r"\angle B"),
    ("P(A)", "P(B)"),
    (r"\text{mean}", r"\text{median}"),
    (r"\overline{AB}", r"\overline{BC}"),
    ("f(2)", "f(3)"),
    ("a_1", "a_2"),
    (r"\sin A", r"\sin B"),
    (r"\text{Alice}", r"\text{Bob}"),
]


@pytest.mark.parametrize("one, other", LABELS)
def test_labels_count(one, other):
    noise = random.Random(one)
    for _ in range(20):
        a, b = noise.sample(range(1, 99), 2)
        text = f"{one}={a}, {other}={b}"
        assert equal(text, f"{other}={b}, {one}={a}") and equal(text, f"{a}, {b}")
        assert not equal(text, f"{one}={b}, {other}={a}")
        assert not equal(text, f"{b}, {a}")
        points = f"A({a},{b}), B({b},{a + b})"
        assert equal(points, f"B=({b},{a + b}), A=({a},{b})")
        assert not equal(points, f"A({b},{a + b}), B({a},{b})")
    assert equal(f"{one}=5", "5")


@steady
@given(st.integers(-20, 20), st.integers(1, 20), st.booleans(), st.booleans())
def test_or_is_not_and(low, width, open_low, open_high):
    high = low + width
    above = f"x{'>' if open_low else chr(8805)}{low}"
    below = f"x{'<' if open_high else chr(8804)}{high}"
    both = rf"{above} \text{{ and }} {below}"
    interval = f"{'(' if open_low else '['}{low},{high}{')' if open_high else ']'}"
    assert equal(both, interval) and equal(both, rf"{below} \text{{ and }} {above}")
    assert equal(both, f"{above}, {below}")
    assert not equal(both, rf"{above} \text{{ or }} {below}")
    assert not equal(interval, rf"{above} \text{{ or }} {below}")
    outside = rf"x<{low} \text{{ or }} x>{high}"
    assert equal(outside, rf"(-\infty,{low})\cup({high},\infty)")
    assert not equal(outside, outside.replace("or", "and"))


# -- words and signs
RAISED = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
LOWERED = str.maketrans("0123456789", "₀₁₂₃₄₅₆₇₈₉")


@steady
@given(st.integers(2, 30), st.integers(-20, 60).filter(lambda k: k not in (0, 1)))
def test_raised_and_lowered_signs(base, exponent):
    power = f"{base}{str(exponent).translate(RAISED)}"
    for response in (rf"\boxed{{{power}}}", f"Answer: {power}", f"so it is {power}"):
        assert reward.score(response, f"{base}^{{{exponent}}}") == 1.0, response
        assert reward.score(response, str(base)) == 0.0
        assert reward.score(response, f"{base}{abs(exponent)}") == 0.0
    digits = "".join(random.Random(base).choices("01", k=6))
    for response in (rf"\boxed{{1{digits}₂}}", f"**Answer:** 1{digits}₂"):
        assert reward.score(response, f"1{digits}_2") == 1.0
        assert reward.score(response, f"1{digits}2") == 0.0
    indexed = f"x{str(base).translate(LOWERED)}+1"
    assert reward.score(f"Answer: {indexed}", f"x_{{{base}}}+1") == 1.0
    assert reward.score(f"Answer: {indexed}", f"{base}x+1") == 0.0
    for minus in "-−‑–":
        assert reward.score(f"Answer: {minus}{base}", f"-{base}") == 1.0
        assert reward.score(f"Answer: {minus}{base}", f"{base}") == 0.0


CHANGES = {
    "tenths": 1 / 10,
    "halves": 1 / 2,
    "thirds": 1 / 3,
    "dozen": 12,
    "hundred": 100,
    "million": 10**6,
}


@steady
@given(st.integers(2, 99))
def test_words_that_change_a_value(n):
    for word, factor in CHANGES.items():
        text = rf"{n} \text{{ {word}}}"
        assert not equal(text, str(n)), text
        assert equal(text, f"{n}*{factor:.12f}" if factor < 1 else str(n * factor)), text
    assert equal(rf"{n}\text{{ squared}}", str(n * n))
    assert not equal(rf"{n}\text{{ factorial}}", str(n)) or n == 2
    assert equal(rf"{n} \text{{ apples}}", str(n))
    assert not equal(rf"\text{{not }} {n}", str(n))
    assert not equal(rf"{n}, {n + 1}, {n + 2}, \ldots", f"{n}, {n + 1}, {n + 2}")


@steady
@given(st.integers(2, 99), st.integers(100, 199))
def test_a_number_that_is_hedged_is_no_answer(n, other):
    for response in (
        f"The answer is not {n}.",
        f"The answer isn't {n}.",
        f"The answer is either {other} or {n}.",
        f"Answer: between {other} and {n}",
        f"Answer: {other} or {n}, I am not sure",
        rf"Answer: {n} \oplus {other}",
        rf"Answer: {other} \oplus {n}",
        f"Final answer: at least {n}",
        f"The answer is more than {n}.",
        rf"\boxed{{\text{{The answer is not {n}}}}}",
        rf"\boxed{{{other} = {n}}}",
    ):
        assert reward.score(response, str(n)) == 0.0, response
    assert reward.score(f"Answer: {n}, since {n - 1} + 1 = {n}", str(n)) == 1.0
    assert reward.score(f"The answer is {n}. It is not {other}.", str(n)) == 1.0


# -- values
@steady
@given(st.integers(2, 30), st.integers(2, 30))
def test_a_question_is_not_its_own_answer(a, b):
    questions = {
        f"{a}+{b}": a + b,
        f"{{{a}}}{b}": a * b,
        f"({a})({b})": a * b,
        rf"{a}\frac{{{b}}}{{1}}": a * b,
        rf"{a} \cdot {b}": a * b,
        f"{a * b}/{b}/1": a,
        rf"\sum_{{k=1}}^{{{a}}} k": a * (a + 1) // 2,
        rf"\binom{{{a}}}{{2}}": a * (a - 1) // 2,
        rf"\log_2 {2**a}": a,
        rf"\sqrt{{{a * a}}}": a,
        f"{a}^2": a * a,
        rf"|-{a}|": a,
        rf"\lfloor {a}.5 \rfloor": a,
        f"1{a % 8}_8": 8 + a % 8,
        rf"{a}\cos 0": a,
    }
    for question, value in questions.items():
        assert reward.is_equivalent(question, str(value)), question
        assert not reward.is_equivalent(question, str(value), require_value=True), question
        for spelling in (f"{question} = {value}", rf"x = {value}", rf"\frac{{{2 * value}}}{{2}}"):
            assert reward.is_equivalent(spelling, str(value), require_value=True), spelling
    assert reward.is_equivalent(f"2^{{{a + 40}}}", str(2 ** (a + 40)), require_value=True)
    assert reward.is_equivalent(f"5{a % 8}_8", f"5{a % 8}_8", require_value=True)


# -- frequent spellings of right answers, each beside a near miss
RIGHT = [
    (r"\begin{aligned} x &= 3 \\ y &= -1 \end{aligned}", "x=3, y=-1", "x=-1, y=3"),
    (r"\left\{\begin{array}{l} x=3, \\ y=-1.\end{array}\right.", "x=3, y=-1", "x=3, y=1"),
    (r"\text{(a) } 12, \text{ (b) } 5", "12, 5", "12, 6"),
    (r"(1)\ 12 \quad (2)\ 5", "12, 5", "12, 10"),
    (r"12\,\mathrm{kg\cdot m/s}", "12", r"12\ \mathrm{N}\cdot 2"),
    (r"25^\circ\text{C}", "25", r"25^\circ\text{F} + 1"),
    (r"5\ \mathrm{N}", r"5\text{ newtons}", r"5\text{ J}"),
    ("⅜", "3/8", "3/7"),
    (r"x=\frac\pi4+k\pi,\quad k \in \mathbb{Z}", r"\frac{\pi}{4}+k\pi", r"\frac{\pi}{4}+2k\pi"),
    (r"25 \text{ (attained at } x=5)", "25", "5"),
    ("|AB|=5", "5", "AB"),
    (r"\frac{AB}{BC}=2", "2", "1/2"),
    (r"{10 \choose 3}", "120", "30"),
    (r"(1010)_2", "1010_2", "1010"),
    (r"1010_{\text{two}}", "10", "1010"),
    (r"3{:}45", "3:45", "3:46"),
    (r"3 \text{ to } 4", "3:4", "4:3"),
    (r"\text{all real numbers except } 2", r"\mathbb{R}\setminus\{2\}", r"\mathbb{R}"),
    (r"\textcolor{red}{5}", "5", "6"),
    (r"\mathbf{i}-2\mathbf{j}", r"\begin{pmatrix}1\\-2\end{pmatrix}", r"(-2,1)"),
    ("1{.}234{.}567", "1234567", "1.234567"),
    (r"\text{14 March}", r"\text{March 14}", r"\text{March 4}"),
    (r"\text{Infinitely many solutions}", r"\text{infinitely many}", r"\text{no solution}"),
    ("x^2_1", "x_1^2", "x^2"),
    (r"\operatorname{cis} 75^\circ", r"\cos 75^\circ+i\sin 75^\circ", r"\cos 75^\circ"),
]


@pytest.mark.parametrize("answer, right, wrong", RIGHT)
def test_frequent_spellings(answer, right, wrong):
    assert reward.score(rf"so \boxed{{{answer}}}.", right) == 1.0
    assert equal(answer, right) and not equal(answer, wrong)


RESPONSES = [  # (response, right, wrong)
    (r"(a) \boxed{12}; (b) \boxed{5}", "12, 5", "5"),
    ("(a) \\boxed{12}\n\n(b) \\boxed{5}", "12, 5", "12"),
    ("\\boxed{\\text{Heat is released}}\n\n**Answer: D**", "D", "A"),
    (r"roots \boxed{1}, \boxed{1} and \boxed{2}", "1, 1, 2", "1, 2"),
]


@pytest.mark.parametrize("response, right, wrong", RESPONSES)
def test_responses_in_parts(response, right, wrong):
    assert reward.score(response, right) == 1.0 and reward.score(response, wrong) == 0.0


def test_a_small_letter_is_a_choice_where_the_problem_offers_choices():
    problem = "Which is prime? (A) 4 (B) 6 (C) 7"
    assert reward.grade("Answer: c", "C", problem=problem).correct is True
    assert reward.grade(r"\boxed{c}", "(C)", problem=problem).correct is True
    assert reward.grade("Answer: b", "C", problem=problem).correct is False
    assert reward.grade("Answer: c", "C", problem="Find the constant.").correct is False
    assert reward.grade("Answer: c", "7", problem=problem).correct is False


def test_references_that_no_response_can_earn():
    references = ["5", r"\frac12", "(1, 2]", "The answer is 3 or so", "x=1, x=1", ""]
    with reward.Verifier(workers=1) as verifier:
        consistent = verifier.self_consistent(references)
    assert consistent == [reward.score(rf"\boxed{{{it}}}", it) > 0 for it in references]
    assert consistent[:3] == [True] * 3 and not consistent[-1]


def test_a_reference_whose_grading_died_is_not_dropped(monkeypatch):
    """A clock must not decide which problems a run has, least of all on a resume."""
    groups = []
    for correct, failed in ((True, ""), (False, ""), (False, "time")):
        groups.append(reward.Group(["5"], [correct], [0.0], [0], [failed]))
    monkeypatch.setattr(reward.Verifier, "grade_groups", lambda *_: groups)
    assert reward.Verifier(workers=1).self_consistent(["5"] * 3) == [True, False, True]
