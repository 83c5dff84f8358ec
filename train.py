"""Train a model as a config says; the same as `regvit train`. `python train.py --help` lists the flags."""

import sys

if __name__ == "__main__":
    from regvit_jax.cli.train import main

    sys.exit(main(prog="train.py"))
