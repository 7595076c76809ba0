"""Files that are written so that nothing is lost."""

import os

import pytest

from pargs_jax.durable_files import opened_to_append, write_whole
from pargs_jax.errors import InputError


@pytest.fixture
def pipe(tmp_path):
    """Stands for a device, such as /dev/full."""
    os.mkfifo(tmp_path / "pipe")
    return tmp_path / "pipe"


def test_devices_and_folders_are_neither_read_nor_replaced(pipe, tmp_path):
    for path, kind in ((pipe, "device"), (tmp_path, "folder")):
        with pytest.raises(InputError, match=f"is a {kind}, must be a file"):
            write_whole(path, "text")
        with pytest.raises(InputError, match=f"is a {kind}, must be a file"), opened_to_append(path, "x", "y"):
            pass
    assert pipe.is_fifo() and list(tmp_path.iterdir()) == [pipe]
