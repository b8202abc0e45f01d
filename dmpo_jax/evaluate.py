"""How well parameters solve a split: sampled, decoded, graded, averaged."""

import numpy as np

from dmpo_jax import data, mesh


def accuracy(built, params, problems):
  """Mean grade, reward and the task's extra numbers over all problems.

  Samples with eval.sampler in batches of eval.batch; the last one is padded
  with repeats that do not count. Returns (dict of floats, list of samples).
  """
  c = built.config
  batch, count = c.eval.batch, len(problems.examples)
  rows, samples, stop = [], [], data.stop_ids(built.tokenizer)
  for start in range(0, count, batch):
    row = np.arange(start, start + batch, dtype=np.int32)
    at = np.minimum(row, count - 1)
    rollouts, _ = built.steps.sample_eval(
        params, problems.tokens[at], problems.valid[at], row)
    tokens, order, forwards = mesh.fetch(
        (rollouts.tokens, rollouts.order, rollouts.forwards))
    texts = data.decode(built.tokenizer, tokens[:, problems.tokens.shape[1]:],
                        stop)
    for i in range(min(batch, count - start)):
      example = problems.examples[start + i]
      terms = built.task.reward(texts[i], example, c.data.protocol)
      rows.append({
          'accuracy': built.task.grade(texts[i], example, c.data.protocol),
          'reward': sum(terms.values()), 'forwards': int(forwards),
          **built.task.extra(texts[i], example)})
      samples.append(dict(
          prompt=built.task.prompt(example, 'bare'), example=example,
          completion=texts[i], reward=terms, order=order[i].tolist()))
  mean = {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}
  return mean, samples
