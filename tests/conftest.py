"""Fixtures: every test runs in an empty folder of its own; real files where they are at hand."""
import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / 'tests')]

import generate_data  # noqa: E402, F401  (before torch: it sets how OpenMP's threads wait)


@pytest.fixture(autouse=True)
def empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope='session')
def real_data():
    """A folder with cifar-10-batches-py/: $UNREALNAS_DATA, or data/ of the checkout."""
    for folder in (os.environ.get('UNREALNAS_DATA'), ROOT / 'data'):
        if folder and (Path(folder) / 'cifar-10-batches-py').is_dir():
            return str(folder)
    pytest.skip('no real CIFAR-10: put cifar-10-batches-py into data/')
