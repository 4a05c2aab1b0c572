"""One thread a test process: on few cores, threads that fight make tiny models many times slower."""

import gc
import os

os.environ["OMP_NUM_THREADS"] = "1"  # for the processes that tests start

from pathlib import Path

import pytest
import torch


def pytest_collection_finish() -> None:
    """Spare every later garbage collection the hundreds of thousands of objects that the imports have left."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def judge(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of an untrained testbed judge; tests only read it."""
    from cepo.train import testbed, testbed_model

    folder = tmp_path_factory.mktemp("judge")
    tokenizer = testbed.build_tokenizer()
    testbed_model.build_model(tokenizer, seed=0).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
