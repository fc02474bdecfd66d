"""Random answers against the checker, outside the suite: token soup, and mutations of ordinary
answers.

    python tests/fuzz_reward.py --minutes 10 --seed 0    # cases, the slowest, and any exception

Guards against: an exception other than the parser's own, a hang, and an answer that is not equal to
itself.
"""

import argparse
import random
import sys
import time
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import reward

TOKENS = str.split(r"""
0 1 2 7 10 99 3.14 .5 1e5 1,000 x y a n e i \pi \theta x_1 f(x) f( ( ) [ ] { } \{ \} | + - * / ^ _
! % : = < > , ; . & \le \ge \ne \in \pm \mp \cdot \times \div \\ $ $$ \( \) \[ \] \frac \dfrac12
\sqrt \sqrt[3] \binom \log \log_2 \ln \sin \sin^2 \tan \arcsin \exp \lfloor \rfloor \lceil \rceil
\left \right \cup \setminus \mathbb{R} \emptyset \infty \circ ^\circ \sum_{k=1}^{3} \prod_{k=1}^{
\overline{3} \text{ \text{cm} cm dollars million and or yes (A) \begin{ \begin{pmatrix}
\end{pmatrix} \boxed{ \boxed{7} Answer: answer final is the <answer> </answer> #### ** <think>
</think> \n\n ′ ½ ² π √ ∞ ≤ − １ \ud800 \x00 \pmod{ \pmod{7} (mod \mod \equiv ≡ \mid \mathbb{Z}
1:2:3 :30 pm am p.m. \begin{cases} \end{cases} \begin{aligned} \end{aligned} \begin{array}{l} if k
\text{or} \text{and} \text{dozen} tenths squared factorial half \text{not} \ldots ... … ¹² ₂ ⁻ ‑ ⅜
\mathrm{N} ^\circ\text{C} \text{base } (a) (b) \angle \choose \operatorname{sgn} cis \text{is}
\mathbf{i} \color{red} {:} 1{.}234 to except""")
ORDINARY = r"""
1/2;\frac{1}{2};3\frac12;-1,234.5;0.1\overline{6};x^2+2x+1;(x+1)^2;\sin^2 x+\cos^2 x;\sqrt[3]{-8};
\sqrt{x^2};|x-1|;\$5;$0.50;\{1,2,3\};(1,2];(-\infty,1)\cup(2,\infty);x\le 3;1<x\le 2;
x=1 \text{ or } x=2;\frac{1\pm\sqrt2}{2};52_8;33.5\%;\begin{pmatrix}1&2\\3&4\end{pmatrix};
5\text{ cm}^2;50 cents;\binom{2n}{n};n!/(n-1)!;\log_2 8;\lfloor n/2\rfloor;\sum_{k=1}^{10} k^2;
f(x)=x^2;y=2x+1;2\pi r;e^{i\theta};90^\circ;\text{Yes};(C) 15;P(X=2)=\frac14;x\ne 1;2 million;
n\equiv 1\pmod 4;x \equiv 1, 3 \pmod{8};\{3k \mid k\in\mathbb{Z}\};1:2:3;a:b:c=3:4:6;4:20 PM;16:20;
\frac{\pi}{4}+k\pi, k \in \mathbb{Z};\angle A=30^\circ, \angle B=60^\circ;A(1,2), B(3,4);
5\text{ dozen};x>2 \text{ and } x<5;\begin{cases}x=3\\y=-1\end{cases};
\begin{cases}x&x>0\\0&x<0\end{cases};10¹²;\lceil (n-1)/2\rceil;\ln|x-5|;e^{100}+1;\tanh 50;1,1,2;
(a) 12, (b) 5;12\,\mathrm{kg\cdot m/s};\mathbb{R}\setminus\{1\};1.5 \times 10^3;\frac{x^2-1}{x-1};
\ln|x|+C
""".replace("\n", "").split(";")
WRAPS = (
    "{}",
    r"so \boxed{{{}}}.",
    "Answer: {}",
    "the answer is **{}**",
    "#### {}",
    "${}$",
    "<answer>{}</answer>",
)
ESCAPES = {r"\n": "\n", r"\ud800": "\ud800", r"\x00": "\0"}


def soup(noise: random.Random) -> str:
    count = noise.randint(1, noise.choice((5, 15, 60)))
    text = noise.choice(("", " ")).join(noise.choice(TOKENS) for _ in range(count))
    for escape, character in ESCAPES.items():
        text = text.replace(escape, character)
    return text


def mutated(noise: random.Random, text: str = "") -> str:
    text = text or noise.choice(ORDINARY)
    for _ in range(noise.randint(1, 6)):
        start, end = sorted((noise.randint(0, len(text)), noise.randint(0, len(text))))
        others = (noise.choice(TOKENS), noise.choice(ORDINARY), chr(noise.randrange(0x3000)))
        piece = noise.choice((text[start:end], *others))
        inserted = text[:start] + piece + text[start:]
        replaced = text[:start] + piece + text[end:]
        deleted = text[:start] + text[start + 1 :]
        text = noise.choice((inserted, replaced, deleted))
    return text[:4_000]


def run(left: str, right: str, noise: random.Random) -> None:
    reward.extract_answer(left)
    response = noise.choice(WRAPS).format(left)
    reward.explain(response, right, require_value=noise.random() < 0.3)
    verdicts = (reward.is_equivalent(left, right), reward.is_equivalent(right, left))
    assert all(type(verdict) is bool for verdict in verdicts)
    if not any(":" in text or "\uff1a" in text for text in (left, right)):  # times look at one side
        assert verdicts[0] == verdicts[1], f"not symmetric: {verdicts}"
    assert reward.is_equivalent(left, left) or not left.strip(), "not equal to itself"
    reward.answer_classes([left, right, None, left])


def main() -> int:
    parser = argparse.ArgumentParser(description="Fuzz the answer checker.")
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    noise = random.Random(args.seed)
    failures: dict[str, tuple] = {}
    cases = 0
    slowest = (0.0, "")
    end = time.monotonic() + 60 * args.minutes
    while time.monotonic() < end:
        left = noise.choice((soup, mutated, mutated))(noise)
        right = noise.choice((soup, mutated, mutated))(noise)
        if noise.random() < 0.3:
            right = mutated(noise, left)
        start = time.process_time()
        try:
            run(left, right, noise)
        except Exception as error:
            place = traceback.extract_tb(error.__traceback__)[-1]
            kind = f"{type(error).__name__} {error} at {place.name}:{place.lineno}"
            failures.setdefault(kind, (left, right))
        cases += 1
        slowest = max(slowest, (time.process_time() - start, ascii((left, right))))
    print(f"{cases} cases, slowest {slowest[0]:.3f} s: {slowest[1][:600]}")
    for failure, pair in failures.items():
        print(f"{failure}: {pair!a}")
    return bool(failures)


if __name__ == "__main__":
    sys.exit(main())
