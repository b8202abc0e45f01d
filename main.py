"""python main.py --config=configs/quickstart.py: see dmpo_jax/cli.py for the modes."""

from dmpo_jax import cli

if __name__ == '__main__':
  cli.run()
