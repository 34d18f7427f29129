import os

import pytest

# Before any library reads them: nothing is downloaded, and W&B stays on this machine.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["WANDB_MODE"] = "offline"


@pytest.fixture(scope="session", autouse=True)
def threads():
    """Test processes running side by side share the cores."""
    import torch

    torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else torch.get_num_threads())
