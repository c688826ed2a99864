"""`python -m bifrost_rt`: the command line."""

from bifrost_rt.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
