"""Shows a completion being unmasked, a line per step: as text or as a page."""

import html
from collections.abc import Callable, Sequence

MASK, BREAK, UNSEEN = '░', '⏎', '·'
NEW, OLD, EMPTY, RESET = '\033[1;32m', '\033[0m', '\033[90m', '\033[0m'
PAGE = """<!doctype html><meta charset="utf-8"><title>{title}</title>
<style>
body {{ font: 14px/1.5 sans-serif; margin: 2em; max-width: 90em }}
pre {{ white-space: pre-wrap; background: #f6f6f6; padding: 1em }}
td {{ font-family: monospace; white-space: pre-wrap; padding: .15em .6em;
     border-top: 1px solid #eee; vertical-align: top }}
td:first-child {{ color: #888; text-align: right }}
.new {{ background: #bdf5c6 }} .mask {{ color: #ccc }}
</style>
<h1>{title}</h1><pre>{prompt}</pre><p>{summary}</p>
<table>{rows}</table>
"""

Step = tuple[int, list[tuple[str, str]]]  # step, [(text, 'new' | 'old' | 'mask')]


def pieces(
  tokens_L: Sequence[int], order_L: Sequence[int], decode: Callable[[list[int]], str]
) -> list[Step]:
  """Returns each step's tokens and their kinds, from all masks to none.

  order_L: the step that revealed each token; -1 = none did. decode: returns the
  text of a list of ids. Control characters are shown as dots, because they could
  command a terminal.
  """
  texts = [
    ''.join(
      c if c.isprintable() else UNSEEN for c in decode([int(t)]).replace('\n', BREAK)
    )
    for t in tokens_L
  ]
  kind = lambda at, step: 'new' if at == step else 'old' if at < step else 'mask'
  return [
    (
      step,
      [
        (text if kind(at, step) != 'mask' else MASK, kind(at, step))
        for text, at in zip(texts, order_L, strict=True)
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


def page(steps: Sequence[Step], title: str, prompt: str, summary: str) -> str:
  """Returns the steps as an HTML page that needs no other file."""
  rows = []
  for step, parts in steps:
    cells = ''.join(
      html.escape(text)
      if kind == 'old'
      else f'<span class="{kind}">{html.escape(text)}</span>'
      for text, kind in parts
    )
    rows.append(f'<tr><td>{step + 1}</td><td>{cells}</td></tr>')
  return PAGE.format(
    title=html.escape(title),
    prompt=html.escape(prompt),
    summary=html.escape(summary),
    rows='\n'.join(rows),
  )
