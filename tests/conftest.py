import os

import pytest

# Before any library reads them: nothing is downloaded, and W&B stays on this machine.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["WANDB_MODE"] = "offline"
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # of numpy, in which Triton's interpreter computes

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is first imported


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """The models of these tests are too small to share between threads."""
    import torch

    torch.set_num_threads(1)
