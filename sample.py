"""Sample clips from a trained run: `python sample.py runs/quickstart --prompt "a blue square moving left"`."""

from stgen.cli import sample

if __name__ == "__main__":
    sample()
