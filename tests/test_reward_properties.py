"""What must hold for every answer. Guards against: equality that depends on order or spelling;
rewriting that changes a verdict; a changed digit that goes unseen; classes that depend on the order
of the answers; a parser that raises."""

import random
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import reward

steady = settings(derandomize=True, max_examples=120, deadline=None, database=None)

integers = st.integers(-9_999, 9_999)
numerals = st.one_of(
    integers.map(str),
    st.tuples(integers, st.integers(1, 999)).map(lambda pair: rf"\frac{{{pair[0]}}}{{{pair[1]}}}"),
    st.tuples(integers, st.integers(1, 99_999)).map(lambda pair: f"{pair[0]}.{pair[1]:05d}"),
    st.integers(2, 99).map(lambda n: rf"{n}\sqrt{{{n + 1}}}"),
    st.integers(1, 99).map(lambda n: rf"\frac{{{n}\pi}}{{7}}"),
)
atoms = st.sampled_from(["x", "y", "a", "2", "3", "5", r"\pi", r"\theta"])
expressions = st.recursive(
    atoms,
    lambda inner: st.one_of(
        st.tuples(inner, inner).map(lambda p: f"({p[0]}+{p[1]})"),
        st.tuples(inner, inner).map(lambda p: f"({p[0]}-{p[1]})"),
        st.tuples(inner, inner).map(lambda p: f"({p[0]}) \\cdot ({p[1]})"),
        st.tuples(inner, inner).map(lambda p: f"\\frac{{{p[0]}}}{{{p[1]}+7}}"),
        inner.map(lambda p: f"\\sqrt{{{p}}}"),
        inner.map(lambda p: f"\\sin({p})"),
        inner.map(lambda p: f"({p})^{{2}}"),
    ),
    max_leaves=6,
)
answers = st.one_of(
    numerals,
    expressions,
    st.lists(numerals, min_size=2, max_size=4).map(lambda items: "(" + ", ".join(items) + ")"),
    st.lists(numerals, min_size=2, max_size=4).map(lambda items: r"\{" + ", ".join(items) + r"\}"),
    st.tuples(integers, st.integers(1, 50)).map(lambda p: f"[{p[0]}, {p[0] + p[1]})"),
    st.tuples(atoms, numerals).map(lambda p: f"{p[1]} < x"),
    st.sampled_from(["yes", r"\text{east}", "(B)", "no solution", "Monday", r"\emptyset"]),
)
RESPELLED = {
    "spaces around operators": lambda a: (
        a.replace("+", " + ").replace("-", " - ").replace("<", "  <  ").replace(",", " , ")
    ),
    "spaces inside brackets": lambda a: re.sub(
        r"(?<!\\)([({\[])|(?<!\\)([)}\]])", lambda m: f"{m[1] or ''} {m[2] or ''}", a
    ),
    "redundant braces": lambda a: (
        "{" + a + "}" if "," not in a and "<" not in a and "[" not in a else a
    ),
    "left and right": lambda a: (
        a.replace("(", r"\left(").replace(")", r"\right)").replace("[", r"\left[")
    ),
    "dfrac": lambda a: a.replace(r"\frac", r"\dfrac"),
    "tfrac": lambda a: a.replace(r"\frac", r"\tfrac"),
    "dollars": lambda a: f"${a}$",
    "display": lambda a: rf"\[ {a} \]",
    "boxed": lambda a: rf"\boxed{{{a}}}",
    "final period": lambda a: a + ".",
    "thin spaces": lambda a: a.replace("+", r"\,+\;").replace(",", r",\ "),
    "surrounding space": lambda a: f"  {a}\n",
}


@steady
@given(answers)
def test_equality_is_reflexive(answer):
    for thousands in ("", " "):
        assert reward.is_equivalent(answer, answer + thousands)
    assert reward.score(rf"thus $\boxed{{{answer}}}$.", answer) == 1.0


@steady
@given(answers, answers)
def test_equality_is_symmetric(left, right):
    assert reward.is_equivalent(left, right) == reward.is_equivalent(right, left)


@pytest.mark.parametrize("how", RESPELLED)
@settings(steady, max_examples=40)
@given(data=st.data())
def test_respelling_never_changes_a_verdict(how, data):
    answer, other = data.draw(answers), data.draw(answers)
    respelled = RESPELLED[how](answer)
    assert reward.is_equivalent(respelled, answer), respelled
    assert reward.is_equivalent(respelled, other) == reward.is_equivalent(answer, other), (
        respelled,
        other,
    )


@steady
@given(integers, st.integers(1, 999_999), st.integers(1, 6))
def test_zeros_after_a_decimal_digit(whole, decimals, zeros):
    answer = f"{whole}.{decimals}"
    assert reward.is_equivalent(answer, answer + "0" * zeros)
    assert reward.is_equivalent(answer + "0" * zeros, answer)


@steady
@given(st.integers(10**2, 10**40), st.data())
def test_a_changed_digit_always_counts(value, data):
    digits = str(value)
    place = data.draw(st.integers(0, len(digits) - 1))
    changed = (
        digits[:place]
        + str((int(digits[place]) + data.draw(st.integers(1, 9))) % 10)
        + digits[place + 1 :]
    )
    for template in (
        "{}",
        r"\frac{{{}}}{{7}}",
        "-{}",
        r"{}\sqrt{{2}}",
        "x+{}",
        "(1,{})",
        r"{}\text{{ cm}}",
        "x={}",
        "{}^2",
        "{}x",
    ):
        assert not reward.is_equivalent(template.format(digits), template.format(changed)), template


@steady
@given(st.integers(1, 10**6), st.integers(1, 99_999), st.sampled_from([1, -1]))
def test_a_decimal_off_by_a_ten_thousandth_counts(whole, decimals, sign):
    value = whole + decimals / 10**5
    near = value * (1 + sign * 1.0001e-4)
    assert not reward.is_equivalent(f"{value:.5f}", f"{near:.9f}")
    assert reward.is_equivalent(f"{value:.5f}", f"{value * (1 + sign * 1e-9):.12f}")


POLYNOMIAL = st.lists(st.integers(-9, 9), min_size=2, max_size=4)


def spell(coefficients, variable="x"):
    return "+".join(f"({c}){variable}^{n}" for n, c in enumerate(coefficients))


@steady
@given(POLYNOMIAL, POLYNOMIAL, st.randoms(use_true_random=False))
def test_expanded_factored_and_reordered_are_equal(p, q, shuffle):
    product = [
        sum(p[i] * q[n - i] for i in range(len(p)) if 0 <= n - i < len(q))
        for n in range(len(p) + len(q) - 1)
    ]
    factored = f"({spell(p)})({spell(q)})"
    assert reward.is_equivalent(factored, spell(product))
    monomials = spell(product).split("+")
    shuffle.shuffle(monomials)
    assert reward.is_equivalent("+".join(monomials), factored)
    product[shuffle.randrange(len(product))] += shuffle.choice([-1, 1])
    assert not reward.is_equivalent(factored, spell(product))


IDENTITIES = [  # the third is a near miss
    ("(x+1)^5", "x^5+5x^4+10x^3+10x^2+5x+1", "x^5+5x^4+10x^3+10x^2+5x+2"),
    ("(a+b+c)^2", "a^2+b^2+c^2+2ab+2bc+2ca", "a^2+b^2+c^2"),
    ("x^6-1", "(x-1)(x+1)(x^2+x+1)(x^2-x+1)", "(x-1)(x+1)(x^2+x+1)^2"),
    (r"\frac{x^3-8}{x-2}", "x^2+2x+4", "x^2+4"),
    (r"\frac1x-\frac1{x+1}", r"\frac{1}{x(x+1)}", r"\frac{1}{x(x-1)}"),
    (r"\frac{1}{\sqrt{x+1}-\sqrt x}", r"\sqrt{x+1}+\sqrt{x}", r"\sqrt{x+1}-\sqrt{x}"),
    (r"\sin 3x", r"3\sin x-4\sin^3 x", r"3\sin x-3\sin^3 x"),
    (r"\sin a\cos b", r"\frac{\sin(a+b)+\sin(a-b)}{2}", r"\frac{\sin(a+b)-\sin(a-b)}{2}"),
    (r"\tan^2 x+1", r"\sec^2 x", r"\csc^2 x"),
    (r"\cos\frac{\pi}{5}", r"\frac{1+\sqrt5}{4}", r"\frac{\sqrt5}{4}"),
    (r"\sqrt{3+2\sqrt2}", r"1+\sqrt2", r"1+\sqrt3"),
    (r"8^{x/3}", "2^x", "2^{x/3}"),
    (r"\ln(a^2b)-\ln b", r"2\ln a", r"\ln a"),
    (r"e^{2\ln x+1}", "ex^2", "2ex"),
    (r"\binom{n}{3}", r"\frac{n(n-1)(n-2)}{6}", r"\frac{n^3}{6}"),
]


@pytest.mark.parametrize("one, other, near", IDENTITIES)
def test_identities_are_decided_without_rewriting(one, other, near):
    """Expanded, factored, over a common denominator, trigonometric, of powers and logarithms:
    values show them all."""
    assert reward.is_equivalent(one, other) and reward.is_equivalent(other, one)
    assert not reward.is_equivalent(one, near) and not reward.is_equivalent(near, other)


@settings(steady, max_examples=60)
@given(
    st.lists(
        st.one_of(
            st.none(), numerals, st.sampled_from(["1/2", "0.5", "x+1", "1+x", "x=3", "3", "yes"])
        ),
        max_size=7,
    ),
    st.randoms(use_true_random=False),
)
def test_classes_do_not_depend_on_order(answers, shuffle):
    def partition(items, labels):
        return {
            frozenset(i for i, label in zip(items, labels) if label == wanted)
            for wanted in set(labels) - {-1}
        }

    places = list(range(len(answers)))
    first = partition(places, reward.answer_classes(answers))
    shuffle.shuffle(places)
    labels = reward.answer_classes([answers[place] for place in places])
    assert partition(places, labels) == first
    assert [label for label in dict.fromkeys(labels) if label >= 0] == list(
        range(len(first))
    )  # by first appearance


@settings(steady, max_examples=300)
@given(
    st.one_of(
        st.text(max_size=60),
        st.text(alphabet="0123456789xyfei+-*/^_(){}[]|\\,.;=<>!%&$ ~'", max_size=60),
        st.lists(
            st.sampled_from(
                [
                    "\\frac",
                    "\\sqrt",
                    "{",
                    "}",
                    "(",
                    ")",
                    "1",
                    "x",
                    "^",
                    "_",
                    ",",
                    "\\pm",
                    "\\left",
                    "\\cup",
                    "\\sum_{k=1}^{3}",
                    "\\begin{matrix}",
                    "&",
                    "\\\\",
                    "\\end{matrix}",
                    "and",
                    "%",
                    "!",
                    "|",
                    "\\log",
                    "sin",
                    "\\{",
                    "\\}",
                    "=",
                    "<",
                    "cm",
                    "\\circ",
                    "1/2",
                    "$",
                    "[",
                    "]",
                ]
            ),
            max_size=25,
        ).map(" ".join),
    )
)
def test_any_text_is_parsed_or_left_as_text(text):
    reward.parse(text)
    reward.explain(text, "1")
    reward.score(f"\\boxed{{{text}}}", text[::-1])


def test_random_pairs_of_different_numbers_are_never_equal():
    noise = random.Random(0)
    spell = [
        str,
        lambda n: f"{n}.0",
        lambda n: rf"\frac{{{2 * n}}}{{2}}",
        lambda n: f"\\${n}",
        lambda n: f"x={n}",
        lambda n: f"{n:,}",
    ]
    for _ in range(3_000):
        a, b = noise.randrange(-(10**6), 10**6), noise.randrange(-(10**6), 10**6)
        if a != b:
            assert not reward.is_equivalent(noise.choice(spell)(a), noise.choice(spell)(b)), (a, b)
