"""python main.py --config=configs/quickstart.py: see dmpo_jax/cli.py for the modes."""

import sys

try:
  from dmpo_jax import cli
except KeyboardInterrupt:
  sys.exit(130)
except ValueError as error:  # JAX_* in the environment that JAX cannot read
  sys.exit(f'error: {error}')

if __name__ == '__main__':
  cli.run()
