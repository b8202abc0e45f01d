r"""Reads what stands in a \boxed: one notation, values with units, and their forms.

An answer is, in this grammar,

  answer   = value {("," | ";" | "and" | "or") value}
  value    = {lead} [name "="] {value "="} body [scale] [unit]
  lead     = "=" | "\approx" | "\therefore" | a phrase that ends in "is" or ":"
  name     = letters, f(x), \angle A, (p, q) ...: no number that counts, no operation
  body     = what forms() calls plain, or what the truth has too
  scale    = "thousand" | "million" | "dozen" ...: it multiplies
  unit     = a word of UNITS, "\%", "\$", "^\circ" ...

A word, sign or command that is not in it counts only if the truth has it as well.
"""

import functools
import re
import unicodedata
from typing import NamedTuple

from dmpo_jax.tasks import answers

MAX_LENGTH = 1000  # characters; a longer text is only stripped

# ---- one notation

SIGNS = {
  **dict.fromkeys('\u2212\u2013\u2014\u2010\u2011\ufe63', '-'),
  **dict.fromkeys('\u00a0\u2007\u3000', ' '),
  **dict.fromkeys('\u2009\u202f\u2006\u2008\u200a', r'\,'),
  **dict.fromkeys('\u200b\u200c\u200d\u2060\ufeff\u200e\u200f', ''),
  **dict.fromkeys('\u22c5\u00b7\u2219\u2022\u2217', r'\cdot '),
  **dict.fromkeys('\u3001\uff0c', ','),
  **dict.fromkeys('\u2032\u2019\u00b4', "'"),
  **dict.fromkeys('\u2205\u00d8', r'\emptyset '),
  **dict.fromkeys('\u00b0\u00ba\u2218', r'^\circ '),
  '\u00d7': r'\times ', '\u00f7': r'\div ', '\u2044': '/', '\u2215': '/',
  '\u221e': r'\infty ', '\u2264': r'\le ', '\u2265': r'\ge ', '\u2260': r'\ne ',
  '\u2a7d': r'\le ', '\u2a7e': r'\ge ', '\u2248': r'\approx ', '\u2243': r'\approx ',
  '\u2261': r'\equiv ', '\u2208': r'\in ', '\u222a': r'\cup ', '\u2229': r'\cap ',
  '\u2216': r'\setminus ', '\u2282': r'\subset ', '\u2286': r'\subseteq ',
  '\u00b1': r'\pm ', '\u2213': r'\mp ', '\u2220': r'\angle ', '\u25b3': r'\triangle ',
  '\u211d': r'\mathbb{R}', '\u2124': r'\mathbb{Z}', '\u2115': r'\mathbb{N}',
  '\u211a': r'\mathbb{Q}', '\u2102': r'\mathbb{C}', '\u2211': r'\sum ',
  '\u220f': r'\prod ', '\u222b': r'\int ', '\u230a': r'\lfloor ',
  '\u230b': r'\rfloor ', '\u2308': r'\lceil ', '\u2309': r'\rceil ',
  '\u27e8': r'\langle ', '\u27e9': r'\rangle ', '\u2026': r'\ldots ',
  '\u2234': r'\therefore ', '\u21d2': r'\Rightarrow ', '\u2192': r'\to ',
  '\u3002': '.', '\u00a2': r'\text{cents}', '\u20ac': r'\text{euros}',
  '\u00a3': r'\text{gbp}', '\u00a5': r'\text{yen}',
  '\u20b9': r'\text{rupees}', '\u2228': r'\text{or}', '\u2227': r'\text{and}',
}  # fmt: skip
GREEK = (
  'alpha|beta|gamma|delta|epsilon|zeta|eta|theta|iota|kappa|lambda|mu|nu|xi|'
  'pi|rho|sigma|tau|upsilon|phi|varphi|chi|psi|omega'
)
FUNCTIONS = frozenset(
  'sin cos tan cot sec csc arcsin arccos arctan arccot sinh cosh tanh log ln lg exp'
  ' arg'.split()
)
# Words outside \text{} that are commands without their backslash.
PLAIN = FUNCTIONS | {
  *GREEK.split('|'), 'sqrt', 'infty', 'gcd', 'lcm', 'max', 'min', 'mod', 'floor',
  'ceil', 'abs', 'det', 'binom', 'choose', 'lim', 'sum', 'prod', 'int', 'cup', 'cap',
}  # fmt: skip
ALIAS = {
  **dict.fromkeys(('leq', 'leqslant', 'leqq'), r'\le '),
  **dict.fromkeys(('geq', 'geqslant', 'geqq'), r'\ge '),
  **dict.fromkeys(('dfrac', 'tfrac', 'cfrac'), r'\frac'),
  **dict.fromkeys(('varnothing', 'empty'), r'\emptyset '),
  **dict.fromkeys(('mid', 'vert', 'lvert', 'rvert', 'Vert', 'lVert', 'rVert'), '|'),
  **dict.fromkeys(('quad', 'qquad', 'enspace', 'thinspace', 'space', 'nobreak'), ' '),
  **dict.fromkeys(('dots', 'dotsc', 'cdots', 'dotsb'), r'\ldots '),
  **dict.fromkeys(('infinity', 'inf', 'oo'), r'\infty '),
  **dict.fromkeys(('ast', 'times', 'bullet'), r'\cdot '),
  **dict.fromkeys(('implies', 'Longrightarrow'), r'\Rightarrow '),
  **dict.fromkeys(('lor', 'vee'), r'\text{or}'),
  **dict.fromkeys(('land', 'wedge'), r'\text{and}'),
  **{letter: rf'\mathbb{{{letter}}}' for letter in 'RZNQC'},
  'neq': r'\ne ', 'lt': '<', 'gt': '>', 'lbrace': r'\{', 'rbrace': r'\}',
  'lbrack': '[', 'rbrack': ']', 'degree': r'^\circ ', 'euro': r'\text{euros}',
  'pounds': r'\text{gbp}', 'imath': 'i', 'jmath': 'j', 'colon': ':', 'div': r'\div ',
  'sim': r'\approx ', 'bmod': r'\mod ', 'pmod': r'\mod ',
  'setminus': r'\setminus ', 'backslash': r'\setminus ',
}  # fmt: skip
# Commands without effect on the value: sizes, styles, brackets that grow.
STYLE = re.compile(
  r'\\(?:displaystyle|textstyle|scriptstyle|tiny|scriptsize|footnotesize|small|'
  r'normalsize|large|Large|LARGE|huge|Huge|bf|bfseries|it|itshape|sf|tt|em|sl|cal|'
  r'mathstrut|strut|limits|nolimits|centering|noindent|'
  r'left\.?|right\.?|middle|[bB]igg?[lrm]?)(?![a-zA-Z])|\\!|\\/'
  r'|\\(?:begin|end)\{(?:equation|align|aligned|gather|gathered|math|displaymath|'
  r'split|center)\*?\}|\\color\{[^{}]*\}|\\[hv]space\*?\{[^{}]*\}|\\(?:tag|label)'
  r'\{[^{}]*\}'
)
FONT = re.compile(
  r'\\(textbf|textit|textsl|textsf|texttt|emph|underline|mathbf|mathit|mathsf|mathtt|'
  r'boldsymbol|bm|pmb|boxed|fbox|mathop|mathcal|mathnormal|mathstrut|ensuremath|'
  r'textcolor\{[^{}]*\}|displaylines|uline|underbar|bold|'
  r'text|textrm|textnormal|textup|mbox|hbox|mathrm|rm|operatorname\*?)\s*(?=\{)'
)
WORDY = ('text', 'textrm', 'textnormal', 'textup', 'mbox', 'hbox', 'mathrm', 'rm')
WORD = re.compile(
  r'\\(?:text|begin|end|mathbb)\{[^{}]*\}|\\[a-zA-Z]+\s*|(?<![a-zA-Z])[a-zA-Z]{2,}'
)
# Marks around a whole answer.
AROUND = [
  (r'\(', r'\)'), (r'\[', r'\]'), ('$$', '$$'), ('$', '$'), ('**', '**'), ('__', '__'),
  ('*', '*'), ('_', '_'), ('```', '```'), ('`', '`'), ('"', '"'), ("'", "'"),
  ('\u201c', '\u201d'), ('\u300c', '\u300d'),
]  # fmt: skip
THOUSANDS = re.compile(
  r'(?<![\d.,])\d{1,3}(?:(?:\\[,;: ]|~| |\{,\}|,\\!|\{\\,\})\d{3})+(?!\d)'
)
MIXED = re.compile(
  r'(?<![\d.}^_/])(\d+)(?: *(?=\\)| +)(\\frac\{(\d+)\}\{(\d+)\}|(\d+)/(\d+))(?!\d)'
)
REPEATED = re.compile(
  r'(?<![\d.])(\d*)\.(\d*)(?:\\(?:overline|bar)\{(\d+)\}|\\(?:overline|bar) ?(\d)|'
  r'\\dot\{?(\d)\}?|\((\d+)\))'
)
DOTTED = re.compile(r'(?<![\d.])(\d*)\.(\d{0,9}?)(\d{1,9}?)\3{2,}(?:\.\.\.|\\l?dots)')
EXPONENT = re.compile(r'(?<![a-zA-Z\\])(\d)[eE]([+-]?\d+)(?![\da-zA-Z.])')


@functools.lru_cache(maxsize=1 << 14)
def clean(text: str) -> str:
  """Returns `text` in one notation: LaTeX without fonts, delimiters, closing marks."""
  if len(text) > MAX_LENGTH:
    return text.strip()
  text = _ascii(text)
  text = THOUSANDS.sub(lambda m: re.sub(r'\D', '', m[0]), text)
  text = DOTTED.sub(_repeating, text)
  text = _ascii_relations(_unwrap(text))
  text = re.sub(r'(?<!\\)\\[,:;> ]|~|\s', ' ', _fonts(STYLE.sub('', text)))
  text = WORD.sub(_word, text)
  text = re.sub(r'(?<!\\)%', r'\\%', text).replace('\\{ *\\}', '\\emptyset ')
  text = re.sub(r'\\\{\s*\\\}', r'\\emptyset ', text)
  text = re.sub(r'\^\s*\{?\s*\\circ\s*\}?', r'^\\circ ', text)
  text = re.sub(r'\((\d+)\)(?=_)', r'\1', _braced(_unwrap(text)))
  text = re.sub(r' +', ' ', _numbers(text)).strip()
  return re.sub(r'\A([A-Z])\)\Z', r'\1', text)  # a choice


def _ascii(text: str) -> str:
  """Writes signs, Greek letters, digits above and below, and fractions in LaTeX."""
  if text.isascii():
    return text
  raised = r'[\u2070\u00b9\u00b2\u00b3\u2074-\u207b]+'
  text = re.sub(raised, lambda m: f'^{{{_digits(m[0])}}}', text)
  text = re.sub(r'[\u2080-\u208b]+', lambda m: f'_{{{_digits(m[0])}}}', text)
  text = re.sub(
    '([\u221a\u221b])\\s*(\\d+(?:\\.\\d+)?|[a-zA-Z]|\\([^()]*\\)|(?=\\{))',
    lambda m: (
      '\\sqrt' + '[3]' * (m[1] == '\u221b') + (m[2] and f'{{{m[2].strip("()")}}}')
    ),
    text,
  )
  return ''.join(map(_sign, text))


def _digits(text: str) -> str:
  return unicodedata.normalize('NFKC', text).replace('\u2212', '-')


def _sign(sign: str) -> str:
  if sign.isascii() or sign in SIGNS:
    return SIGNS.get(sign, sign)
  plain = unicodedata.normalize('NFKC', sign)
  above, slash, below = plain.partition('\u2044')
  if slash:  # one half
    return rf'\frac{{{above}}}{{{below}}}'
  name = unicodedata.name(plain, '') if len(plain) == 1 else ''
  if name.startswith('GREEK ') and ' LETTER ' in name:
    letter = name.rpartition(' ')[2].lower()
    return f'\\{letter if "SMALL" in name else letter.title()} '
  if '\uff01' <= sign <= '\uff5e':  # full width
    return plain
  return SIGNS.get(plain, sign)


def _ascii_relations(text: str) -> str:
  for sign, command in (('<=', 'le'), ('=<', 'le'), ('>=', 'ge'), ('!=', 'ne')):
    text = text.replace(sign, f'\\{command} ')
  return re.sub(r'\\not\s*=', r'\\ne ', text).replace('==', '=')


def _unwrap(text: str) -> str:
  """Strips marks around the whole text, and closing marks behind it."""
  while True:
    before = text = text.strip()
    text = text.rstrip(' \t\n\r~.,;:\\')
    for left, right in AROUND:
      inner = text[len(left) : -len(right)]
      if (
        len(text) > len(left) + len(right)
        and text.startswith(left)
        and text.endswith(right)
        and not text.endswith('\\' + right)
        and left not in inner
      ):
        text = inner
        break
    if text.startswith('{') and answers.braced(text, 0) == text[1:-1]:
      text = text[1:-1]
    if text == before:
      return re.sub(r'(?<!\\)\$|(?<!\\)\\[()\[\]]', ' ', text)


def _fonts(text: str) -> str:
  r"""Removes fonts; words among them become \text{words}."""
  text = re.sub(r'\{\s*\\(rm|mathrm)(?![a-zA-Z{]) *', r'\\text{', text)
  text = re.sub(r'\\rm(?![a-zA-Z{])', '', text)
  unit = r'\{\\(?:text|mathrm)\{ *(\w+) *\}'
  text = re.sub(rf'\\frac *{unit}\}}{unit}(\^\{{?\d\}}?)?\}}', r'\\text{\1/\2\3}', text)
  out = ''
  while font := FONT.search(text):
    inner = answers.braced(text, font.end())
    if inner is None:
      break
    head, name, text = (
      text[: font.start()],
      font[1],
      text[font.end() + len(inner) + 2 :],
    )
    plain = re.sub(r'\\[ ,;:!]|~|\s', ' ', inner).strip()
    if name.startswith('operatorname') and len(plain) > 1 and plain.isalpha():
      out += head + (rf'\text{{{plain}}}' if plain in KNOWN else f'\\{plain} ')
    elif (
      '\\' in plain or '{' in plain or '$' in plain or not re.search('[a-zA-Z]', plain)
    ):
      text, out = (_unwrap(inner) or inner) + text, out + head
    elif len(plain) == 1 and not _is_unit(out + head, name, plain):
      out += head + plain
    elif name in WORDY and (counted := re.fullmatch(r'(-?[\d.,]*\d) +(\D+)', plain)):
      out += f'{head}{counted[1]}\\text{{{counted[2]}}}'
    elif name in WORDY or re.search('[a-zA-Z]{2}', plain):
      out += f'{head}\\text{{{plain}}}'
    else:
      out += head + plain
  return out + text


def _is_unit(head: str, name: str, letter: str) -> bool:
  """Returns whether a letter in an upright font is a unit: 5\\text{ m}, not e or i."""
  valued = re.search(r'(?:[\d)]|[\d}]\}|\\pi)\s*\Z', head)
  return name in WORDY and letter in 'mgshLlNJWVACFK' and bool(valued)


def _word(match: re.Match) -> str:
  """Rewrites a command or a bare word."""
  word = match[0].strip()
  if word.startswith('\\'):
    return str(ALIAS.get(word[1:], match[0]))
  if word in ('infinity', 'inf', 'oo'):
    return ALIAS[word]
  behind = match.string[match.end() :].lstrip()[:1]
  if word in PLAIN and not (word == 'min' and behind != '('):
    return f'\\{word} '
  if (word.lower() in KNOWN or word.lower() in SCALE) and behind != '(':
    return f'\\text{{{word}}}'
  return match[0]


def _braced(text: str) -> str:
  r"""Writes \frac12, \sqrt3, x^2, x_1, sqrt(3) with braces; x^{1} as x."""
  text = re.sub(r'\\(sqrt|frac) +', r'\\\1', text.replace('**', '^'))
  text = re.sub(r'\\sqrt\(([^()]*)\)', r'\\sqrt{\1}', text)
  text = re.sub(r'\\sqrt([0-9a-zA-Z])', r'\\sqrt{\1}', text)
  text = re.sub(r'\\sqrt(\\[a-zA-Z]+)', r'\\sqrt{\1}', text)
  part = r'(\{(?:[^{}]|\{[^{}]*\})*\}|[0-9a-zA-Z]|\\[a-zA-Z]+)'
  brace = lambda m: (
    r'\frac'
    + ''.join(side if side[0] == '{' else f'{{{side}}}' for side in (m[1], m[2]))
  )
  text = re.sub(rf'\\frac{part} *{part}', brace, text)
  text = re.sub(r'([\^_]) *(-?\d+|[a-zA-Z])', r'\1{\2}', text)
  text = re.sub(r'\^ *\(([^()]*)\)', r'^{\1}', text)
  return re.sub(r'\^\{1\}', '', text)


def _repeating(match: re.Match) -> str:
  whole, first, *blocks = match.groups()
  block = next(filter(None, blocks))
  above = int(whole + first + block) - int(whole + first or '0')
  return rf'\frac{{{above}}}{{{"9" * len(block)}{"0" * len(first)}}}'


def _numbers(text: str) -> str:
  """Writes repeating decimals and mixed numbers as fractions, 1e-5 as a power."""

  def mixed(match: re.Match) -> str:
    above, below = int(match[3] or match[5]), int(match[4] or match[6])
    if not above < below:
      return match[0]
    return rf'\frac{{{int(match[1]) * below + above}}}{{{below}}}'

  text = MIXED.sub(mixed, REPEATED.sub(_repeating, text))
  return EXPONENT.sub(lambda m: rf'{m[1]}\cdot 10^{{{int(m[2])}}}', text)


# ---- values and units

SCALE = {
  'hundred': 100, 'thousand': 1000, 'million': 10**6, 'billion': 10**9,
  'trillion': 10**12, 'dozen': 12, 'score': 20, 'gross': 144,
}  # fmt: skip
# One unit a line; its first name stands for the others.
UNITS = """
meter metre m
kilometer kilometre km
centimeter centimetre cm
millimeter millimetre mm
inch inches in
foot feet ft
yard yd
mile mi
gram gramme g gm
kilogram kg kilo
milligram mg
pound lb lbs
ounce oz
ton tonne
liter litre l
milliliter millilitre ml
gallon gal
quart qt
pint
cup
second sec s
minute min
hour hr h
day
week wk
month
year yr
mph
kmh kph
am
pm
dollar usd buck
cent
euro eur
sterling gbp
yen jpy
rupee rs inr
yuan rmb cny
degree deg
radian rad
celsius c
fahrenheit f
kelvin k
newton n
joule j
watt w
volt v
ampere amp
ohm
hertz hz
pascal pa
mole mol
acre
hectare ha
percent percentage pct
unit
"""
NOUNS = """
apple arrangement ball bag bead bird block book bottle box boy bridge bus bushel calorie
can candy car card cat chair chip choice class coin combination committee cookie cow
customer cube cut diagonal digit dog edge egg element employee expression face factor
fish flower friend function game girl goal graph group guest gumball handshake house
integer intersection interval item jar job kid lap letter line marble match member month
number orange outcome package page pancake path pattern pea peach pen pencil permutation
person piece pie plant player point possibility prime problem quarter roll root row
runner sandwich seat section sequence set shirt side sock solution square step sticker
stamp student subset teacher team term test ticket tile time token tree triangle value
vote way win worker zero
"""
IRREGULAR = dict(
  men='man', women='woman', people='person', children='child', mice='mouse',
  vertices='vertex', candies='candy', possibilities='possibility', fish='fish',
  committees='committee', boxes='box', buses='bus', classes='class', matches='match',
  peaches='peach', sandwiches='sandwich',
)  # fmt: skip
# 'quarters' and 'times' change the value.
PLURALS = frozenset(f'{noun}s' for noun in NOUNS.split()) - {'quarters', 'times'}
JOINING = ('a', 'an', 'each', 'per', 'st', 'nd', 'rd', 'th')
POWERS = {'square': 2, 'sq': 2, 'cubic': 3, 'cu': 3}
RAISED = {'squared': 2, 'cubed': 3}
_ALIASES = {
  name: line.split()[0] for line in UNITS.strip().splitlines() for name in line.split()
}
CURRENCY = ('dollar', 'euro', 'sterling', 'yen', 'rupee', 'yuan')
KNOWN = frozenset(
  name + end
  for name in (*_ALIASES, *POWERS, 'per')
  if len(name) > 1 and name not in ('in', 'mol', 'rad', 'ha', 'am', 'pa', 'mi')
  for end in ('', 's', 'es')
) | {'and', 'or', 'am', 'pm', *PLURALS, *IRREGULAR} - {'mis', 'pers'}
# A phrase with one of these does not name the value beside it.
CHANGING = re.compile(
  r'\b(?:not|no|never|minus|negative|plus|twice|half|double|triple|times|less|more|'
  r"maybe|perhaps|probably|possibly|least|most|over|under|between|than|or|and)\b|n't|\d",
  re.IGNORECASE,
)
LEAD = re.compile(
  r'(?:=|\\approx|\\therefore|\\Rightarrow|\\to(?![a-z])|&|:)\s*'
  r'|\\text\{(?P<phrase>[^{}]*?(?:\b(?:is|are|equals|be|answer|solution|result|so|thus|'
  r'hence|therefore|approximately|about|exactly)|[:=])\s*,?)\}\s*[:=]?\s*'
  r'|(?i:(?:so|thus|hence|therefore),? )?(?i:the |my |our )?(?i:final |correct )?'
  r'(?i:answer|solution|result)(?: ?(?i:is|are)(?![a-z])| ?[:=]) ?:?\s*'
)
TAIL = re.compile(r'(.*?)\s*((?:\\text\{[^{}]*\}(?: ?\^\{-?\d\})?[\s/]*+)+)', re.DOTALL)
_GREEK_NAME = '|'.join(name for name in GREEK.split('|') if name != 'pi')
_ATOM = (
  rf'(?:[a-zA-Z]|\\(?i:{_GREEK_NAME})(?![a-z])|\\m?(?:angle|triangle)(?![a-z])'
  r'|\\(?:vec|overline|bar|hat|overrightarrow|widehat|tilde) ?'
  r'(?:\{[a-zA-Z]+\}|[a-zA-Z])'
  rf'|\\(?:{"|".join(sorted(FUNCTIONS))}|det|max|min|lim|Re|Im|gcd|lcm|Pr)(?![a-z])'
  r'|\\mathbb\{[PE]\}'
  r'|\\text\{[^{}]*\})'
)
_NAME = (
  rf"(?:{_ATOM} ?(?:_(?:\{{[^{{}}=]*\}}|[a-zA-Z0-9]))? ?'*+(?:\^\{{-1\}})? ?)++"
  r'(?:\([^()=]*\))?'
)
NAME = re.compile(
  rf'{_NAME}|\({_NAME}(?:, ?{_NAME})*\)|\\?\|{_NAME}\\?\||\[[A-Z]+\]|\\\{{{_NAME}\\\}}'
)
OPEN = {'<': ('(', ')'), r'\le': ('[', ']')}
FLIPPED = {'>': '<', r'\ge': r'\le', '<': '>', r'\le': r'\ge'}
PERCENT = (('percent', 1),)


class Read(NamedTuple):
  """An answer without its names and units."""

  names: list[str]  # what stands before '='; '' without one
  bodies: list[str]  # one a value
  units: list[tuple]  # of each value: ((name, power), ...); () without one
  claims: list[tuple[str, ...]]  # what it says is equal beside that
  lawful: bool  # whether its units are known


def squeeze(text: str) -> str:
  r"""Returns a cleaned text without spaces, and words without \text."""
  text = re.sub(r'\\text\{([^{}]*)\}', r'\1', text)
  return re.sub(r'(?<![0-9.]) +|(?<=[0-9.]) +(?![0-9.])', '', text)


def words(text: str) -> str | None:
  """Returns the words of an answer that is only words ('june 20'), else None."""
  plain = re.sub(r'\\text\{([^{}]*)\}', r' \1 ', text)
  if not re.fullmatch(r"[ (]*[a-zA-Z][a-zA-Z0-9 ,.'():&-]*", plain):
    return None
  found = re.findall('[a-z]+|[0-9]+|-', plain.lower())
  if len(plain.strip(' ().,:')) > 1 and not any(
    len(word) > 1 and word.isalpha() for word in found
  ):
    return None  # letters beside each other are variables
  return ' '.join(word for word in found if word != 'and')


def split(text: str, separator: str) -> list[str]:
  """Splits at what the pattern finds outside of brackets."""
  parts, depth, start = [], 0, 0
  for match in re.finditer(
    rf'(?P<open>\\?[{{(\[])|(?P<close>\\?[}})\]])|{separator}', text
  ):
    if match['open']:
      depth += 1
    elif match['close']:
      depth -= 1
    elif depth <= 0:
      parts.append(text[start : match.start()])
      start = match.end()
  return [*parts, text[start:]]


LISTED = r'\\text\{,?\s*(?:and|or),?\s*\}|[,;]'


def read(text: str, named: bool = True) -> Read | None:
  """Reads a cleaned answer; None if it is none. named: take names and chains off."""
  if named and text.count('=') == 1:  # a, b = 1, 2
    names, _, rest = text.partition('=')
    if (count := len(split(names, ','))) > 1 and count == len(split(rest, ',')):
      text = rest if all(map(is_name, split(names, ','))) else text
  names, bodies, units, claims, lawful = [], [], [], [], True
  pieces = [piece.strip() for piece in split(_thousands(text), LISTED)]
  for piece in filter(None, pieces):
    name = ''
    if named:
      name, *said, piece = _named(piece)
      claims += [(side, piece) for side in said]
    body, unit, known = _measured(piece)
    lawful &= known
    names.append(squeeze(name))
    bodies.append(_inner_signs(body))
    units.append(unit)
  claims = [tuple(_inner_signs(_measured(side)[0]) for side in pair) for pair in claims]
  return Read(names, bodies, units, claims, lawful) if all(bodies) and bodies else None


def _thousands(text: str) -> str:
  comma = r'(?<![\d.,({\[|])\d{1,3}(?:,\d{3})+(?![\d,)\]}])'
  return re.sub(comma, lambda m: m[0].replace(',', ''), text)


def _inner_signs(body: str) -> str:
  """Removes degrees, per cent and currency within brackets, but not within a number."""
  body = re.sub(r'(?:\^\\circ|\\%)(?! *\d)', '', body)
  return re.sub(r'(?<![\d.])\\\$ *(?=[\d.])', '', body).strip()


def _leadless(piece: str) -> str:
  while (lead := LEAD.match(piece)) and not CHANGING.search(lead['phrase'] or ''):
    piece = piece[lead.end() :]
  return piece.strip()


def is_name(text: str) -> bool:
  """Returns whether it names what is given, as in 'x = 5'."""
  said = ' '.join(re.findall(r'\\text\{([^{}]*)\}', text))
  return bool(NAME.fullmatch(text.strip())) and not CHANGING.search(said)


def _named(piece: str) -> list[str]:
  """Returns [name, side, ...] of 'name = side = ...'; the last side is the value."""
  piece, name = _leadless(piece), ''
  for relation in (r'\in ', r'\approx'):
    before, found, rest = piece.partition(relation)
    if found and is_name(before):
      return [before, _leadless(rest)]
  sides = [side.strip() for side in split(piece, '=')]
  while len(sides) > 1 and is_name(sides[0]):
    name, *sides = sides
  return [name, *map(_leadless, sides)]


def _measured(piece: str) -> tuple[str, tuple, bool]:
  """Returns (body, unit, whether the unit is known) of 'body unit'."""
  sign = re.match(
    r'(-?) *(?:\\\$|\\text\{ *([a-zA-Z]+)\.? *\}\.?) *(?=-?[\d.\\])', piece
  )
  if sign and (sign[2] is None or _base(sign[2]) in CURRENCY):
    piece = f'{sign[1]}{piece[sign.end() :]}\\text{{{sign[2] or "dollars"}}}'
  for mark, word in (
    (r'\^\\circ *(?:\\text\{ *)?([CF])\}?', r'degrees \1'),
    (r'\^\\circ', 'degrees'),
    (r'\\%', 'percent'),
    (r'\\\$', 'dollars'),
    (r'(?<=\d) ?([mgshL]|in)', r'\1'),
    (
      r'(?:\^\{?|(?<=\d)) *\\text\{ *(?:th|st|nd|rd) *\} *\}?|(?<=\d)(?:th|st|nd|rd)',
      '',
    ),
  ):
    piece = re.sub(f'(?:{mark})$', rf'\\text{{{word}}}' if word else '', piece)
  tail = TAIL.fullmatch(piece)
  if not tail or not tail[1].strip():
    return piece, (), True
  body, text = tail[1].strip(), re.sub(r'\\text|[{}^]', ' ', tail[2])
  tokens = re.findall(r'[a-zA-Z]+|-?\d|/', text.replace('.', ''))
  while tokens and (factor := SCALE.get(tokens[0].lower().removesuffix('s'))):
    body, tokens = _scaled(body, factor), tokens[1:]
  unit = _unit(tokens, body)
  return body, tuple(tokens) if unit is None else unit, unit is not None


def _scaled(body: str, factor: int) -> str:
  match = re.fullmatch(r'(-?)(\d*)(?:\.(\d+))?', body)
  if not match or len(body) > 60:
    return rf'{factor} \cdot ({body})'
  sign, whole, part = match[1], match[2], match[3] or ''
  above, below = int((whole + part) or '0') * factor, 10 ** len(part)
  return (
    f'{sign}{above // below}'
    if above % below == 0
    else (rf'{sign}\frac{{{above}}}{{{below}}}')
  )


def _base(word: str) -> str | None:
  """Returns the unit that a word stands for, or None; one letter keeps its case."""
  if len(word) == 1:
    return None if word in 'MSGHKkB' else _ALIASES.get(word.lower())
  word = word.lower()
  for name in (word, word.removesuffix('s'), word.removesuffix('es')):
    if name in _ALIASES and len(name) > 1:
      return _ALIASES[name]
  return IRREGULAR.get(word) or (word if word in PLURALS else None)


def _unit(tokens: list[str], body: str) -> tuple | None:
  """Returns ((name, power), ...), or None if a word is unknown."""
  unit, power, sign = [], 1, 1
  for i, token in enumerate(tokens):
    low = token.lower()
    if low in ('/', 'per'):
      sign = -1
    elif low in JOINING and unit:
      continue
    elif low in POWERS and i + 1 < len(tokens):
      power = POWERS[low]
    elif unit and (low in RAISED or re.fullmatch(r'-?\d', token)):
      unit[-1] = (unit[-1][0], sign * RAISED.get(low, 0) or int(token))
    elif base := _base(token) or (_base(token + 's') if body == '1' else None):
      unit.append((base, sign * power))
      power = 1
    else:
      return None
  return tuple(unit)


def same_units(left: Read, right: Read) -> bool:
  """Returns whether the units agree: equal, or one side has none or 'units'."""
  generic = lambda unit: any(name == 'unit' for name, *_ in unit)
  pairs = {unit for unit in left.units if unit}, {unit for unit in right.units if unit}
  if pairs[0] <= pairs[1]:
    return True  # unknown words too
  return left.lawful and (not pairs[1] or any(map(generic, (*pairs[0], *pairs[1]))))


def _interval(text: str) -> tuple[str, str] | None:
  """Returns (name, interval) of an inequality of one name: 'x<2' -> (-\\infty,2)."""
  sides = re.split(r'(<|>|\\le(?![a-z])|\\ge(?![a-z]))', text)
  sides = [side.strip() for side in sides]
  if len(sides) == 3 and is_name(sides[2]):
    sides = [FLIPPED.get(side, side) for side in sides[::-1]]
  if len(sides) == 3 and is_name(sides[0]):
    name, sign, end = sides
    if sign in OPEN:
      return name, rf'(-\infty,{end}{OPEN[sign][1]}'
    return name, rf'{OPEN[FLIPPED[sign]][0]}{end},\infty)'
  if len(sides) == 5 and is_name(sides[2]):
    if sides[1] not in OPEN and sides[3] not in OPEN:
      sides = [FLIPPED.get(side, side) for side in sides[::-1]]
    if sides[1] in OPEN and sides[3] in OPEN:
      return sides[2], f'{OPEN[sides[1]][0]}{sides[0]},{sides[4]}{OPEN[sides[3]][1]}'
  return None


def intervals(text: str) -> Read | None:
  """Reads inequalities of one name as intervals; None if there are none."""
  builder = re.fullmatch(
    r'\\\{ *[a-zA-Z] *(?:\\in *\\mathbb\{R\} *)?[|:](.*)\\\}', text
  )
  parts = split(builder[1] if builder else text, LISTED)
  found = [span for span in map(_interval, map(_leadless, parts)) if span]
  if len(found) != len(parts) or len({name for name, _ in found}) != 1:
    return None
  both = [span for _, span in found]
  if len(both) == 2 and re.search(r'\\text\{ *and', text):
    if r'\infty)' in both[1]:  # x < b and x > a
      both.reverse()
    low, high = both[0].removesuffix(r',\infty)'), both[1].removeprefix(r'(-\infty,')
    if low != both[0] and high != both[1]:
      return Read([found[0][0]], [f'{low},{high}'], [()], [], True)
  joint = r'\cap ' if re.search(r'\\text\{ *and', text) else r'\cup '
  return Read([found[0][0]], [joint.join(span for _, span in found)], [()], [], True)


def signs(text: str) -> str:
  r"""Writes \pm a as the list of both."""
  parts = []
  for part in split(text, ','):
    both = [
      part.replace(r'\pm', sign).replace(r'\mp', other)
      for sign, other in (('+', '-'), ('-', '+'))
    ]
    parts += dict.fromkeys(both)
  return ','.join(parts)


# ---- forms: operations, relations and signs

VALUE = frozenset(
  rf"""\frac \sqrt \pi \infty \{{ \}} \begin \end \cdot \cup \cap \setminus \emptyset
  \mathbb \text \vec \overline \bar \hat \overrightarrow \langle \rangle \ldots \\ \pm
  \mp \in \angle \triangle {' '.join(chr(92) + name for name in GREEK.split('|'))}
  """.split()
) | {rf'\{name.title()}' for name in GREEK.split('|')}
TOKEN = re.compile(
  r'\\text\{[^{}]*\}|\\(?:begin|end|mathbb)\{[^{}]*\}|\\[a-zA-Z]+|\\.|\S'
)
ALPHABET = frozenset(
  'abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789+-*/^_(){}[],.;&'
)
COUNTING = ('!', r'\binom', r'\choose', r'\dbinom', r'\tbinom')
FUNCTION = frozenset(rf'\{name}' for name in FUNCTIONS)
# A number to a whole power is an operation; 2^{1/3} and e^{-1} are plain numbers.
RING = re.compile(
  r'(?<=[0-9)\]}])\^\{-?[0-9]+\}|(?<![a-zA-Z\\])i\^'
  r'|(?<=[0-9a-zA-Z)\]}])(?:\+|-|\\pm|\\mp)'
  r'|(?<=[0-9)\]}])(?:\*|\\cdot)+(?:[(\[{]*[-+]?[.0-9]|\\frac\{[0-9]+\}\{[0-9]+\})'
  r'|(?<=[0-9.)])\((?=[-+]?[0-9.(\\])|(?<=\))[0-9]|(?<=[0-9])\{(?=[0-9])'
)
LETTER = re.compile(r'\\(?:cup|cap|in|setminus|text\{[^{}]*\}|begin\{\w+\}|end\{\w+\})')
DERIVED = re.compile(r'\\frac\{(?:d|\\partial)[^{}]*\}\{(?:d|\\partial)|\bd/d[a-z]')


def forms(text: str, truth: bool = False) -> set[str]:
  """Returns what in a cleaned text is more than a plain value.

  An answer may have what its truth has. A truth with e^x also allows functions.
  """
  found = set()
  for token in TOKEN.findall(text):
    if token.startswith(r'\text{'):
      found |= {word.lower() for word in re.findall(r'[^\W_]+', token[6:-1])}
    elif token in (r'\begin{vmatrix}', r'\begin{Vmatrix}'):
      found.add(token)  # a determinant
    elif token in FUNCTION:
      found.add('function')
    elif token in COUNTING:
      found.add('counting')
    elif re.sub(r'(?<=[a-zA-Z])\{.*', '', token) not in VALUE and token not in ALPHABET:
      found.add(token)
  plain = re.sub(r'\s', '', LETTER.sub(',', text))
  if RING.search(plain):
    found.add('ring')
  if DERIVED.search(plain):
    found.add('derivative')
  if re.search(r'[0-9.] +[0-9.]', text):
    found.add('blank')
  if truth and 'e^' in plain:
    found.add('function')
  return found
