"""Tests what strict MATH takes for an answer: tables of 'answer || truth', by kind.

Most kinds are from public reports: github.com/huggingface/Math-Verify (issues 14, 34,
69, its tests), EleutherAI/lm-evaluation-harness (3477, 3652), QwenLM/Qwen2.5-Math.
"""

import json

import pytest

from dmpo_jax.tasks import TASKS, latex, math, symbolic

# Wrong: each says something else than the truth, or leaves something to do.
WRONG = {
  'reported': r"""
\frac{1}{2006!} || \frac{1}{2004!}
\frac{1}{2^{98}} || \frac{1}{2^{99}}
1-\frac{1}{2^{59}} || 1-\frac{1}{2^{60}}
6 \text{ billion} || 6 \text{ million}
12 \text{ dozen} || 12
12 \text{ minus one} || 12
7 \text{ negative} || 7
2×3 || 6
2⋅3 || 6
\operatorname{lcm}(2,3) || 6
\frac{d}{dx}(6x) || 6
6 \approx 7 || 6
""",
  'small': r"""
\frac{1}{10^{20}} || \frac{1}{10^{21}}
10^{-20} || 10^{-21}
2^{-60} || 2^{-61}
\frac{1}{2^{99}} || 0
0 || \frac{1}{2^{99}}
\frac{1}{100!} || \frac{1}{101!}
1+\frac{1}{10^{30}} || 1
1 || 1+\frac{1}{10^{30}}
e^{-100} || e^{-101}
e^{-50} || 0
0 || e^{-50}
\frac{\pi}{10^{30}} || \frac{\pi}{10^{31}}
\sqrt{2}+10^{-40} || \sqrt{2}+10^{-41}
(10^{-20},1) || (10^{-21},1)
\{10^{-20}\} || \{10^{-21}\}
[0,10^{-20}] || [0,10^{-21}]
x>10^{-20} || x>10^{-21}
y=10^{-20}x || y=10^{-21}x
10^{-20}x || 10^{-21}x
x+10^{-20} || x
\begin{pmatrix}10^{-20}\\1\end{pmatrix} || \begin{pmatrix}10^{-21}\\1\end{pmatrix}
0.00000000000000000001 || 0
1e-20 || 1e-21
1.6\times 10^{-19} || 1.6\times10^{-20}
6.02\times10^{-23} || 6.03\times10^{-23}
\frac{1}{3} || 0.333333333333333333333333
10^{-20}i || 10^{-21}i
\binom{100}{50}^{-1} || \binom{100}{49}^{-1}
\left(\frac12\right)^{99} || \left(\frac12\right)^{98}
0.5^{99} || 0.5^{98}
\sin(10^{-20}) || \sin(10^{-21})
\frac{1}{2^{99}} || \frac{1}{2^{99}+1}
""",
  'marks': r"""
3\text{,}5 || 35
3\text{.}5 || 35
8\text{:}00 || 800
3\mathrm{,}5 || 35
\frac{1}{2}\text{ m} || \frac12\text{ km}
\frac{\sqrt{10}}{5}\text{ m} || \frac{\sqrt{10}}{5}\text{ g}
\text{5 apples} || 6
\text{5 thousand} || 5
\text{5 is not} || 5
x>0 \text{ and } x<1 || [0,1)
x>0 \text{ and } x<1 || (0,\infty)
x>0 \text{ or } x<1 || (0,1)
\frac{3}{5}i || \frac{3}{5}
\frac{4}{5}i || \frac{3i}{5}
(101)_2 || 101
2023_{10} || 2023_5
\mathbb{P}(A)=0.3 || 0.4
B) || C
\text{8:00 p.m.} || 8:00 \text{ AM}
""",
  'words': r"""
6 \text{ hundred} || 6
6 \text{ million} || 6
6 \text{ trillion} || 6
6 \text{ million} || 6 \text{ thousand}
6 \text{ thousand} || 6 \text{ dollars}
6\text{ thousand dollars} || 6
6 thousand || 6
6 million || 6
12 dozen || 12
5 \text{ squared} || 5
5 \text{ cubed} || 5
5 \text{ percent more} || 5
5 \text{ or so} || 5
5 \text{ plus two} || 5
5 \text{ times two} || 5
5 \text{ halves} || 5
5 \text{ thirds} || 5
5 \text{ tenths} || 5
5 \text{ pairs} || 5
5 \text{ and a half} || 5
5 \text{ below zero} || 5
5 \text{ less} || 5
5 \text{ factorial} || 5
5 \text{ is wrong} || 5
5 \text{ not} || 5
\text{not } 5 || 5
\text{negative } 5 || 5
\text{minus } 5 || 5
\text{The answer is not } 5 || 5
\text{at least } 5 || 5
\text{less than }5 || 5
\text{more than }5 || 5
not 5 || 5
negative 5 || 5
minus 5 || 5
at least 5 || 5
5 maybe || 5
maybe 5 || 5
5\text{k} || 5
5\text{K} || 5
5\text{M} || 5
5k || 5
5M || 5
5K || 5
5 \text{ bn} || 5
5 \text{ cm} || 5 \text{ m}
5 \text{ cm}^2 || 5 \text{ cm}^3
5 \text{ hours} || 5\text{ minutes}
5 \text{ cents} || \$5
\$5 || 5 \text{ cents}
€5 || \$5
7:30 \text{ a.m.} || 7:30 \text{ p.m.}
5 \text{ tens} || 5
5 \text{ mod } 7 || 5
5 \text{ choose } 2 || 10
5 \text{ to the power } 2 || 25
6\text{ divided by }2 || 3
\text{half of } 12 || 6
\text{half } 12 || 12
\text{twice } 5 || 5
\text{twice } 5 || 10
\text{five} || 6
-7 \text{ apples} || 7\text{ apples}
7 \text{ apples} || 8\text{ apples}
7 \text{ apples} || -7\text{ apples}
2.5 \text{ apples} || 25\text{ apples}
12 \text{ squared} || 12
7\text{ degrees below} || 7
7\text{ in binary} || 7
111\text{ base }2 || 111
7\text{ (negative)} || 7
\text{Tuesday} || \text{Monday}
\text{June 21} || \text{June 20}
June 2 || \text{June 20}
\text{Monday or Tuesday} || \text{Monday}
\text{not even} || \text{even}
\text{odd} || \text{even}
B || \text{A}
\text{(B)} || \text{(A)}
(A),(B) || \text{(A)}
12 \text{ score} || 12
5 \text{ gross} || 5
5 \text{ quarters} || 5
5\text{ times} || 5x
5\text{ inverse} || 5
""",
  'operations': r"""
2·3 || 6
2•3 || 6
2∗3 || 6
2 * 3 || 6
2×(3) || 6
(2)(3) || 6
2(3) || 6
2{3} || 6
{2}{3} || 6
12÷2 || 6
12:2 || 6
12\div2 || 6
\frac{12}{2}+0 || 6
5+1 || 6
7−1 || 6
7–1 || 6
3! || 6
3！ || 6
\mathrm{lcm}(2,3) || 6
\text{lcm}(2,3) || 6
lcm(2,3) || 6
\lcm(2,3) || 6
gcd(6,12) || 6
\gcd(6,12) || 6
\operatorname{gcd}(6,12) || 6
\max(6,2) || 6
max(6,2) || 6
\min\{6,8\} || 6
\max\{6,2\} || 6
\frac{d}{dx} 6x || 6
(6x)' || 6
\frac{d(6x)}{dx} || 6
\frac{\mathrm{d}}{\mathrm{d}x}(6x) || 6
\frac{\partial}{\partial x}(6x) || 6
\int_0^1 6 dx || 6
∫_0^1 6 dx || 6
\int_{0}^{6} 1 \, dx || 6
\sum_{i=1}^{3} i || 6
∑_{i=1}^{3} i || 6
\prod_{i=1}^{3} i || 6
∏_{i=1}^3 i || 6
\lim_{x\to 6} x || 6
\binom{4}{2} || 6
{4 \choose 2} || 6
C(4,2) || 6
\mathrm{C}_4^2 || 6
P(3,2) || 6
_4C_2 || 6
\log_2 64 || 6
\ln e^6 || 6
\lg 10^6 || 6
log(1000000) || 6
\lfloor 6.5 \rfloor || 6
⌊6.5⌋ || 6
\lceil 5.5\rceil || 6
|-6| || 6
|6| || 6
\left|-6\right| || 6
\vert -6\vert || 6
\operatorname{abs}(-6) || 6
abs(-6) || 6
13 \bmod 7 || 6
13 \mod 7 || 6
13 mod 7 || 6
13 % 7 || 6
13 \pmod 7 || 6
6 \approx 7 || 7
6 \equiv 7 || 6
6 ≡ 13 || 6
6 ≈ 7 || 6
6 ~ 7 || 6
6 \sim 7 || 6
6 \ne 7 || 6
6 ≠ 7 || 6
6 < 7 || 6
6 > 7 || 6
x<6 || 6
6<x || 6
x \le 6 || 6
6 \to 7 || 6
6 → 7 || 6
6 \Rightarrow 7 || 6
6 => 7 || 6
6=7 || 6
7=6 || 6
6 = 6 = 7 || 6
6 ± 1 || 6
6 \cong 7 || 6
6\propto 7 || 6
2^1 3 || 6
6^1+0 || 6
√9+3 || 6
√36+0 || 6
2²+2 || 6
6² || 36
2^3 || 8
2³ || 8
8^{\frac{1}{3}}\cdot 3 || 6
6+0i || 6
6+0x || 6
\det\begin{pmatrix}6\end{pmatrix} || 6
\begin{vmatrix}3&0\\0&2\end{vmatrix} || 6
6 \cdot 1 || 6
1\cdot6 || 6
6\star 1 || 6
2\oplus 4 || 6
3\choose 1 || 3
\sin(90^\circ) || 1
\cos 0 || 1
\tan 45^\circ || 1
sin(0) || 0
\exp(0) || 1
exp(0) || 1
\arctan(1) || \frac{\pi}{4}
\sin 60^\circ || \frac{\sqrt3}{2}
\Re(6+i) || 6
\operatorname{Re}(6+i) || 6
\deg(x^6) || 6
\phi(7) || 6
\varphi(7) || 6
\tau(12) || 6
\sigma(5) || 6
|\{1,2,3,4,5,6\}| || 6
\#\{1,2,3,4,5,6\} || 6
\overline{6+i} || 6-i
110_2 || 6
\text{the sum of 2 and 4} || 6
f(6) || 6
""",
  'others': r"""
6,7 || 6
6;7 || 6
6/7 || 6
6? || 6
5 or 6 || 6
5, 6 || 6
6\text{ or }7 || 6
(6,7) || 6
6 7 || 67
6 7 || 42
6.7. || 67
[6,7] || (6,7)
\{6,7\} || (6,8)
. || 6
$$ || 6
\text{} || 6
\, || 6
{} || 6
-x=5 || 5
2x=5 || 5
x/2=5 || 5
x^2=5 || 5
x+1=6 || 6
\sqrt{x}=6 || 6
1=1 || 1,1
x=5 || y=5
x \approx 5.1 || 5
5=5=6 || 5
x=y=5 || 6
x=5 || -5
\text{not }x=5 || 5
x \in (1,2) || [1,2]
1<x<2 || [1,2]
1\le x<2 || [1,2]
x<2 || (2,\infty)
x>2 || (-\infty,2)
x<2 or x>3 || (2,3)
x>3 || x<3
x>3 || y>3
x \ge 3 || x>3
x != 3 || x=3
x <= 3 || x<3
5 1/4 || 5/4
1 1/4 || 11/4
1 1/4 || 1/4
1\frac14 || \frac{1}{4}
0.\overline{3} || 0.3
0.3 || \frac13
0.\overline{36} || \frac{4}{10}
0.3\overline{6} || 0.\overline{36}
0.333 || \frac13
70 000 || 70
70,00 || 7000
1,00 || 100
70 00 || 7000
7 000 0 || 70000
1.000 || 1000
12,3 || 123
x^1 || x^{11}
π || 3.14
2π || 2
∞ || -∞
√12 || 12
√12 || \sqrt{1}2
x² || x2
x₂ || x^2
145° || 14.5
½ || 12
e || i
\mathrm{e} || 1
exp(16) || e^{15}
pi/2 || \pi
1.6e-19 || 1.6e-18
1e5 || e^5
2e3 || 2000x
(3,2) || (2,3)
(p,q)=(3,2) || (2,3)
(p,q)=(3,2) || 3
p,q=3,2 || 2,3,4
""",
}
# Right: each is a way to write the truth.
RIGHT = {
  'reported': r"""
5; || 5
5, || 5
5\  || 5
\$5. || 5
\[4\] || 4
**4** || 4
\underline{4} || 4
{\bf 4} || 4
\large 4 || 4
\(\{x|x=3k,k\in \mathbb{Z}\}\) || \{x|x=3k,k\in \mathbb{Z}\}
x <= 2 || x \leq 2
x != 3 || x \neq 3
(p,q)=(3,2) || (3,2)
\text{proj}_{\mathbf{b}} \mathbf{a} = (\frac{16}{49}, \frac{48}{49}) || (16/49, 48/49)
\text{The answer is } 5 || 5
5~\text{cm} || 5
5 \text{cm}^2 || 5
1,000.99€ || 1000.99
145° || 145^\circ
√12 || 2\sqrt{3}
1 - \frac{1}{e} || 1 - \frac{1}{\mathrm{e}}
pi/2 || \dfrac{\pi}{2}
-1 + exp(16) || e^{16} - 1
1.6e-19 || 1.6\times 10^{-19}
1 1/4 || 5/4
11 5/6 || \frac{71}{6}
June 20 || \text{June 20}
0.\overline{3} || \frac{1}{3}
\varnothing || \emptyset
-2 \le x \le 7 || x \in [-2,7]
x<2 \text{ or } x>3 || (-\infty, 2) \cup (3, \infty)
8 + 8 + 15 = 31 units || 31
""",
  'more': r"""
\frac{\sqrt{10}}{5}\text{ m} || \frac{\sqrt{10}}{5}
\frac{3}{4}\text{ m} || \frac{3}{4} \text{ meters}
2\pi \text{ m} || 2\pi
5^\text{th} || 5
\text{5 apples} || 5
\text{5 cm} || 5
3\text{, }5 || 3,5
x > 0 \text{ and } x < 1 || (0,1)
x \le 1 \text{ and } x \ge -1 || [-1,1]
\frac{3}{5}i || \frac{3i}{5}
\frac{10}{2}i || 5i
2+3i || 2+\frac{6}{2}i
(101)_2 || 101_2
2023_{10} || 2023
2023 || 2023_{10}
\mathbb{P}(A)=0.3 || 0.3
\Pr(A) = \frac{1}{3} || \frac13
\lim_{x\to0} f(x) = 5 || 5
8:00 \text{ AM} || 8:00 \text{ a.m.}
B) || \text{(B)}
""",
  'marks': r"""
1/4 || 0.25
\frac{2}{8} || 0.25
840. || 840
840, || 840
840; || 840
840: || 840
840。 || 840
840\\ || 840
840\, || 840
840 . || 840
x=5. || 5
\frac12. || \frac{1}{2}
(1,2). || (1,2)
\text{even}. || \text{even}
\text{even.} || \text{even}
5~ || 5
5\; || 5
5\quad || 5
5... || 5
""",
  'delimiters and fonts': r"""
$5$ || 5
\(5\) || 5
$$5$$ || 5
\[ 5 \] || 5
*5* || 5
**5.** || 5
__5__ || 5
`5` || 5
"5" || 5
\textbf{5} || 5
\mathbf{5} || 5
\boldsymbol{5} || 5
\mathrm{5} || 5
\text{5} || 5
\emph{5} || 5
\textit{5} || 5
\underline{\underline{5}} || 5
{\bf 5} || 5
{\rm 5} || 5
\bf{5} || 5
\bf 5 || 5
\large{5} || 5
\Large 5 || 5
\huge 5 || 5
\displaystyle 5 || 5
\displaystyle\frac12 || 1/2
\color{red}{5} || 5
\color{red} 5 || 5
\textcolor{red}{5} || 5
\fbox{5} || 5
\mathbf{\frac{1}{2}} || \frac{1}{2}
\textbf{$\frac{1}{2}$} || \frac{1}{2}
\textbf{(C)} || \text{(C)}
\mathbf{C} || \text{(C)}
\mathrm{(C)} || \text{(C)}
\textbf{C} || C
{5} || 5
{{5}} || 5
(5) || 5
\begin{aligned}5\end{aligned} || 5
\mathbf{v} || v
\tt 5 || 5
\scriptstyle 5 || 5
\mathsf{5} || 5
\bm{5} || 5
\boxed{5} || 5
***5*** || 5
""",
  'relations': r"""
x <= 2 || x \le 2
x≤2 || x \leq 2
x ⩽ 2 || x \leq 2
x \leqslant 2 || x\le2
x >= 2 || x\geq 2
x≠3 || x \ne 3
x >= 2 || x≥2
x \not= 3 || x\neq 3
2 >= x || x \leq 2
1 <= x < 2 || 1 \le x < 2
x>2 || x \gt 2
x \lt 2 || x<2
y <= 2x+1 || y \le 2x+1
x != 3 || x \not= 3
""",
  'names': r"""
(x,y)=(3,2) || (3,2)
(x, y) = (3, 2) || (3,2)
(a,b,c)=(1,2,3) || (1,2,3)
A=(1,2) || (1,2)
(3,2) || (x,y)=(3,2)
x=3, y=2 || (3,2)
a,b=1,2 || 1,2
(x_1,x_2)=(1,2) || (1,2)
f(x)=2x || 2x
y=2x || 2x
f'(x)=2x || 2x
f^{-1}(3)=5 || 5
P(A)=1/2 || 0.5
P(A \cap B)=1/2 || 0.5
\angle ABC = 30^\circ || 30
m\angle ABC=30^{\circ} || 30
\triangle ABC=5 || 5
|AB|=5 || 5
AB=5 || 5
[ABC]=5 || 5
\overline{AB}=5 || 5
\vec{v}=(1,2) || (1,2)
\mathbf{v}=(1,2) || (1,2)
\text{Area} = 5 || 5
\text{Total area} = 5 \text{ cm}^2 || 5
\sin\theta=\frac35 || 3/5
\cos A = 1/2 || 0.5
S_{10}=55 || 55
a_{n}=2n || 2n
a_n=2n || 2n
\lambda=5 || 5
x=5 || 5
\Rightarrow 5 || 5
\therefore x=5 || 5
\therefore 5 || 5
=5 || 5
= 5. || 5
\approx 3.14 || 3.14
≈ 11 || 11
x \approx 11 || 11
\text{The answer is: }5 || 5
\text{The final answer is }5 || 5
\text{Answer: }5 || 5
Answer: 5 || 5
The answer is 5 || 5
The answer is $5$. || 5
\text{The answer is }\frac{1}{2} || 0.5
\text{Area is } 5 || 5
\text{so } 5 || 5
\text{Thus, }x=5 || 5
x=3+2=5 || 5
2+3=5 || 5
\frac{10}{2}=5 || 5
5=5 || 5
x = 1/2 = 0.5 || 0.5
""",
  'thousands': r"""
70\,000 || 70000
70{,}000 || 70000
70,\!000 || 70000
70 000 || 70000
1\,234\,567 || 1234567
1 234 567 || 1234567
1,234,567 || 1234567
70~000 || 70000
70\;000 || 70000
-70\,000 || -70000
70\ 000 || 70000
\$70{,}000 || 70000
x=1,000 || 1000
""",
  'units': r"""
5~\mathrm{cm} || 5
5\,\mathrm{cm} || 5
5\ \text{cm} || 5
5\;\text{cm} || 5
5\mathrm{~cm} || 5
5 \mathrm{~cm}^2 || 5
5 \text{ cm}^{2} || 5
5 \text{ cm}^2 || 5\text{ square centimeters}
5 \text{ sq. cm} || 5\text{ cm}^2
5 cm || 5
5cm || 5
5 cm^2 || 5
5 km/h || 5\text{ km/h}
5 \text{ km/h} || 5
5\text{ m/s}^2 || 5
5 \frac{\text{m}}{\text{s}} || 5
5 \text{ miles per hour} || 5
5 dollars || 5
5 apples || 5
5 \text{ apples} || 5
5 students || 5
5 hours || 5
5 units || 5
5\text{ units}^2 || 5
5\text{ square units} || 5
5\text{ cubic feet} || 5
5\text{ ft}^3 || 5\text{ cubic feet}
5 years || 5
5 m || 5
5\text{ m} || 5
5\text{m} || 5
5\textrm{ m} || 5
5\mbox{ cm} || 5
5\rm{cm} || 5
5{\rm cm} || 5
5 \operatorname{cm} || 5
\frac12\text{ cm} || 0.5
\sqrt2\text{ cm} || \sqrt{2}
5\pi\text{ cm} || 5\pi
5\text{ centimeters} || 5 \text{ cm}
5\text{ inches} || 5\text{ in}
5 in || 5
5 feet || 5
5\text{ ft.} || 5
5€ || 5
€5 || 5
£5 || 5
¥5 || 5
5 USD || 5
USD 5 || 5
\text{USD }5 || 5
Rs. 5 || 5
\text{Rs. }5 || 5
$5 || 5
\$5 || 5\text{ dollars}
\$5.00 || 5
€1,000.99 || 1000.99
\$1,000 || 1000
5\$ || 5
5 euros || 5
5\text{ cents} || 5
50% || 50
50\% || 0.5
50 percent || 50
50\text{ percent} || 50\%
50% || 50\%
0.5 || 50\%
50 || 50\%
6\text{ million} || 6000000
6 \text{ million} || 6{,}000{,}000
2.5\text{ million} || 2500000
6 \text{ million dollars} || 6\text{ million}
6 million || 6 \text{ million}
2 \text{ dozen} || 24
""",
  'Unicode': r"""
145 degrees || 145
145° || 145
145\degree || 145
145^{\circ} || 145^\circ
145 \text{ degrees} || 145^\circ
30°, 60° || 30,60
√3 || \sqrt{3}
2√3 || \sqrt{12}
√(3) || \sqrt3
√{3} || \sqrt3
1+√3 || 1+\sqrt3
√3/2 || \frac{\sqrt3}{2}
∛8x || \sqrt[3]{8}x
∞ || \infty
(-∞,2) || (-\infty,2)
(−∞, 2) ∪ (3, ∞) || (-\infty,2)\cup(3,\infty)
(2,+∞) || (2,\infty)
(2,+\infty) || (2,\infty)
π || \pi
2π || 2\pi
π/2 || \frac{\pi}{2}
−4 || -4
—4 || -4
–4 || -4
x²+1 || x^2+1
x³ || x^3
x₁ || x_1
½ || 0.5
2½ || 2.5
¾ || \frac34
x ∈ [1,2] || [1,2]
θ || \theta
x × y || x \times y
2·x || 2x
±3 || \pm 3
±3 || 3,-3
∅ || \emptyset
ℝ || \mathbb{R}
１２ || 12
5′ || 5'
x ≥ 2 || [2,\infty)
10⁻³ || 10^{-3}
10⁻³ || 10^{-3}
""",
  'upright': r"""
\mathrm{e} || e
2\mathrm{i} || 2i
3+\mathrm{i} || 3+i
\mathrm{e}^{2} || e^2
\text{e}^2 || e^2
e^{\mathrm{i}\pi/3} || e^{i\pi/3}
1+{\rm i} || 1+i
\operatorname{e}^2 || e^2
1+2i || 1+2\mathrm{i}
1+2\imath || 1+2i
""",
  'plain text': r"""
2pi || 2\pi
2*pi || 2\pi
pi || \pi
sqrt(3) || \sqrt3
2sqrt(3) || 2\sqrt3
2*sqrt(3) || 2\sqrt3
sqrt(3)/2 || \frac{\sqrt{3}}{2}
x^(1/2) || x^{\frac12}
x**2 || x^2
e^(16)-1 || e^{16}-1
e^16-1 || e^{16}-1
exp(2) || e^2
\exp(2) || e^2
ln(2) || \ln 2
log(2) || \log 2
sin(x) || \sin x
infinity || \infty
-infinity || -\infty
inf || \infty
theta || \theta
1.6e-19 || 1.6\cdot10^{-19}
1.6E-19 || 1.6\times10^{-19}
6.02e23 || 6.02\times10^{23}
6.02e+23 || 6.02\times10^{23}
(x+1)*(x-1) || x^2-1
1/(2*pi) || \frac{1}{2\pi}
3x/2 || \frac{3x}{2}
a/b || \frac{a}{b}
(a+b)/2 || \frac{a+b}{2}
""",
  'mixed': r"""
2 1/2 || 2.5
2 1/2 || \frac52
2\frac12 || \frac52
2 \frac{1}{2} || \frac52
2\tfrac{1}{2} || 2.5
-2 1/2 || -2.5
-2\frac{1}{2} || -2.5
2\,\frac{1}{2} || 2.5
2~1/2 || 2.5
2 1/2 cups || 2.5
11\ 5/6 || \frac{71}{6}
\frac{71}{6} || 11 5/6
11 5/6 || 11\frac56
""",
  'words and lists': r"""
June 20 || \text{ June 20}
June 20. || \text{June 20}
june 20 || \text{June 20}
\text{June } 20 || \text{June 20}
\text{June}\ 20 || \text{June 20}
Monday || \text{Monday}
\textbf{Monday} || \text{Monday}
No solution || \text{no solution}
no real solutions || \text{no real solutions}
not possible || \text{not possible}
Yes || \text{Yes}
East || \text{east}
neither || \text{neither}
C || \text{(C)}
(C) || \text{C}
(C) || C
\text{C} || C
C. || \text{(C)}
Grade 7 || \text{Grade 7}
3 and 5 || 3,5
3 or 5 || 3,5
3 \text{ and } 5 || 3,5
3, 5, and 7 || 3,5,7
3, 5, \text{ and } 7 || 3,5,7
3;5 || 3,5
x=3 or x=5 || 3,5
x = 3, 5 || 3,5
{3,5} || 3,5
\{3,5\} || 3,5
5,3 || 3,5
A, B || \text{A, B}
July 4, 1776 || \text{July 4, 1776}
""",
  'repeating': r"""
0.\bar{3} || \frac13
0.\bar3 || \frac13
0.\dot{3} || \frac13
0.1\overline{6} || \frac16
0.(3) || \frac13
0.333... || \frac13
0.333\ldots || \frac13
0.\overline{142857} || \frac17
1.\overline{3} || \frac43
-0.\overline{3} || -\frac13
0.\overline{3} || 0.\overline{3}
.\overline{3} || \frac13
\frac13 || 0.\overline{3}
x^1 || x
x^{1} || x
5^1 || 5
2x^{1} || 2x
\{\} || \emptyset
\{ \} || \emptyset
\varnothing || \{\}
∅ || \varnothing
""",
  'intervals': r"""
[-2,7] || -2\le x\le7
-2<x<7 || (-2,7)
x \ge 2 || [2,\infty)
x>2 || (2,\infty)
(2,\infty) || x>2
x \in (2,\infty) || x>2
7 > x > -2 || (-2,7)
x<2 \text{ or } x>3 || x<2\text{ or }x>3
x \in (-\infty,2) \cup (3,\infty) || (-\infty,2)\cup(3,\infty)
x<2 or x>3 || x \in (-\infty,2)\cup(3,\infty)
\{x|-2<x<7\} || (-2,7)
\{x \mid -2 < x < 7\} || \{x|-2<x<7\}
(3,\infty)\cup(-\infty,2) || (-\infty,2)\cup(3,\infty)
2<x || x>2
\{x: x>2\} || (2,\infty)
\left[-2, 7\right] || [-2,7]
x\in\left[-2,7\right] || [-2,7]
""",
  'forms': r"""
\frac{\sqrt{4}}{4} || \frac{1}{2}
2^{1/3} || \sqrt[3]{2}
\frac{1}{2^{99}} || \frac{1}{2^{99}}
2^{-99} || \frac{1}{2^{99}}
\frac{1}{2004!} || \frac{1}{2004!}
1-\frac{1}{2^{60}} || \frac{2^{60}-1}{2^{60}}
\frac{1024}{1} || 2^{10}
1024 || 2^{10}
120 || \binom{10}{3}
720 || 6!
\frac{1+\sqrt5}{2} || \frac{\sqrt5+1}{2}
\frac{1\pm\sqrt5}{2} || \frac{1+\sqrt5}{2},\frac{1-\sqrt5}{2}
1\pm\sqrt5 || 1+\sqrt5, 1-\sqrt5
\frac{\ln 3}{\ln 2} || \log_2 3
\cos x || \cos(x)
(2,3) || \left( 2, 3 \right)
\dfrac{3}{4} || 3/4
\cfrac{3}{4} || 3/4
\begin{bmatrix}1\\2\end{bmatrix} || \begin{pmatrix}1\\2\end{pmatrix}
\begin{pmatrix}0.5\\2\end{pmatrix} || \begin{pmatrix}\frac12\\2\end{pmatrix}
-1/2 || -\frac12
\frac{-1}{2} || -\frac{1}{2}
\sqrt{8} || 2\sqrt2
\frac{1}{\sqrt2} || \frac{\sqrt2}{2}
+5 || 5
05 || 5
5.0 || 5
1e3 || 1e3
5th || 5
5^{\text{th}} || 5
5\text{th} || 5
3:4 || 3:4
3 : 4 || 3:4
""",
}
# Truths of MATH-500, gaokao2023en and college_math.
TRUTHS = r"""
\frac{14}{3}
\left( 3, \frac{\pi}{2} \right)
\text{Evelyn}
11\sqrt2
-50
(6,31,-1)
\begin{pmatrix} -1/3 \\ 2/3 \\ 5/3 \end{pmatrix}
x \in [-2,7]
6 - 5i
\text{(C)}
10,\!080
5.4 \text{ cents}
2220_5
p - q
90^\circ
3\sqrt{13}
\frac{3\sqrt{3}}{4}
x^5 - x^4 + x^3 - x^2 + x - 1
\$18.90
\text{ellipse}
(-\infty, 0]
\{x|x=3k,k\in \mathbb{Z}\}
y = 2x + 3
3, 5, 7
1,-2
1 \pm \sqrt{19}
(3,4]
\pm 2
-\frac{35}{9}
2k + 2
[5,\infty)
4210_{5}
720!
\frac{1}{2^{99}}
x_1 = 2, x_2 = 3
$\left[\begin{array}{r}-55 \\ 13\end{array}\right]$.
y=c e^{-x}, \text{ where } c \text{ is a constant}
"""
AROUND = (
  '{}', '{}.', '{},', '${}$', '$${}$$', r'\({}\)', r'\[{}\]', r'\[ {}. \]', '**{}**',
  r'\large {}', r'{{\bf {}}}', r'\mathbf{{{}}}', r'\boxed{{{}}}', r'\ {}~', '\n{}\n',
)  # fmt: skip


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch):
  monkeypatch.setattr(symbolic, '_ask', lambda check, *pair: check(*pair))


def rows(table):
  return [line.split(' || ') for line in table.strip().splitlines()]


@pytest.mark.parametrize('kind', WRONG)
def test_another_value_is_wrong(kind):
  assert not [row for row in rows(WRONG[kind]) if math.equal(*row)]


@pytest.mark.parametrize('kind', RIGHT)
def test_another_way_to_write_it_is_right(kind):
  assert not [row for row in rows(RIGHT[kind]) if not math.equal(*row)]


def test_truths_equal_themselves_and_no_other():
  truths = TRUTHS.strip().splitlines()
  for truth, other in zip(truths, [*truths[1:], truths[0]], strict=True):
    for around in AROUND:
      assert math.equal(around.format(truth), truth), (around, truth)
    assert not math.equal(other, truth)


@pytest.mark.parametrize(
  'text, truth, right',
  [
    (r'so \boxed{3}, \boxed{5}, \boxed{7}', '3,5,7', 1),
    (r'\(\boxed{1}\) and \(\boxed{-2}\).', '-2,1', 1),
    (r'$\boxed{1}$ or $\boxed{2}$', '1,2', 1),
    (r'The answer is $\boxed{5}$. (I was asked to use \boxed{}.)', '5', 1),
    (r'\boxed{5}\boxed{ }\boxed{\,}', '5', 1),
    (r'\boxed{4} is wrong; it is \boxed{5}', '5', 1),
    (r'\boxed{4} \boxed{5}', '5', 1),
    (r'\boxed{4} or \boxed{5}', '5', 0),  # a hedge
    (r'\boxed{5}, \boxed{4}', '5', 0),
    (r'\boxed{3}, \boxed{5}', '3,5,7', 0),
    (r'\boxed{}', '5', 0),
    (r'\boxed{.}', '5', 0),
  ],
)
def test_boxes(text, truth, right):
  example = {'problem': '?', 'solution': rf'\boxed{{{truth}}}'}
  for whole in (text, f'<answer>{text}</answer>'):
    assert math.grade(whole, example, 'strict') == right
    assert math.reward(whole, example, 'strict')['correctness'] == 2 * right


@pytest.mark.parametrize('box', ['', ' ', r'\,', '$$', '.'])
def test_an_empty_truth_is_refused_and_never_right(box, tmp_path):
  solution = rf'It is $\boxed{{{box}}}$.'
  example = {'problem': '?', 'solution': solution}
  for text in (rf'<answer>\boxed{{{box}}}</answer>', r'\boxed{}', 'x'):
    assert math.grade(text, example, 'strict') == 0
    assert math.reward(text, example, 'strict')['correctness'] == 0
  path = tmp_path / 'train.jsonl'
  good = {'problem': 'a', 'solution': r'\boxed{1}'}
  path.write_text(f'{json.dumps(good)}\n{json.dumps(example)}\n')
  with pytest.raises(ValueError, match=r'train\.jsonl:2: .*boxed.* empty'):
    list(math._read(str(path)))
  with pytest.raises(ValueError, match='not an answer'):
    TASKS['math'].recall('?', box)


def test_cleaning_again_changes_nothing():
  for table in (*WRONG.values(), *RIGHT.values()):
    for text in sum(rows(table), []):
      assert latex.clean(latex.clean(text)) == latex.clean(text)
