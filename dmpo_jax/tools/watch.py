"""Shows a completion being unmasked: as text, a line per step, or as a page."""

import html
import json
from collections.abc import Callable, Sequence

MASK, BREAK, UNSEEN = '░', '⏎', '·'
NEW, OLD, EMPTY, RESET = '\033[1;32m', '\033[0m', '\033[90m', '\033[0m'
# A page without other files. Texts get into it by `html.escape`, or as JSON that the
# script shows by textContent: they cannot be taken for HTML.
PAGE = """<!doctype html><meta charset="utf-8"><title>{title}</title>
<style>
body {{ font: 14px/1.5 sans-serif; margin: 2em; max-width: 90em }}
pre, #text {{ font: 14px/1.7 monospace; white-space: pre-wrap; background: #f6f6f6;
             padding: 1em; overflow-wrap: anywhere }}
#step {{ width: 60%; vertical-align: middle }}
#text span {{ border-radius: 2px }} .new {{ outline: 2px solid #0a0 }}
.mask {{ color: #bbb }}
</style>
<h1>{title}</h1><pre>{prompt}</pre>
<p><button id="play">play</button>
<input id="step" type="range" min="0" max="{last}" value="{last}">
<span id="at"></span></p>
<div id="text"><noscript>{final}</noscript></div>
<p>Outlined: the tokens of this step. The redder a token, the less probable it was when
it was revealed; point at one to see its step and its probability.</p>
<div id="drawing">{drawing}</div><p>{summary}</p>
<script type="application/json" id="tokens">{tokens}</script>
<script>
const tokens = JSON.parse(document.getElementById('tokens').textContent);
const slider = document.getElementById('step'), text = document.getElementById('text');
const play = document.getElementById('play'), last = +slider.max;
function draw() {{
  const step = +slider.value - 1;  // 0 is the time before the first step
  const here = tokens.filter(t => 0 <= t.step && t.step === step);
  const low = Math.min(...here.map(t => t.probability));
  const found = ': ' + here.length + ' new, least probability ' + low.toFixed(3);
  document.getElementById('at').textContent =
    'step ' + slider.value + ' of ' + last + (here.length ? found : '');
  text.replaceChildren(...tokens.map(t => {{
    const span = document.createElement('span'), seen = 0 <= t.step && t.step <= step;
    span.textContent = seen ? t.text : '{mask}';
    span.className = !seen ? 'mask' : t.step === step ? 'new' : 'old';
    if (seen) {{
      span.style.background = 'rgba(220, 50, 30, ' + 0.7 * (1 - t.probability) + ')';
      span.title = 'step ' + (t.step + 1) + ', probability ' + t.probability.toFixed(3);
    }}
    return span;
  }}));
}}
slider.addEventListener('input', draw);
let timer = 0;
play.addEventListener('click', () => {{
  clearInterval(timer);
  slider.value = 0;
  draw();
  timer = setInterval(() => {{
    slider.value = +slider.value + 1;
    draw();
    if (+slider.value === last) clearInterval(timer);
  }}, Math.max(40, Math.min(500, 8000 / last)));
}});
draw();
</script>
"""

Step = tuple[int, list[tuple[str, str]]]  # step, [(text, 'new' | 'old' | 'mask')]


def texts_of(tokens_L: Sequence[int], decode: Callable[[list[int]], str]) -> list[str]:
  """Returns each token's text; decode: returns the text of a list of ids.

  Control characters are shown as dots, because they could command a terminal.
  """
  return [
    ''.join(
      c if c.isprintable() else UNSEEN for c in decode([int(t)]).replace('\n', BREAK)
    )
    for t in tokens_L
  ]


def pieces(texts_L: Sequence[str], order_L: Sequence[int]) -> list[Step]:
  """Returns each step's tokens and their kinds, from all masks to none.

  order_L: the step that revealed each token; -1 = none did, it stays a mask.
  """

  def kind(at, step):
    return 'mask' if at < 0 or at > step else 'new' if at == step else 'old'

  return [
    (
      step,
      [
        (text if kind(at, step) != 'mask' else MASK, kind(at, step))
        for text, at in zip(texts_L, order_L, strict=True)
      ],
    )
    for step in range(-1, max(order_L) + 1)
  ]


def terminal(steps: Sequence[Step], colour: bool = True) -> str:
  """Returns the steps as text; colours mark the new tokens."""
  codes = {'new': NEW, 'old': OLD, 'mask': EMPTY} if colour else {}
  lines = []
  for step, parts in steps:
    text = ''.join(codes.get(kind, '') + text for text, kind in parts)
    lines.append(f'{step + 1:4} {text}{RESET if colour else ""}')
  return '\n'.join(lines)


def page(
  tokens: Sequence[tuple[str, int, float]],
  title: str,
  prompt: str,
  summary: str,
  drawing: str = '',
) -> str:
  """Returns an HTML page with a slider over the steps, which needs no other file.

  tokens: (text, the step that revealed it or -1, its probability then) of each token.
  drawing: Task.show of the prompt and the answer.
  """
  data = [dict(text=t, step=s, probability=round(p, 4)) for t, s, p in tokens]
  return PAGE.format(
    title=html.escape(title),
    prompt=html.escape(prompt),
    summary=html.escape(summary),
    drawing=f'<pre>{html.escape(drawing)}</pre>' if drawing else '',
    last=max(step for _, step, _ in tokens) + 1,
    final=html.escape(''.join(text for text, _, _ in tokens)),
    mask=MASK,
    tokens=json.dumps(data).replace('<', '\\u003c'),
  )
