"""`python -m adabatch_jax`: the same as the command `adabatch-jax`."""

from adabatch_jax.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
