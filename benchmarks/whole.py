"""A reward for reward.file: 1 for the whole solution, else 0."""


def whole(completions: list[str], solution: list[str]) -> list[float]:
  """Returns which completions are their problem's solution, as 0 or 1."""
  return [
    float(''.join(text.split()) == wanted)
    for text, wanted in zip(completions, solution, strict=True)
  ]
