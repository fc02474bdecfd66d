"""The checker on ordinary input. Guards against: an answer found in the wrong place; right answers
in another spelling judged wrong and near misses judged right; a question handed back as its own
answer; classes that split equal answers; malformed problems that pass silently; verdicts that
differ between thread, worker and main process; a worker that hangs, dies, exhausts memory or
outlives its parent."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from concurrent.futures import CancelledError
from pathlib import Path

import pytest

import reward

EQUAL = [
    ("\\\\frac{1}{2}", "1/2"),
    ("$-2 \\\\le x \\\\le 7$", "[-2,7]"),
    ("2 million", "2,000,000"),
    ("\\$3 \\text{ thousand}", "3000"),
    ("18 years old", "18"),
    ("5", "5.0"),
    ("1/2", "0.5"),
    (r"\frac12", r"\frac{1}{2}"),
    ("1,000", "1000"),
    ("1{,}000", "1000"),
    (r"1\,000\,000", "1000000"),
    ("-1,234.5", "-1234.5"),
    ("1.234.567", "1234567"),
    ("1.234,5", "1234.5"),
    ("1 234 567", "1234567"),
    (".5", "1/2"),
    (r"3\frac{1}{2}", "7/2"),
    ("3 1/2", "3.5"),
    (r"-2\frac12", "-5/2"),
    ("2.5e3", "2500"),
    ("2.5E-3", "0.0025"),
    (r"1.5 \times 10^3", "1500"),
    ("1.5 x 10^3", "1500"),
    ("10^{-2}", "0.01"),
    (r"0.\overline{3}", "1/3"),
    (r"0.1\overline{6}", "1/6"),
    ("101_2", "5"),
    ("52_8", "42"),
    ("3.33333333", "10/3"),
    ("+7", "7"),
    ("--7", "7"),
    ("7.", "7"),
    ("007", "7"),
    ("2^{10}", "1024"),
    ("2^10", "1024"),
    ("2**10", "1024"),
    ("5!", "120"),
    (r"\sqrt{16}", "4"),
    (r"\sqrt[3]{-8}", "-2"),
    (r"\sqrt{12}", r"2\sqrt3"),
    ("sqrt(12)", "2sqrt(3)"),
    ("√12", "2√3"),
    (r"\frac{1}{\sqrt2}", r"\frac{\sqrt2}{2}"),
    (r"\frac{1}{1+\sqrt2}", r"\sqrt2-1"),
    ("|{-5}|", "5"),
    ("|-5|", "5"),
    (r"\lfloor 3.7 \rfloor", "3"),
    (r"\lceil 3.2 \rceil", "4"),
    (r"\binom{5}{2}", "10"),
    (r"\log_2 8", "3"),
    (r"\log_{2}{8}", "3"),
    ("log_2(8)", "3"),
    ("log2(8)", "3"),
    (r"\ln e", "1"),
    (r"\lg 100", "2"),
    (r"e^{\ln 5}", "5"),
    (r"\sin \frac{\pi}{6}", "1/2"),
    (r"\sin 30^\circ", "1/2"),
    (r"\cos(\pi/3)", "0.5"),
    (r"\tan 45°", "1"),
    (r"\pi", "3.14159265358979"),
    (r"\sum_{k=1}^{10} k", "55"),
    (r"\sum_{i=0}^{3} 2^i", "15"),
    (r"\prod_{k=1}^5 k", "120"),
    (r"\frac{\frac12}{3}", "1/6"),
    (r"2\cdot3", "6"),
    (r"2 \times 3", "6"),
    (r"6 \div 2", "3"),
    ("2(3)", "6"),
    ("(2)(3)", "6"),
    ("3 - -2", "5"),
    ("2^{-1}", "1/2"),
    ("4^{1/2}", "2"),
    ("8^{2/3}", "4"),
    (r"\frac{16}{3}", r"5\frac13"),
    (r"\dfrac{-3}{4}", r"-\frac34"),
    (r"\frac{3}{-4}", "-3/4"),
    (r"-\frac{1}{2}", r"\frac{-1}{2}"),
    ("½", "0.5"),
    ("3½", "3.5"),
    ("10^{20}", "100000000000000000000"),
    ("1:2", "2:4"),
    (r"\text{twelve}", r"\text{twelve}"),
    ("three", "3"),
    ("2/4", "1/2"),
    ("１２", "12"),
    ("−5", "-5"),
    ("5²", "25"),
    ("2³", "8"),
    (r"\sqrt[3]{27}", "3"),
    (r"\sqrt[4]{16}", "2"),
    ("(-2)^3", "-8"),
    ("-2^2", "-4"),
    ("i^2", "-1"),
    ("(1+i)^2", "2i"),
    (r"e^{i\pi}", "-1"),
    (r"\sqrt{-4}", "2i"),
    ("3+4i", "4i+3"),
    (r"\frac{10}{4}", "2.5"),
    ("1e6", "1000000"),
    ("0.50", "0.5"),
    ("100.00", "100"),
    ("50%", "50"),
    (r"50\%", "0.5"),
    (r"50\%", "1/2"),
    ("33.5 percent", r"33.5\%"),
    (r"\$5", "5"),
    (r"\$1,250.50", "1250.5"),
    ("$5$", "5"),
    ("5 dollars", r"\$5"),
    (r"5\text{ cm}", "5"),
    ("5 cm", "5cm"),
    (r"5\ \text{cm}^2", "5"),
    (r"5 \mathrm{~cm}", "5"),
    ("64 square feet", "64 ft^2"),
    ("10 inches", "10 in"),
    ("10 miles per hour", "10"),
    ("42 apples", "42"),
    (r"5 \text{ m/s}", "5"),
    (r"3\text{ hours}", "3"),
    (r"90^\circ", "90"),
    (r"90^{\circ}", "90 degrees"),
    (r"45^\circ", r"\frac{\pi}{4}"),
    ("30°", "30"),
    ("€5", "5"),
    (r"12 \text{ and a half}", r"12 \text{ and a half}"),
    (r"5 \text{ ways}", "5"),
    (r"25 \text{ units}", "25"),
    (r"7 \text{ days}", "7"),
    ("x=5", "5"),
    ("x = 5", "x=5.0"),
    ("x_1 = 3", "3"),
    ("f(x)=x^2", "x^2"),
    ("f(x)=x^2", "y=x^2"),
    ("y=2x+1", "2x+1"),
    ("y=2x+1", "2x-y+1=0"),
    ("2+3=5", "5"),
    ("a=b=3", "3"),
    (r"\angle ABC = 40^\circ", "40"),
    (r"\text{Area} = 12", "12"),
    ("Area = 12", "12"),
    (r"x \approx 3.14", "3.14"),
    (r"x=\frac13 \approx 0.333", "1/3"),
    (r"\frac13 \approx 0.333", "1/3"),
    ("x^2+y^2=4", "2x^2+2y^2=8"),
    (r"\frac{x^2}{4}+\frac{y^2}{9}=1", "9x^2+4y^2=36"),
    ("x-y=0", "x=y"),
    ("(x-1)^2+(y-2)^2=9", "x^2-2x+y^2-4y-4=0"),
    ("P(x)=x+1", "x+1"),
    ("f^{-1}(x)=x-1", "x-1"),
    (r"x\in\{1,2\}", r"\{1,2\}"),
    (r"x \in [0,1]", "[0,1]"),
    (r"m = \frac{3}{4}", "3/4"),
    ("(x,y)=(1,2)", "(1,2)"),
    ("x=1, y=2", "x=1,y=2"),
    ("x=1,y=2", "y=2, x=1"),
    ("x=1, y=2", "(1,2)"),
    (r"x = 3 \text{ or } x = 5", "3,5"),
    ("1,2,3", "3, 2, 1"),
    ("1, 2 and 3", "1,2,3"),
    (r"1 \text{ and } 2", "2,1"),
    ("1 or 2", "2 or 1"),
    (r"\{1,2\}", r"\{2,1\}"),
    (r"\{1,2,2\}", r"\{1,2\}"),
    ("{1,2}", r"\{1,2\}"),
    (r"\pm 3", "3,-3"),
    (r"\pm3", r"\{-3,3\}"),
    (r"1\pm\sqrt2", r"1+\sqrt2, 1-\sqrt2"),
    (r"x=\pm 2", "2,-2"),
    (r"\{3\}", "3"),
    ("1;2", "1,2"),
    (r"x=1 \text{ or } x=2", r"\{1,2\}"),
    ("1,2", r"\{1,2\}"),
    ("(1,2)", "( 1 , 2 )"),
    ("(1,2)", "1,2"),
    ("(1,2),(3,4)", "(3,4),(1,2)"),
    (r"\left(\frac12,3\right)", "(0.5,3)"),
    (r"\langle 1,2,3\rangle", "(1,2,3)"),
    ("[1,2,3]", "(1,2,3)"),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", "(1,2)"),
    (r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", r"\begin{bmatrix}1&2\\3&4\end{bmatrix}"),
    ("[[1,2],[3,4]]", r"\begin{pmatrix}1&2\\3&4\end{pmatrix}"),
    (r"\emptyset", r"\{\}"),
    (r"\varnothing", "∅"),
    ("1,000, 2,000", "1000,2000"),
    ("100,200", "100, 200"),
    ("x<3", "3>x"),
    (r"x \le 3", r"x\leq3"),
    ("x<3", r"(-\infty,3)"),
    (r"x\geq 2", r"[2,\infty)"),
    ("1<x<2", "(1,2)"),
    (r"1 < x \le 2", "(1,2]"),
    ("2>x>1", "(1,2)"),
    ("2x<6", "x<3"),
    ("-x>-3", "x<3"),
    (r"x<1 \text{ or } x>2", r"(-\infty,1)\cup(2,\infty)"),
    (r"(-\infty,1)\cup(2,\infty)", r"(2,\infty) \cup (-\infty, 1)"),
    ("(-∞,1)U(2,∞)", r"(-\infty,1)\cup(2,\infty)"),
    (r"x \ne 1", r"(-\infty,1)\cup(1,\infty)"),
    (r"\mathbb{R}\setminus\{1\}", r"x\neq 1"),
    (r"\mathbb{R}", r"(-\infty,\infty)"),
    (r"\{x | x>0\}", r"(0,\infty)"),
    (r"\{x \mid 0<x<1\}", "(0,1)"),
    (r"\{x: x \ge 1\}", r"[1,\infty)"),
    (r"[0,1]\cup\{3\}", r"\{3\}\cup[0,1]"),
    ("all real numbers", r"\mathbb{R}"),
    (r"(-\infty,-2)\cup(-2,2)\cup(2,\infty)", r"\mathbb R \setminus \{-2,2\}"),
    ("x^2+2x+1", "(x+1)^2"),
    ("2x", "x*2"),
    ("xy", "yx"),
    ("x(x+1)", "x^2+x"),
    (r"\frac{x^2-1}{x-1}", "x+1"),
    (r"\sin^2 x+\cos^2 x", "1"),
    (r"\tan x", r"\frac{\sin x}{\cos x}"),
    (r"2\sin x\cos x", r"\sin 2x"),
    (r"\ln(x^2)", r"2\ln x"),
    ("e^{x+y}", "e^xe^y"),
    (r"\sqrt{x^2y}", r"x\sqrt y"),
    ("x^{-1}", "1/x"),
    (r"\frac1{x}", "x^{-1}"),
    ("a^2-b^2", "(a-b)(a+b)"),
    (r"\frac{a}{b}+\frac{c}{d}", r"\frac{ad+bc}{bd}"),
    ("n(n+1)/2", r"\frac{n^2+n}{2}"),
    (r"2\pi r", r"2 r \pi"),
    (r"\theta", "θ"),
    (r"\sin^{-1} x", r"\arcsin x"),
    (r"\log_2 x", r"\frac{\ln x}{\ln 2}"),
    ("|x-1|", "|1-x|"),
    ("x^2 + C", "C + x^2"),
    (r"\frac{1}{2}x", "x/2"),
    ("0.5x", "x/2"),
    ("3^{n+1}", r"3\cdot 3^n"),
    ("2^{2n}", "4^n"),
    (r"\cos 2x", r"1-2\sin^2x"),
    (r"\sec x", r"1/\cos x"),
    ("f(x)+g(x)", "g(x)+f(x)"),
    ("x_1+x_2", "x_2+x_1"),
    ("(n+1)!", "(n+1) n!"),
    (r"\binom{n}{2}", "n(n-1)/2"),
    ("x^2y", "yx^2"),
    (r"\alpha\beta", r"\beta\alpha"),
    ("ab^2", "b^2a"),
    (r"x\cdot y", "xy"),
    ("-(a-b)", "b-a"),
    (r"\frac{-x}{y}", r"-\frac{x}{y}"),
    ("e^{-x}", "1/e^x"),
    (r"\exp(2x)", "e^{2x}"),
    (r"\ln|x|+C", r"C+\ln|x|"),
    ("2^{x}", "2^x"),
    ("x^{1/2}", r"\sqrt{x}"),
    (r"x^\frac12", r"\sqrt{x}"),
    (r"\sqrt{2}x", r"x\sqrt2"),
    ("sin(x)^2", r"\sin^2(x)"),
    ("5pi/6", r"\frac{5\pi}{6}"),
    ("2^{3^2}", "512"),
    (r"\frac{dy}{dx}", r"\frac{dy}{dx}"),
    ("(A)", "A"),
    (r"\text{(C)}", "C"),
    (r"\textbf{(B)}", "B"),
    ("B", "(B) 12 apples"),
    ("C. 5", "C"),
    (r"\text{Yes}", "yes"),
    ("Monday", "monday"),
    (r"\text{even}", "even"),
    (r"\mathrm{E}", "E"),
    (r"\text{no solution}", "No solution"),
    ("12:00", "12:00"),
    (r"\boxed{5}", "5"),
    ("D", r"\textbf{(D)}\ 42"),
    (r"\{HHH, HHT\}", r"\{HHT,HHH\}"),
    (r"\text{red, blue}", r"\text{blue, red}"),
    (r"x=2\text{ cm}", "2"),
    (r"\overline{AB}", r"\overline{AB}"),
    (r"\begin{cases} x=1 \\ y=2\end{cases}", r"\begin{cases}x=1\\y=2\end{cases}"),
    (r"\frac{270}7\text{ degrees}", r"\frac{270}{7}"),
    (r"\text{June 20}", "June 20"),
    (r"\operatorname{arctan} x", r"\arctan x"),
    (r"\mathrm{e}^{x}", "e^x"),
    (r"P(X=2)=\frac14", "1/4"),
    (r"P(A|B)=\frac13", "1/3"),
    (r"\cos A = \frac12", "1/2"),
    (r"\tan\theta = \frac34", "3/4"),
    (r"\textbf{(C) } 15", "C"),
    (r"\textbf{(C) } 15", "15"),
    ("(C) 15", "15"),
    ("x=-1,2", "-1,2"),
    (r"x = 2 \text{ and } y = 3", "(2,3)"),
    (r"\{(1,2),(3,4)\}", r"(1,2) \text{ and } (3,4)"),
    (r"A = \{1,2\}", r"\{2,1\}"),
    (r"\lfloor \frac{n}{2}\rfloor", r"\left\lfloor n/2 \right\rfloor"),
    (r"\frac{(2n)!}{(n!)^2}", r"\binom{2n}{n}"),
    (r"e^{i\theta}", r"\cos\theta+i\sin\theta"),
    (r"1.23 \times 10^{5} \text{ m/s}", "123000"),
    (r"\$32,348", "32348"),
    ("a_n = 2^n", "2^n"),
    ("a_{10}=1024", "1024"),
    (r"S_{\triangle ABC} = 6", "6"),
    ("AB = 5", "5"),
    (r"12.5\%", r"\frac18"),
    (r"\frac{1}{2}\ln 3", r"\ln\sqrt3"),
    (r"2\sqrt[3]{2}", r"\sqrt[3]{16}"),
    (r"\left(3,\frac{\pi}{2}\right)", r"(3,\pi/2)"),
    ("3R^2", "3 R^{2}"),
    (r"\dfrac{x+2}{7}", r"\frac{2+x}{7}"),
    (r"0.\bar{3}", "1/3"),
    (r"y = -\frac12 x + 3", "x+2y=6"),
    (r"\mathbf{v}=\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix}1\\2\end{pmatrix}"),
    (r"\begin{bmatrix}1\\2\end{bmatrix}", r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}"),
    (r"-\infty < x < 3", r"(-\infty,3)"),
    (r"x \in (-\infty, 3)", "x<3"),
    (r"\left[-2,7\right]", r"-2\le x\le 7"),
    (r"\sqrt{5}+2", r"2+\sqrt{5}"),
    (r"\frac{1}{3}\pi", r"\frac{\pi}{3}"),
    (r"4\pi \text{ cm}^2", r"4\pi"),
    (r"\approx 3.14", "3.14"),
    ("~5", "5"),
    ("x^2-5x+6=0", "(x-2)(x-3)=0"),
    (r"120 \text{ square centimeters}", "120 cm^2"),
    (r"5\,000", "5000"),
    (r"3.0 \times 10^8", "300000000"),
    ("2 x", r"x \cdot 2"),
    ("10^{6}", "1,000,000"),
    (r"\{1,3,5,\ldots\}", r"\{1,3,5,\ldots\}"),
    (r"\text{Friday}", "Friday"),
    ("True", "true"),
    (r"\frac{\sqrt{3}-1}{2}", r"-\frac{1}{2}+\frac{\sqrt{3}}{2}"),
    ("(x+2)(x-3)", "x^2 - x - 6"),
    ("|x|<2", "|x| < 2"),
    (r"\frac{2}{3}\sqrt{6}", r"\frac{2\sqrt6}{3}"),
    (r"\sqrt{\frac{1}{2}}", r"\frac{\sqrt{2}}{2}"),
    ("n=2k+1", "2k+1"),
    (r"\frac{7}{2}", r"3\tfrac{1}{2}"),
    ("y^2=4x", "4x=y^2"),
    (r"{\frac{1}{2}}", "1/2"),
    ("{5}", "5"),
    (r"\!5", "5"),
    (r"5\;", "5"),
    (r"\boldsymbol{5}", "5"),
    (r"\mathbf{5}", "5"),
    (r"\color{red}5", r"\color{red}5"),
    ("7,3", "3,7"),
    (r"\frac{1}{2},\frac{1}{3}", "1/3,1/2"),
    (r"x\ge0", r"x\in[0,\infty)"),
    ("f(x)=2x+1", "f(x) = 1+2x"),
    (r"\ln 2", r"\log 2"),
    (r"\arcsin\frac12", r"\pi/6"),
    (r"\cot x", r"\cos x/\sin x"),
    ("(-1)^n", "(-1)^{n}"),
    ("3^{-2}", r"\frac19"),
    ("6!", "720"),
    (r"\frac{8!}{2!}", "20160"),
    ("1+2+3", "6"),
    ("0", "0.0"),
    ("-0", "0"),
    (r"2^{\frac{1}{2}}", r"\sqrt2"),
    (r"30\%", "0.3"),
    (r"5\text{ km/h}", "5 km/h"),
    (r"3,\!000", "3000"),
    (r"\text{A and B}", r"\text{B and A}"),
    (r"18\text{ years old}", "18"),
    (r"1/2 \text{ of the pie}", "0.5"),
    (r"6\mathrm{~cm}", r"6\text{ cm}"),
    (r"15^{\circ}", "15"),
    (r"\angle A=15^\circ", r"15^\circ"),
    (r"x=15^\circ", "15"),
    ("2:3", r"\frac23"),
    (r"\frac{x}{y}", "x/y"),
    ("[0,1]", r"0\le x\le 1"),
    ("50 cents", r"\$0.50"),
    (r"\sqrt{x^2}", "|x|"),
    (r"x^{1/2} \cdot x^{1/2}", "x"),
    (r"e^{\ln x}", "x"),
    (r"\frac{1\pm\sqrt5}{2}", r"\frac{1+\sqrt5}{2}, \frac{1-\sqrt5}{2}"),
    (r"(\pm 1, 2)", "(1,2),(-1,2)"),
    (r"\{\frac{1\pm\sqrt5}{2}, 3\}", r"3, \frac{1+\sqrt5}{2}, \frac{1-\sqrt5}{2}"),
    ("log(8, 2)", "3"),
    ("option B", "B"),
    (r"\begin{pmatrix}0.333333333\\1\end{pmatrix}", r"\begin{pmatrix}1/3\\1\end{pmatrix}"),
    (r"\frac12\begin{pmatrix}2\\4\end{pmatrix}", r"\begin{pmatrix}1\\2\end{pmatrix}"),
    ("0.333...", "1/3"),
    (r"0.1666\ldots", "1/6"),
    ("25 cm", r"0.25\text{ m}"),
    ("2.5 hours", "150 minutes"),
    ("A(1,2)", "(1,2)"),
    ("60 mph", "60 miles per hour"),
    (r"\emptyset", "no solution"),
    ("10:45 a.m.", "10:45 AM"),
    ("x <> 5", "x != 5"),
    (r"\text{The vertex is } (-1, 4)", "(-1,4)"),
    (r"\pm(\sqrt2,\sqrt2)", r"(\sqrt2,\sqrt2), (-\sqrt2,-\sqrt2)"),
    (r"385 \pmod{1000}", "385"),
    (r"2\ 1/3", "7/3"),
    ("binomial(n,2)", "n(n-1)/2"),
    (r"\text{a parabola}", "parabola"),
]
DIFFERENT = [
    ("x=5965999999999999980", "x=5965999999999999988"),
    ("x+y=5965999999999999980", "x+y=5965999999999999988"),
    ("2 thousand", "2"),
    ("5 less than x", "5"),
    ("x^", "x"),
    ("5 \\text{ if } x>0", "5"),
    ("at least 5", "5"),
    ("5 or more", "5"),
    ("5", "6"),
    ("0.33", "1/3"),
    ("2.23", "2.232"),
    ("3.14", r"\pi"),
    ("1/2", "1/3"),
    ("5", "-5"),
    ("x", "X"),
    ("x", "y"),
    ("12", "(1,2)"),
    ("12", "1,2"),
    ("(1,2)", "(2,1)"),
    ("(1,2)", r"\{1,2\}"),
    (r"\{1,2\}", r"\{1,2,3\}"),
    ("1", "1,2"),
    ("x<1", r"x\le1"),
    ("(0,1)", "[0,1]"),
    ("[0,1)", "(0,1]"),
    ("x<1", "x>1"),
    ("x=5", "y=5"),
    (r"5\text{ cm}", r"5\text{ m}"),
    ("e^x", "e^x+C"),
    (r"\pm 3", "3"),
    ("5%", "0.5"),
    (r"5\%", r"500\%"),
    ("a^2+b=0", "0"),
    ("x=1,y=2", "x=2,y=1"),
    ("10^{20}", "10^{20}+1"),
    (r"\sqrt2", "1.414"),
    (r"\sqrt{2}+10^{-50}", r"\sqrt2"),
    ("x+10^{-40}", "x"),
    (r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", r"\begin{pmatrix}1&3\\2&4\end{pmatrix}"),
    ("A", "B"),
    ("(A)", "(B)"),
    ("yes", "no"),
    ("", "5"),
    ("5+", "5"),
    ("5 5", "5"),
    ("foo(5", "5"),
    (r"\frac{5}", "5"),
    ("x+5", "5"),
    ("5x", "5"),
    ("5 or 6", "5"),
    ("5, 6, 7", "6"),
    ("2^{100000}", "2^{100001}"),
    ("1.5", "15"),
    ("1,5", "15"),
    ("1,23", "123"),
    ("1,2345", "12345"),
    ("52_8", "528"),
    ("-2^2", "4"),
    ("2^{x}", "2x"),
    (r"\sin x", r"\cos x"),
    (r"\sin^2 x", r"\sin x^2"),
    (r"\log x", r"\log_2 x"),
    ("x!", "x"),
    (r"\frac12", r"\frac21"),
    ("1/0", "1/0+1"),
    ("0/0", "1"),
    (r"\infty", "1000000"),
    (r"\infty", r"-\infty"),
    ("5i", "5"),
    ("3+4i", "3-4i"),
    ("B", "(C) B"),
    (r"(-\infty,1)\cup(2,\infty)", r"(-\infty,1)"),
    ("x^2=4", "x=2"),
    ("x=y", "y=2x"),
    ("2x+3", "2x+3=0"),
    ("f(x)", "f(y)"),
    ("f(x)=x", "f(x)=2x"),
    ("n!", "n"),
    ("1000000", "1000001"),
    ("1e6", "1000001"),
    ("1/3", "0.3333"),
    ("12345678", "12345679"),
    ("0.1234", "0.12345"),
    (r"\text{east}", r"\text{west}"),
    ("AB", "BC"),
    ("5:00", "5:01"),
    (r"\{1\}", "2"),
    ("(1,2,3)", "(1,2)"),
    (r"\sqrt{-4}", "2"),
    (r"\sqrt[3]{8}", "3"),
    (r"x=\pm2", "2"),
    ("42 and 43", "42"),
    ("either 42 or 43", "42"),
    (r"7 \text{ or } 8", "8"),
    ("|x|", "x"),
    ("3<x<5", "3<x<=5"),
    (r"x \ne 1", "x=1"),
    (r"\emptyset", "0"),
    (r"\{0\}", r"\emptyset"),
    ("20%", "20 cm + 1"),
    ("1:2", "1:3"),
    ("10:30", "10:31"),
    ("(C) 15", "D"),
    ("(C) 15", "16"),
    ("(A)(B)", "B"),
    ("x(x+1)=6", "6"),
    ("a+b=5", "5"),
    ("x^2-5x+6", "(x-2)(x-3)=0"),
    (r"\frac{1}{3}\pi", r"\frac{1}{3}"),
    (r"-\infty<x<3", r"(-\infty,3]"),
    ("120 cm^2", "120 cm^3"),
    ("5 km", "5 mi"),
    (r"\sqrt{5}+2", r"\sqrt{5}-2"),
    (r"\ln 2", r"\ln 3"),
    ("f(x)=2x", "f(x)=3x"),
    ("3,7", "3"),
    ("37", "3,7"),
    (r"\text{Friday}", "Monday"),
    ("True", "False"),
    ("(-1)^n", "1"),
    (r"x\ge0", "x>0"),
    ("y=x", "y=-x"),
    ("2:3", "3:2"),
    ("A", "a"),
    (r"\cos A=\frac12", r"\frac13"),
    ("10^6", "10^7"),
    ("x_1", "x_2"),
    ("a_n", "a_m"),
    (r"\{1,3,5,\ldots\}", r"\{1,3,5\}"),
    (r"\sqrt{x^2}", "x"),
    (r"\sqrt{(x-1)^2}", "x-1"),
    ("5 cents", r"\$5"),
    ("x<3", "y<3"),
    ("ix<0", "x<0"),
    ("25 cm", "0.25"),
    ("60 mph", "60 km/h"),
    ("0.333...", "0.333"),
    ("1=x", "1=1"),
    (r"\frac{1\pm\sqrt5}{2}", r"\frac{1+\sqrt5}{2}"),
]


@pytest.mark.parametrize("left, right", EQUAL)
def test_equal(left, right):
    assert reward.is_equivalent(left, right) and reward.is_equivalent(right, left)


@pytest.mark.parametrize("left, right", DIFFERENT)
def test_different(left, right):
    assert not reward.is_equivalent(left, right) and not reward.is_equivalent(right, left)


EXTRACTION = [  # (response, answer, rule)
    (r"so $x = \boxed{\frac{1}{2}}$.", r"\frac{1}{2}", "box"),
    (r"\boxed{1}, no: \boxed{\text{a {b} c}}", r"\text{a {b} c}", "box"),
    (r"\boxed{2} and \boxed{3}", "2, 3", "box"),
    (r"\boxed{2}. Therefore \boxed{3}", "3", "box"),
    (r"\boxed{5}, \boxed{5}", "5", "box"),
    (r"\boxed 7", "7", "box"),
    (r"\fbox{7} and \boxed{8", "7", "box"),
    (r"\boxed{\boxed{9}}", r"\boxed{9}", "box"),
    (r"\boxed{ \boxed{9}", "9", "box"),
    (r"\boxed{\{1\}}", r"\{1\}", "box"),
    (r"\boxed{}", None, "none"),
    (r"\boxed{The answer is $(9+1)$}", "$(9+1)$", "box"),
    (r"<think>\boxed{1}</think> so \boxed{2}", "2", "box"),
    (r"<think>\boxed{1}</think> so 2", "2", "number"),
    (r"<think>\boxed{1}", None, "none"),
    ("<answer> 12 </answer>", "12", "tag"),
    ("</answer> nothing here", None, "none"),
    ("Answer: 41 was a wrong guess.\nAnswer: 42", "42", "label"),
    ("**Answer:** 42 apples", "42 apples", "label"),
    (r"\text{Answer:} $\frac12$", r"$\frac12$", "label"),
    ("Final Answer: Jane started 3 hours ago. I hope it is correct.", "3", "label"),
    ("答案：42", "42", "label"),
    ("The final answer is $28\\%$. I hope it is correct.", r"$28\%$", "final"),
    ("6*7 = 42\n#### 42", "42", "hashes"),
    ("The answer is **12**.", "12", "phrase"),
    ("so the answer is 5 apples", "5 apples", "phrase"),
    ("The answer is for sure D, it can't be A or B", "D", "phrase"),
    ("The solution is (2, 3).", "(2, 3)", "phrase"),
    ("réponse est C non A", "C", "phrase"),
    ("Option (B) is correct", "B", "letter"),
    ("B不是 A", "B", "letter"),
    ("and so it is **92**, as 100 - 8", "92", "bold"),
    ("It's not A because it doesn't make sense, therefore I think it's B", "B", "letter"),
    ("so $x=2$ and $y=3$", "x=2, y=3", "formula"),
    (r"thus \(x \geq 5\) is the solution.", r"x \geq 5", "formula"),
    ("so $x$ is 7, and 7 + 7 = 14", "14", "number"),
    ("it costs $5 and then $6, so 11 in all", "11", "number"),
    ("100 - 30 = 70", "70", "number"),
    ("it fell by 5-3 = -2", "-2", "number"),
    ("1,234,567 people", "1,234,567", "number"),
    ("I do not know.", None, "none"),
    ("", None, "none"),
]


@pytest.mark.parametrize("response, answer, rule", EXTRACTION)
def test_extraction(response, answer, rule):
    assert (reward.extract_answer(response), reward.explain(response, "1").rule) == (answer, rule)


def test_every_rule_has_a_case():
    assert {rule for *_, rule in EXTRACTION} == {*reward.RULES, "none"}


@pytest.mark.parametrize(
    "reference",
    ["42", "$42$", r"\boxed{42}", "6*7\n#### 42", r"so \(x=6\), \boxed{42}.", "42.", " 42\n"],
)
def test_reference_spellings(reference):
    assert (
        reward.score(r"\boxed{42}", reference) == 1.0
        and reward.score(r"\boxed{43}", reference) == 0.0
    )


def test_what_is_not_text_is_wrong():
    assert (
        reward.score(None, "1") == 0.0
        and not reward.is_equivalent(1, 1)
        and reward.extract_answer(7) is None
    )


def test_explain():
    say = {
        response: reward.explain(response, "5").why
        for response in (r"\boxed5", r"\boxed6", "no idea", r"\boxed{5+}")
    }
    assert list(say.values())[:3] == ["right", "wrong", "no answer"] and say[
        r"\boxed{5+}"
    ].startswith("unparsed answer: ")
    assert reward.explain(r"\boxed{3+2}", "5", require_value=True).why == "not a value"
    assert reward.explain(r"\boxed{3+2}", "6", require_value=True).why == "wrong"


VALUES = [
    "5",
    "+5",
    "5.0",
    "10/2",
    r"\frac{10}{2}",
    "x=5",
    "3+2=5",
    r"0.5\times10^1",
    "(5)",
    r"\{5\}",
    "5 cm",
    "$5$",
    "500%",
]
EXPRESSIONS = [  # the first three are shorter as 5
    r"\sqrt{25}",
    r"25^{1/2}",
    "5^1",
    "3+2",
    "5=3+2",
    "7-2",
    r"1\cdot5",
    "5*1",
    "10/2/1",
    r"\frac{2+3}{1}",
    r"\frac{10}{\frac{4}{2}}",
    "1(5)",
    r"\sqrt{20+5}",
    "(3+2)",
    "x=3+2",
    r"\{3+2\}",
    "2+3 cm",
    "5+0",
    r"5\div 1/1",
]


@pytest.mark.parametrize("answer", VALUES)
def test_a_value_stays_right_where_one_is_required(answer):
    assert reward.is_equivalent(answer, "5", require_value=True)


@pytest.mark.parametrize("answer", EXPRESSIONS)
def test_an_unfinished_calculation_is_wrong_only_where_a_value_is_required(answer):
    assert reward.is_equivalent(answer, "5") and not reward.is_equivalent(
        answer, "5", require_value=True
    )


def test_a_mixed_number_is_a_value_and_other_references_ask_for_none():
    assert reward.is_equivalent(r"1\frac45", "9/5", require_value=True) and reward.is_equivalent(
        "1 4/5", "1.8", True
    )
    assert reward.is_equivalent(r"1+2\sqrt3", r"2\sqrt3+1", require_value=True)
    assert reward.is_equivalent("(x+1)^2", "x^2+2x+1", require_value=True)


def test_classes():
    assert reward.answer_classes(
        ["1/2", None, "3", "0.5", "x = 3", "yes", None, r"\frac{2}{4}"]
    ) == [
        0,
        -1,
        1,
        0,
        1,
        2,
        -1,
        0,
    ]
    assert reward.answer_classes([]) == [] and reward.answer_classes([None]) == [-1]
    # closed transitively: 50% is 50 and 0.5, which are not equal to each other
    assert reward.answer_classes(["50", "0.5", "50%"]) == [0, 0, 0] and reward.answer_classes(
        ["50", "0.5"]
    ) == [0, 1]


def test_explain_says_how_both_sides_were_read(capsys):
    for response, reference, parts in (
        (r"so \boxed{|x-5|}", "5-x", ["wrong", "box", "Abs(x - 5)", "x = "]),
        ("so $x=5$", "10/2", ["correct", "formula", "x = 5", "the same value"]),
        (r"\boxed{5+}", "5", ["wrong", "text (ends too early)"]),
        (r"\boxed{(1,2]}", r"\{1,2\}", ["wrong", "(](1, 2)", "set(1, 2)", "docs/checker.md"]),
        (r"\boxed{5\text{ cm}}", r"5\text{ m}", ["wrong", "5 cm", "5 m", "other units"]),
        ("I do not know", "5", ["wrong (no answer)", "none"]),
        ("\x1b[2J \\boxed{\ud800}", "5", ["wrong", "\\ud800"]),
    ):
        reward.main(["--explain", response, reference])
        said = capsys.readouterr().out
        assert said.isascii() and all(part in said for part in parts), said
    with pytest.raises(SystemExit):
        reward.main(["--explain", "5"])


def write(path, *lines):
    path.write_text(
        "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines),
        encoding="utf-8",
    )
    return path


def test_load_problems(tmp_path):
    path = write(
        tmp_path / "data.jsonl",
        {"problem": "1+1?", "answer": "2", "solution": "so \\boxed{2}"},
        "",
        {"problem": "empty", "answer": " "},
        {"problem": " ", "answer": "2"},
        {"problem": "number", "answer": 2.5, "require_value": True},
        {"problem": "long", "answer": "9" * 5_000},
        {"problem": "none", "answer": "1", "solution": None},
    )
    dropped = Counter()
    problems = reward.load_problems(path, dropped)
    assert [(p.row, p.answer, p.solution, p.require_value) for p in problems] == [
        (0, "2", "so \\boxed{2}", False),
        (4, "2.5", None, True),
        (6, "1", None, False),
    ]
    assert dropped == {"empty problem or answer": 2, "answer over the checker's limits": 1}


@pytest.mark.parametrize(
    "line, message",
    [
        ("{", "not JSON"),
        ("[1]", "not an object"),
        ("null", "not an object"),
        ({"problem": "x"}, '"answer" is missing'),
        ({"answer": "x"}, '"problem" is missing'),
        ({"problem": 1, "answer": "x"}, '"problem" is 1'),
        ({"problem": "x", "answer": [1]}, '"answer"'),
        ({"problem": "x", "answer": True}, '"answer"'),
        ({"problem": "x", "answer": None}, '"answer"'),
        ('{"problem": "x", "answer": NaN}', '"answer" is nan'),
        ('{"problem": "x", "answer": -Infinity}', '"answer" is -inf'),
        ("[" * 100_000, "not JSON"),
        ({"problem": "x", "answer": "1", "solution": 3}, '"solution"'),
        ({"problem": "x", "answer": "1", "require_value": "no"}, '"require_value"'),
    ],
)
def test_malformed_problems_are_refused_by_file_and_line(tmp_path, line, message):
    path = write(tmp_path / "data.jsonl", {"problem": "1+1?", "answer": "2"}, line)
    with pytest.raises(ValueError) as caught:
        reward.load_problems(path)
    assert (
        str(caught.value).startswith(f"{path}:2: ")
        and message in str(caught.value)
        and "\n" not in str(caught.value)
    )


# -- the pool
def test_groups():
    responses = [
        [
            r"\boxed{\frac12}",
            "no",
            r"\boxed{3}",
            r"\boxed{0.5}",
            r"\boxed{6/2}",
            r"\boxed{\frac12}",
        ],
        [r"\boxed{3+2}"],
        [],
    ]
    with reward.Verifier(workers=2) as verifier:
        first, second, third = verifier.grade_groups(
            responses, ["0.5", "5", "1"], require_value=[False, True, False]
        )
        assert first == reward.Group(
            answers=[r"\frac12", None, "3", "0.5", "6/2", r"\frac12"],
            correct=[True, False, False, True, False, True],
            rewards=[1.0, 0.0, 0.0, 1.0, 0.0, 1.0],
            classes=[0, -1, 1, 0, 1, 0],
            failed=[""] * 6,
        )
        assert second.correct == [False] and third.correct == [] and not verifier.failures
        (group,) = verifier.grade_groups(responses[:1], ["3"])
        assert group.correct == [False, False, True, False, True, False]
        assert group.classes == [0, -1, 1, 0, 1, 0]
        for options in ({"references": ["1"]}, {"problems": ["one"]}, {"in_thought": [True] * 4}):
            with pytest.raises(ValueError, match="must have the same length"):
                verifier.grade_groups(responses, **{"references": ["0.5", "5", "1"]} | options)


THOUGHTS = [  # (response, its answer, its answer where the prompt had opened a thought)
    (r"\boxed{5}", "5", None),
    (r"6? </think> \boxed{5}", "5", "5"),
    (r"6? </think> <think> \boxed{5}", None, None),
    (r"6? </think> <think> 7 </think> \boxed{5}", "5", "5"),
]


@pytest.mark.parametrize("response, answer, in_thought", THOUGHTS)
def test_a_thought_that_the_prompt_opened(response, answer, in_thought):
    assert reward.grade(response, "5").answer == answer
    assert reward.grade(response, "5", in_thought=True).answer == in_thought
    with reward.Verifier(workers=1) as verifier:
        groups = verifier.grade_groups([[response]] * 2, ["5"] * 2, in_thought=[False, True])
    assert [group.answers for group in groups] == [[answer], [in_thought]]
    assert [group.correct for group in groups] == [[answer == "5"], [in_thought == "5"]]


CRASH = (
    r"\boxed{33.3333333\%}",
    "1/3",
)  # raised TypeError: an equality returned sympy's BooleanTrue
DECIMALS = (
    "0.333333333",
    r"33.3333333\%",
    "1/3",
    r"50\%",
    "0.5",
    "-2.0",
    "2.5 cm",
    r"0.025\text{ m}",
)


def test_a_verdict_is_a_bool():
    for left in DECIMALS:
        for right in DECIMALS:
            assert type(reward.is_equivalent(left, right)) is bool, (left, right)
            assert type(reward.grade(left, right).correct) is bool
    assert reward.score(*CRASH) == 1.0
    with reward.Verifier(workers=1) as verifier:
        (group,) = verifier.grade_groups([CRASH[:1]], CRASH[1:])
    assert group.correct == [True] and not verifier.failures


def test_lone_surrogates_give_one_verdict_in_score_and_in_the_pool():
    pair = "\ud835\udfd5"  # as two escapes; put together they are a mathematical 7
    responses = [rf"\boxed{{{pair}}}", r"\boxed{𝟕}", r"\boxed{\udfd5}"]
    with reward.Verifier(workers=1) as verifier:
        (group,) = verifier.grade_groups([responses], ["7"])
    assert group.correct == [reward.score(response, "7") > 0 for response in responses]
    assert group.answers == [reward.extract_answer(response) for response in responses]
    assert group.correct == [False, True, False] and not verifier.failures


GRADER = """import os, sys, time
import reward
def graded(response, reference, *, problem="", require_value=False, in_thought=False):
    if "HANG" in response:
        time.sleep(60)
    if "RAISE" in response:
        raise KeyError("no\\nsuch " + response[-9:])
    if "RESULT" in response:
        return eval(response.partition("RESULT")[2])
    grade = reward.grade(response, reference)
    known = (problem, require_value, in_thought) == ("1+1?", True, True)
    return grade._replace(reward=0.25 + grade.correct if known else -3)
def positional(response, reference):
    return None, True, 1
value = 3
"""


@pytest.fixture
def grader(tmp_path):
    path = tmp_path / "grader.py"
    path.write_text(GRADER)
    return path


def test_a_users_own_grade_replaces_ours(grader):
    with reward.Verifier(workers=1, reward=f"{grader}:graded") as verifier:
        groups = verifier.grade_groups(
            [[r"\boxed{2}", r"\boxed{3}", "no"]] * 2,
            ["2", "2"],
            problems=["1+1?", "2?"],
            require_value=[True, False],
            in_thought=[True, False],
        )
    assert [group.rewards for group in groups] == [[1.25, 0.25, 0.25], [-3.0] * 3]
    for group in groups:
        assert group.answers == ["2", "3", None] and group.correct == [True, False, False]
        assert group.classes == [0, 1, -1]


RETURNED = [  # (what a grader returns, the grade; None: a fault)
    ("(None, 1, 2)", (None, True, 2.0)),
    ("('5', 0, -0.5)", ("5", False, -0.5)),
    ("reward.Grade('', True, -1e300)", ("", True, -1e300)),
    ("(5, True, 1.0)", None),
    ("('5', 'False', 1.0)", None),  # a text is true
    ("('5', 0.1, False)", None),  # swapped
    ("('5', True, '0.5')", None),
    ("sys.exit(3)", None),
    ("('5', True, float('nan'))", None),
    ("('5', True, float('inf'))", None),
    ("('5', True, None)", None),
    ("('5', True)", None),
    ("None", None),
    ("1.0", None),
]


def test_what_a_grader_returns_is_checked(grader, capfd):
    with reward.Verifier(workers=1, reward=f"{grader}:graded") as verifier:
        (group,) = verifier.grade_groups([["RESULT" + text for text, _ in RETURNED]], ["5"])
    faults = [expected is None for _, expected in RETURNED]
    assert group.failed == ["exception" if fault else "" for fault in faults]
    for found, (_, expected) in zip(zip(group.answers, group.correct, group.rewards), RETURNED):
        assert found == (expected or (None, False, 0.0))
    assert verifier.failures == {"exception": sum(faults)}
    said = capfd.readouterr().err
    assert "ValueError: grade returned (5, True, 1.0); it must be an answer" in said
    assert "SystemExit: 3" in said


def test_an_exception_is_reported_as_one_and_the_worker_lives(grader, capfd):
    with reward.Verifier(workers=1, timeout=5, reward=f"{grader}:graded") as verifier:
        responses = [
            r"\boxed{2}",
            "\x1b[2J" + "9" * 5_000 + "\nRAISE",
            "2 RAISE",
            "2 RAISE",
            "HANG",
            "2",
        ]
        (group,) = verifier.grade_groups([responses], ["2"])
        assert group.failed == ["", "exception", "exception", "exception", "time", ""]
        assert group.correct == [True, False, False, False, False, True]
        assert group.rewards == [-3.0, 0.0, 0.0, 0.0, 0.0, -3.0]
        assert verifier.failures == {"exception": 2, "time": 1}
        said = capfd.readouterr().err.splitlines()
        assert (
            len(said) == 2 and "KeyError" in said[0] and "RAISE" in said[0] and "2 RAISE" in said[1]
        )
        assert all(len(line) < 600 and line.isascii() and line.isprintable() for line in said)
        (group,) = verifier.grade_groups([["2 RAISE", *(f"{n} RAISE" for n in range(90))]], ["2"])
        assert group.failed == ["exception"] * 91
        said = capfd.readouterr().err.splitlines()
        assert len(said) == reward.MAX_WARNINGS - 2  # what was said is not repeated, and it ends


UNLOADABLE = [  # (what follows the folder, what is said)
    ("/grader.py", "a reward is written FILE.py:FUNCTION"),
    ("/grader.py:", "a reward is written FILE.py:FUNCTION"),
    ("/grader.txt:graded", "a reward is written FILE.py:FUNCTION"),
    ("/none.py:graded", "No such file"),
    ("/grader.py:missing", "missing"),
    ("/grader.py:value", "not a callable"),
    ("/grader.py:positional", "unexpected keyword argument"),
    ("/broken.py:graded", "SyntaxError"),
    ("/exits.py:graded", "SystemExit"),
    ("/dies.py:graded", "the process that loads it ended"),
]


@pytest.mark.parametrize("name, message", UNLOADABLE)
def test_a_grader_that_cannot_be_loaded_is_refused_in_one_line(grader, name, message):
    (grader.parent / "broken.py").write_text("def graded(:\n")
    (grader.parent / "exits.py").write_text("import sys\nsys.exit('never\\nmind')\n")
    (grader.parent / "dies.py").write_text("import os\nos._exit(3)\n")
    (grader.parent / "grader.txt").write_text(GRADER)
    with pytest.raises(ValueError, match=message) as caught:
        reward.Verifier(reward=f"{grader.parent}{name}")
    assert str(caught.value).startswith(f"{grader.parent}{name}") and "\n" not in str(caught.value)


def test_same_verdict_in_thread_worker_and_main_process():
    pairs = [(f"so \\boxed{{{left}}}", right) for left, right in EQUAL[::3] + DIFFERENT[::2]]
    here = [reward.score(*pair) > 0 for pair in pairs]
    there: list = [None] * 3

    def run(place):
        there[place] = [reward.score(*pair) > 0 for pair in pairs]

    threads = [threading.Thread(target=run, args=(place,)) for place in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert there == [here] * 3
    with reward.Verifier(workers=2) as verifier:
        responses = [[response] for response, _ in pairs]
        groups = verifier.grade_groups(responses, [reference for _, reference in pairs])
    assert [group.correct[0] for group in groups] == here


def test_callers_in_several_threads_get_their_own_results():
    with reward.Verifier(workers=2) as verifier:
        results = {}

        def run(n):
            responses = [[f"\\boxed{{{n}}}", f"\\boxed{{{k}}}"] for k in range(20)]
            groups = verifier.grade_groups(responses, [str(n)] * 20)
            results[n] = [group.correct for group in groups]

        threads = [threading.Thread(target=run, args=(n,)) for n in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert all(results[n] == [[True, n == k] for k in range(20)] for n in range(4))


TRAP = """import sys, os, time
sys.path.insert(0, {root!r})
import reward
honest_grade, honest_extract = reward.grade, reward.extract_answer
def trap(text):
    if "HANG" in text: time.sleep(60)
    if "SPIN" in text:
        while True: pass
    if "DIE" in text: os._exit(3)
    if "EAT" in text: return "x" * (1 << 40)
def grade(response, reference, **options):
    trap(response)
    grade = honest_grade(response, reference, **options)
    trap(grade.answer.replace("LATE", "HANG") if grade.answer else "")
    return grade
def extract_answer(response, in_thought=False):
    trap(response)
    return honest_extract(response, in_thought)
reward.grade, reward.extract_answer = grade, extract_answer
reward.main()
"""


def test_failing_workers_are_replaced_and_counted(tmp_path, monkeypatch):
    """Also: the workers run whatever stands as `grade` in the file."""
    script = tmp_path / "worker.py"
    script.write_text(TRAP.format(root=os.path.dirname(os.path.abspath(reward.__file__))))
    monkeypatch.setattr(reward, "__file__", str(script))
    responses = [r"\boxed{1}", "HANG", r"\boxed{2}", "DIE", "EAT", r"\boxed{3}"]
    with reward.Verifier(workers=1, timeout=0.7, memory_mb=512) as verifier:
        group, after = verifier.grade_groups([responses, [r"\boxed{4}"]], ["3", "4"])
        assert group.correct == [False] * 5 + [True]
        assert group.rewards == [0.0] * 5 + [1.0]
        assert group.failed == ["", "time", "", "crash", "memory", ""]
        assert group.classes == [0, -1, 1, -1, -1, 2] and after.correct == [True]
        assert verifier.failures == {"time": 1, "crash": 1, "memory": 1}
        (group,) = verifier.grade_groups([[r"\boxed{\text{LATE}}", r"\boxed{5}", "no"]], ["5"])
        assert group.failed == ["time", "", ""] and group.classes == [0, 1, -1]
        assert group.answers == [r"\text{LATE}", "5", None]  # classed by its spelling


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_workers_leave_interrupts_and_preemption_to_the_trainer():
    others = workers_of(os.getpid())  # such as the fork server of tests before this one
    with reward.Verifier(workers=1) as verifier:
        verifier.grade_groups([["5"]], ["5"])
        (worker,) = set(workers_of(os.getpid())) - {*others}
        for sent in (signal.SIGINT, signal.SIGTERM):
            os.kill(worker, sent)
            (group,) = verifier.grade_groups([["5"]], ["5"])
        assert group == (["5"], [True], [1.0], [0], [""]) and not verifier.failures
        assert worker in workers_of(os.getpid())


def alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def workers_of(pid: int) -> list[int]:
    with open(f"/proc/{pid}/task/{pid}/children") as file:
        found = [int(child) for child in file.read().split()]
    for task in os.listdir(f"/proc/{pid}/task"):
        with open(f"/proc/{pid}/task/{task}/children") as file:
            found += [int(child) for child in file.read().split()]
    return sorted(set(found))


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
@pytest.mark.parametrize("end", ["kill", "exit", "interrupt"])
def test_no_worker_outlives_its_parent(tmp_path, end):
    """Idle and spinning workers both; the parent killed, gone without close(), or interrupted."""
    script = tmp_path / "worker.py"
    root = os.path.dirname(os.path.abspath(reward.__file__))
    script.write_text(TRAP.format(root=root))
    code = f"""import sys, threading, time; sys.path.insert(0, {root!r}); import reward
reward.__file__ = {str(script)!r}
pool = reward.Verifier(workers=2, timeout=30)
pool.grade_groups([["1"], ["2"]], ["1", "2"])
threading.Thread(target=lambda: pool.grade_groups([["SPIN"]], ["1"]), daemon=True).start()
time.sleep(0.3); print("ready", flush=True)
{"sys.exit()" if end == "exit" else "time.sleep(60)"}"""
    # a shell's & ignores the interrupt
    code = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n" + code
    parent = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    pids = []
    deadline = time.monotonic() + 30
    while end == "exit" and len(pids) < 2 and time.monotonic() < deadline and parent.poll() is None:
        pids = workers_of(parent.pid)
        time.sleep(0.02)
    assert parent.stdout.readline() == b"ready\n"
    if end != "exit":
        pids = workers_of(parent.pid)
        parent.send_signal(signal.SIGKILL if end == "kill" else signal.SIGINT)
    parent.wait(30)
    parent.stdout.close()
    assert len(pids) == 2
    while any(map(alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(alive, pids))


def test_pool_works_under_spawn(tmp_path):
    script = tmp_path / "spawned.py"
    root = os.path.dirname(os.path.abspath(reward.__file__))
    script.write_text(f"""import sys; sys.path.insert(0, {root!r})
import multiprocessing, reward
def rank(n):
    with reward.Verifier(workers=1) as pool:
        return pool.grade_groups([[r"\\boxed{{%d}}" % n, "0"]], [str(n)])[0].correct
if __name__ == "__main__":
    with multiprocessing.get_context("spawn").Pool(2) as ranks:
        print(ranks.map(rank, [3, 4]), "torch" in sys.modules)
""")
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, timeout=120
    )
    assert done.stdout.strip() == "[[True, False], [True, False]] False", done.stderr


def test_a_closed_pool_starts_again_and_bad_arguments_are_refused():
    verifier = reward.Verifier(workers=1)
    for _ in range(2):
        assert verifier.grade_groups([["5"]], ["5"]) == [(["5"], [True], [1.0], [0], [""])]
        verifier.close()
    for arguments in ({"workers": 0}, {"timeout": 0}):
        with pytest.raises(ValueError):
            reward.Verifier(**arguments)


def test_closing_does_not_wait_for_what_nobody_grades_any_more(tmp_path):
    """After Ctrl-C: a group that is being graded ends, those behind it are cancelled."""
    grader = tmp_path / "slow.py"
    grader.write_text(
        "import time\n"
        "def grade(response, reference, **given):\n"
        "    time.sleep(0.5)\n"
        "    return response, True, 1.0\n"
    )
    verifier = reward.Verifier(workers=1, reward=f"{grader}:grade")
    outcome = []

    def ask():
        try:
            verifier.grade_groups([["5"]] * 60, ["5"] * 60)
        except BaseException as error:
            outcome.append(type(error))

    asker = threading.Thread(target=ask, daemon=True)
    asker.start()
    time.sleep(1.0)
    begin = time.monotonic()
    verifier.close()
    asker.join(10)
    assert time.monotonic() - begin < 15  # all 60 would take 30 seconds
    assert outcome == [CancelledError]
    assert verifier.grade_groups([["5"]], ["5"])[0].correct == [True]
    verifier.close()


def test_audit(tmp_path, capsys):
    path = write(
        tmp_path / "samples.jsonl",
        {"response": r"\boxed{5}", "reference": "5"},
        {"response": "so 6", "reference": "5"},
        {"response": r"\boxed{5+}", "reference": "5"},
        {"response": "no", "reference": "5"},
    )
    reward.main(["--audit", str(path)])
    said = capsys.readouterr().out
    for part in (
        "box 2 (50.0%)",
        "number 1 (25.0%)",
        "none 1",
        "right 1",
        "unparsed answer 1",
        "no answer 1",
        f"{path}:2",
    ):
        assert part in said


@pytest.mark.parametrize(
    ("text", "said"),
    [("{\n", "bad.jsonl:1:"), ("5\n", "JSON object"), ("{}\n", "reference"), (None, "bad.jsonl")],
)
def test_an_audit_of_a_bad_file_ends_in_one_line(tmp_path, capsys, text, said):
    path = tmp_path / "bad.jsonl"
    if text:
        path.write_text(text)
    with pytest.raises(SystemExit) as end:
        reward.main(["--audit", str(path)])
    message = capsys.readouterr().err
    assert end.value.code == 2 and message.count("\n") == 1 and said in message


# -- labelled answers and GSM8K, where the optional material is there
def test_labelled_pairs(shared):
    with open(f"{shared}/checker/dev.jsonl", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    counts = Counter()
    for row in rows:
        answer = (
            f"\\boxed{{{row['pred'].strip().strip('$')}}}" if row["form"] == "bare" else row["pred"]
        )
        counts[
            row["tier"], row["expect"], (reward.score(answer, row["gold"]) > 0) == row["expect"]
        ] += 1

    def share(tier, expect):
        return counts[tier, expect, True] / (
            counts[tier, expect, True] + counts[tier, expect, False]
        )

    assert share("rlvr", True) == share("rlvr", False) == 1
    assert share("cas", True) == share("cas", False) == 1


def test_reported_kinds(shared):
    """Responses of the kinds that public reports found accepted or refused wrongly."""
    with open(f"{shared}/checker/reports-dev.jsonl", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    verdicts = {True: [], False: []}
    for row in rows:
        correct = reward.score(row["pred"], row["gold"]) > 0
        verdicts[row["expect"]].append(correct == row["expect"])
    shares = {expect: sum(found) / len(found) for expect, found in verdicts.items()}
    assert shares[False] >= 0.99 and shares[True] >= 0.97, shares


def test_the_result_of_a_sentence_is_found(shared):
    """The last sentences of GSM8K's solutions as answers: "…, so the boots cost 99 + 5 = $104."."""
    with open(f"{shared}/data/gsm8k_test.jsonl", encoding="utf-8") as file:
        answers = [json.loads(line)["answer"].rpartition("####") for line in file]
    found = []
    for solution, _, answer in answers:
        last = re.sub(r"<<.*?>>", "", solution).strip().splitlines()[-1]
        for label in ("", "**Answer:** ", "The answer is "):
            found.append(reward.score(label + last, answer.strip()))
    assert sum(found) / len(found) >= 0.92


def test_gsm8k_references_equal_themselves_and_nothing_else(shared):
    answers = []
    for name in ("train", "test"):
        with open(f"{shared}/data/gsm8k_{name}.jsonl", encoding="utf-8") as file:
            answers += [json.loads(line)["answer"].rpartition("####")[2].strip() for line in file]
    for answer in dict.fromkeys(answers):
        for spelling in (answer, f"${answer}$", rf"\boxed{{{answer}}}"):
            assert reward.score(rf"\boxed{{{answer}}}", spelling) == 1.0 and reward.is_equivalent(
                spelling, answer
            )
    noise = random.Random(0)
    for _ in range(20_000):
        left, right = noise.choice(answers), noise.choice(answers)
        same = float(left.replace(",", "")) == float(right.replace(",", ""))
        assert reward.is_equivalent(left, right) == same, (left, right)


@pytest.mark.parametrize(
    "batch, floors", [(1, (0.95, 1, 1, 1)), (2, (0.93, 1, 0.86, 1)), (3, (1, 1, 1, 1))]
)
def test_pairs_that_were_written_without_a_look_at_the_checker(batch, floors):
    """checker_pairs.jsonl: labelled pairs of all kinds, by authors who knew the rules and not the
    code; rules were mended after each batch. What came out right at the first try, of the true and
    false ones of `rlvr` and of `cas`: batch 1, 96.0, 99.3, 100 and 100 %; batch 2 (hard on
    purpose), 88.0, 100, 81.8 and 100 %; batch 3, 97.4 and three times 100 %."""
    lines = Path(__file__).with_name("checker_pairs.jsonl").read_text(encoding="utf-8").splitlines()
    found = {}
    for pair in map(json.loads, lines):
        if pair["batch"] == batch:
            response = (
                pair["pred"] if pair.get("form") == "response" else "\\boxed{" + pair["pred"] + "}"
            )
            right = reward.score(response, pair["gold"]) > 0
            found.setdefault((pair["tier"], pair["expect"]), []).append(right == pair["expect"])
    shares = {kind: sum(verdicts) / len(verdicts) for kind, verdicts in found.items()}
    kinds = (("rlvr", True), ("rlvr", False), ("cas", True), ("cas", False))
    assert all(shares[kind] >= floor for kind, floor in zip(kinds, floors)), shares
