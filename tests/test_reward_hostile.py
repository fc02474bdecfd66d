"""What a model may write against the checker. Guards against: a hang or explosion in parsing,
evaluation or sympy; code run from an answer; an exception that stops a training run; memory that
grows; a verdict "right" for nonsense; a pool that is unusable afterwards."""

import itertools
import os
import resource
import time

import pytest

import reward

OPEN, CLOSE = "{", "}"


def tower(base: str, height: int) -> str:
    return f"{base}^{{" * height + base + "}" * height


def nested(left: str, right: str, depth: int, core: str = "1") -> str:
    return left * depth + core + right * depth


MARKER = f"/tmp/reward-hostile-marker-{os.getpid()}"  # its own: the suite runs in several processes
TOUCH = f"open('{MARKER}','w').close()"
SYSTEM = f"__import__('os').system('touch {MARKER}')"

NUMBERS = [
    *(tower("9", height) for height in (2, 3, 5, 30, 60, 1000)),
    "10^{10^{10}}",
    "10^10^10^10",
    "2^{1000000000}",
    "(-2)^{10^9}",
    "0.5^{10^{12}}",
    "2^{10^{9}/7}",
    "(1/3)^{10^{8}}",
    "99999999!",
    "9!!!!!!!!!!",
    "(((9!)!)!)!",
    "3000!^{3000!}",
    "3000!" * 60,
    "170!^{170}",
    "(10^9)!",
    "0!" * 200,
    r"\binom{10^9}{5\cdot10^8}",
    r"\binom{30000}{15000}",
    r"\binom{2^{100}}{2^{99}}",
    "1e999999999",
    "1e-999999999",
    "1e99999",
    "9" * 1_000,
    "9" * 1_999,
    "9" * 1_000_000,
    "0." + "3" * 1_000_000,
    "1" + ",000" * 300_000,
    "1/" * 400 + "1",
    "9" * 1_900 + "!",
    "2^{" + "9" * 500 + "}",
    "0^0",
    "0^{-1}",
    "1/0",
    r"\frac{0}{0}",
    r"\frac{1}{0}",
    r"0\cdot\infty",
    r"\infty-\infty",
    r"\infty/\infty",
    r"\infty^{\infty}",
    r"\log 0",
    r"\log(-1)^{1000000}",
    r"\tan(\pi/2)",
    r"\gcd(9^{9^9}, 6)",
    r"\sqrt[0]{5}",
    r"\sqrt[10^9]{5}",
    r"\sqrt{" + "7" * 1_500 + "}",
    r"\sqrt[99]{" + "7" * 1_500 + "}",
    "e^{e^{e^{e^{10}}}}",
    r"e^{1000000000\ln 2}",
    r"\exp(\exp(\exp(\exp(9))))",
    r"2^{10^9\log_2 3}",
    r"i^{i^{i^{i}}}",
    r"\sin(10^{9000})",
    r"\cos(9^{4000})",
    r"\sin(10^{10^{10}})",
    r"\lfloor \pi\cdot 10^{9000} \rfloor",
    r"\lfloor e^{e^{20}}\rfloor",
    r"\sum_{k=1}^{1000000000} k",
    r"\sum_{k=1}^{4000} k^{4000}",
    r"\prod_{k=1}^{4000} k^{k}",
    r"\sum_{a=1}^{99}" * 6 + "a",
    r"\prod_{k=1}^{999}\prod_{k=1}^{999} 2",
    r"\sum_{k=1}^{3000} \sqrt{k}",
    r"\sum_{n=1}^{\infty} 1/n",
    r"\sum_{k=1}^{2000} 3000!",
    r"\sum_{k=1}^{900}\sin k^{k}",
    "(1+10^{-4000})^{9}",
    "1.0000001^{10^{9}}",
    "2^{1/1000000007}",
    "\\pi\u1a868\u1a86_8",
    r"e \ge 1000!, e",
    r"x \ge 3000!",
    r"x + y = 3000!/7",
    r"\sum_{k=0}^{4999} 2^k",
    r"\sum_{k=1}^{60}\sin(k)x^k",
]
STRUCTURE = [
    *(
        nested(left, right, depth)
        for depth in (30, 1_000, 10_000)
        for left, right in (
            ("(", ")"),
            ("{", "}"),
            (r"\{", r"\}"),
            ("[", "]"),
            (r"\frac{1}{", "}"),
            (r"\sqrt{", "}"),
            ("|", "|"),
            ("-", ""),
            ("x^{", "}"),
            (r"\left(", r"\right)"),
            (r"\boxed{", "}"),
            (r"\text{", "}"),
            ("f(", ")"),
            (r"\sin(", ")"),
            (r"\begin{pmatrix}", r"\end{pmatrix}"),
        )
    ),
    "{" * 5_000,
    "}" * 5_000,
    "(" * 1_900,
    r"\boxed{" * 10_000,
    r"\boxed{1" * 1_000,
    "$" * 50_000,
    r"\(" * 50_000,
    r"\[" * 50_000,
    r"\frac" * 300,
    "^" * 500,
    "_" * 500,
    "!" * 1_900,
    "-" * 1_900,
    "+-" * 900,
    r"\pm" * 400,
    r"\pm1" * 300,
    "x" * 1_900,
    "1,2," * 400,
    "(1,2)," * 300,
    r"\cup[0,1]" * 200,
    "x=" * 300 + "1",
    "x<" * 300 + "1",
    r"\begin{pmatrix}" + "1&" * 300,
    "'" * 1_900,
    "|" * 1_901,
    r"\{" + "1," * 900 + "1" + r"\}",
    "and " * 400,
    "# " * 900,
    "%" * 1_900,
    r"\\" * 900,
    "x_" * 400 + "1",
    *(
        "x_{",
        "m_{1",
        r"\begin{pmatrix}x_{",
        r"\sum_{",
        r"\sum_{k=",
        r"\frac{",
        r"\sqrt[",
        r"\log_{",
        "2_{",
        r"\text{",
        "|x",
        "5^",
        r"\begin{matrix}1&",
    ),
    r"\sqrt[" * 200,
    "1 " * 900,
    "<think>" * 10_000 + "7",
    "</think>" * 10_000,
    "<answer>" * 20_000,
    "</answer>" * 20_000,
    "#### " * 20_000,
    "**" * 40_000,
    "answer " * 15_000,
    "Answer: " * 12_000,
    "answer is " * 10_000,
    "is A " * 20_000,
    "a" * 5_000_000,
    "\\" * 100_001,
    "$5 " * 30_000,
    "1" * 2_000_000,
    "-1" * 50_000,
    "1," * 50_000,
    " " * 1_000_000,
    "\n" * 1_000_000,
    "\\text{" * 20_000,
    r"\boxed{1}, " * 10_000,
    r"\boxed{\boxed{" * 5_000 + "}" * 10_000,
    r"\boxed{" + "{" * 90_000,
    "final answer is " * 6_000,
    "{" * 50_000 + "}" * 50_000,
    "3" * 100_000 + "...",
    "(1,2)(3,4)",
    r"\{1,2\}(3,4)",
    r"2\begin{pmatrix}1\\2\end{pmatrix}" * 30,
    *(
        unit * (200_000 // len(unit))
        for unit in (
            "33...",
            "1,000,",
            r"3\!",
            "1e5",
            "0.3\\overline{",
            "\n \t",
            "**a**",
            "answer is",
            r"\frac{1}{2",
            r"\pmod{",
            "a.m.",
            "] U [",
            r"\text{a}",
            "$ 1",
            r"\mathbb{",
            "^ { ",
            "is a ",
            "<|a|>",
            "1.1.",
        )
    ),
]
ALGEBRA = [
    "(x+y+z+w)^{1000}",
    "(x+1)^{10000}-(x+2)^{10000}",
    "((x+1)^{100}+1)^{100}",
    "(a+b+c+d+e)^{50}(f+g+h)^{50}",
    "x^{x^{x^{x^{x}}}}",
    r"\sqrt{" * 25 + "x+y" + "}" * 25,
    r"\sqrt{2+" * 30 + "x" + "}" * 30,
    r"\sin(" * 25 + "x" + ")" * 25,
    r"\frac{1}{x+" * 25 + "1" + "}" * 25,
    "+".join(rf"\sqrt{{{n}}}" for n in range(2, 120)),
    r"\cdot".join(rf"(x+{n})" for n in range(150)),
    "+".join(f"x^{{{n}}}" for n in range(150)),
    r"\sin^{100}x\cos^{100}x\tan^{100}x",
    r"|" + "+".join(rf"\sin({n}x)" for n in range(80)) + "|",
    "(2n)!/(n!)^{2000}",
    "x!" * 60,
    "((x!)!)!",
    r"\binom{n}{k}" * 40,
    "e^{" * 20 + "x" + "}" * 20,
    r"\log(" * 20 + "x" + ")" * 20,
    r"\frac{x^{200000}-1}{x-1}",
    "x^{10^{9}}-x^{10^{9}+1}",
    "=".join(f"x^{n}" for n in range(80)),
    r"\left(\frac{x+1}{x-1}\right)^{9999}",
    "x^{" + "9" * 900 + "}",
    "1." + "1" * 900 + "x",
    "f(" * 30 + "x" + ")" * 30,
    r"\{" + ",".join(rf"\sqrt{{{n}}}+x" for n in range(110)) + r"\}",
    ",".join(rf"\sin({n}x)^{{{n}}}" for n in range(60)),
    r"\lfloor x^{x^x} \rfloor",
    r"\begin{pmatrix}"
    + r"\\".join("&".join(f"x^{{{i + j}}}" for i in range(8)) for j in range(8))
    + r"\end{pmatrix}",
]
INJECTION = [
    SYSTEM,
    TOUCH,
    f"eval({TOUCH!r})",
    f"exec({TOUCH!r})",
    f"sympify({SYSTEM!r})",
    f"lambda: {SYSTEM}",
    f"[{SYSTEM} for x in [1]]",
    f"{{{SYSTEM}}}",
    f"x.__class__.__bases__[0].__subclasses__(); {TOUCH}",
    f"f'{{{SYSTEM}}}'",
    f"(lambda x: {SYSTEM})(1)",
    "__import__('sys').exit()",
    f"1 if {SYSTEM} else 1",
    f"Integer({SYSTEM})",
    f"\\input{{|touch {MARKER}}}",
    f"\\write18{{touch {MARKER}}}",
    f"`touch {MARKER}`",
    f"$(touch {MARKER})",
    f"; touch {MARKER}",
    "os.kill(os.getppid(), 9)",
    "import os\nos.abort()",
    "raise SystemExit",
    "quit()",
    "globals()",
    "S(\"__import__('os').abort()\")",
    "x.subs({x: y})",
    "\\def\\a{\\a\\a}\\a",
    "{{7*7}}",
    "%s%s%s%n",
    "../../etc/passwd",
    "\\csname end\\endcsname",
]
CHARACTERS = [
    "\ud800",
    "7\udfff1",
    "\x00",
    "7\x00",
    "\x07\x08\x1b[2J",
    "7\x7f",
    "\u202e7",
    "\ufdfa" * 900,
    "\u0300" * 900,
    "𝟕𝟖",
    "٧",
    "Ⅶ",
    "七",
    "😀" * 500,
    "\r\n" * 5_000,
    "\u2028" * 900,
    "\ufffd",
    "\uffff",
    "\U0010ffff",
    "e\u0301" * 500,
    "\u200d" * 900,
    "½" * 900,
    "²" * 900,
    "∞" * 400,
    "\\\x00",
    "\N{BRAHMI NUMBER ONE}",
    "1\u06602",
    "١٢",
    "ℵ",
    "\x85",
    "\x1c",
    "7\x1d8",
    "７７",
    "¹²³",
    "⅞",
    "㊆",
    "\t" * 5_000,
    "ǅ" * 500,
    "ß" * 500,
]


def balanced(depth: int, leaf: str = "1") -> str:
    return (
        leaf
        if depth == 0
        else rf"\{{{balanced(depth - 1, leaf)},{balanced(depth - 1, leaf + '+0')}\}}"
    )


COLLECTIONS = [
    *(balanced(depth, "7") for depth in (3, 4, 5, 6, 7)),
    *(",".join(f"{n}" for n in range(count)) for count in (60, 120, 240)),
    *(",".join(rf"\sqrt{{{n}}}" for n in range(2, count)) for count in (50, 64, 90)),
    *(",".join(f"x={n}" for n in range(count)) for count in (30, 60, 120)),
    ",".join(f"({n},{n + 1})" for n in range(31)),
    " or ".join(f"x<{n}" for n in range(31)),
    r"\cup".join(f"({n},{n + 1})" for n in range(31)),
    ",".join(rf"\pm \sin({n}x)" for n in range(30)),
]
CASES = {
    "collections": COLLECTIONS,
    "numbers": NUMBERS,
    "structure": STRUCTURE,
    "algebra": ALGEBRA,
    "injection": INJECTION,
    "characters": CHARACTERS,
}
REFERENCES = (
    "42",
    "x+42",
    "(41,42)",
)  # a number, an expression, a tuple: none of the cases equals any of them


@pytest.fixture(autouse=True)
def marker():
    if os.path.exists(MARKER):
        os.remove(MARKER)
    yield
    executed = os.path.exists(MARKER)
    if executed:
        os.remove(MARKER)
    assert not executed, "an answer was executed"


def test_there_are_enough_cases():
    assert sum(map(len, CASES.values())) >= 100


@pytest.mark.parametrize("kind", CASES)
def test_no_hostile_answer_is_right_hangs_or_raises(kind):
    slow = []
    for case in CASES[kind]:
        for response in (
            f"so the answer is \\boxed{{{case}}}",
            case,
            f"Answer: {case}",
            f"${case}$",
        ):
            for reference in REFERENCES if len(case) < 20_000 else REFERENCES[:1]:
                start = time.process_time()
                assert reward.score(response, reference) == 0.0, f"{response[:80]!r} {reference}"
                if (taken := time.process_time() - start) > 0.5:
                    slow.append((round(taken, 2), ascii(response[:80]), reference))
    assert not slow


@pytest.mark.parametrize("kind", CASES)
def test_hostile_references_and_classes(kind):
    """A hostile reference, hostile pairs and a whole group of hostile answers are bounded too."""
    cases = [case[:3_000] for case in CASES[kind]]
    for left, right in itertools.pairwise(cases):
        start = time.process_time()
        reward.is_equivalent(left, right)
        assert time.process_time() - start < 1.0, ascii((left[:80], right[:80]))
    start = time.process_time()
    classes = reward.answer_classes(cases[:40])
    assert time.process_time() - start < 20 and len(classes) == len(cases[:40])


def test_pool_survives_and_memory_stays_flat():
    """All cases through one pool, then 10,000 ordinary answers: all judged right, the parent no
    larger."""
    cases = [case for kind in CASES.values() for case in kind]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with reward.Verifier(workers=2) as verifier:
        groups = [
            [f"\\boxed{{{case}}}" for case in cases[i : i + 8]] for i in range(0, len(cases), 8)
        ]
        for group in verifier.grade_groups(groups, ["42"] * len(groups)):
            assert not any(group.correct)
        assert not verifier.failures
        responses = [
            [f"so \\boxed{{\\frac{{{2 * n}}}{{{2 * k + 2}}}}}" for k in range(10)]
            for n in range(1_000)
        ]
        graded = verifier.grade_groups(responses, [f"{n}/3" for n in range(1_000)])
        correct = [group.correct for group in graded]
        assert all(row[2] for row in correct) and sum(map(sum, correct)) == 1_000 + 9
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    assert grown < 100, f"the parent grew by {grown:.0f} MB"


@pytest.mark.parametrize("case", COLLECTIONS)
def test_a_collection_in_another_order_is_bounded(case):
    items = case.split(",")
    start = time.process_time()
    reward.is_equivalent(",".join(items), ",".join(items[::-1]))
    reward.is_equivalent(case, case.replace("1", "1.0"))
    assert time.process_time() - start < 1.0
