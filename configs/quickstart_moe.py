"""DMPO of a mixture of experts from random weights: the quickstart's task, two cores.

python main.py --config=configs/quickstart_moe.py

The model is `quickstart_block` with eight experts in all layers but the first: a token
goes to two of them, by a sigmoid router, and to a shared one, as in LLaDA2. A token
meets about as many weights as in the dense model.

* Supervised training trains the routers, with a load loss that keeps all experts in
  use. RL leaves them as they are (routing.train = sft).
* The rollout's choice of experts is recorded, and replayed where log p_ref is taken
  along the recorded states.
"""

from configs import quickstart_block
from dmpo_jax import config


def get_config(objective=''):
  c = quickstart_block.get_config()
  c.name = 'quickstart_moe'
  c.model.preset = 'tiny_moe'
  c.routing.replay = True
  c.train.iterations = 120
  if objective:
    config.choose_objective(c, objective)
  return c
