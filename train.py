"""Train a video diffusion transformer: `python train.py configs/quickstart.yaml [key=value ...]`."""

from stgen.cli import train

if __name__ == "__main__":
    train()
