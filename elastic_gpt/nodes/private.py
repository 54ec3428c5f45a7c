"""Keeps DLRover's files in a private folder, since a machine may have several users.

DLRover 0.6.1 keeps event logs, sockets and metrics in /tmp/dlrover and /tmp/ckpt_sock, which belong
to the first user. The master and agents of all other users end with a PermissionError when DLRover
is imported.
"""

import contextlib
import os
import tempfile
from pathlib import Path

VARIABLE = (
    "DLROVER_EVENT_FILE_DIR"  # DLRover's variable for event logs; its other folders have none, and are moved here too
)


def keep_dlrover_files_private() -> None:
    """Make the private folder. Call it before importing DLRover. If the variable names a folder already, that is used."""
    if VARIABLE not in os.environ:
        os.environ[VARIABLE] = tempfile.mkdtemp(prefix="elastic-gpt-dlrover-")  # mode 700
    folder = Path(os.environ[VARIABLE])
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    from dlrover.python.common import multi_process
    from dlrover.python.common.constants import ConfigPath

    for name in ("PARAL_CONFIG", "RUNTIME_METRICS"):
        setattr(ConfigPath, name, str(folder / Path(getattr(ConfigPath, name)).name))
    multi_process.SOCKET_TMP_DIR = f"{folder}/ckpt_sock/"


def refuse_anothers_network_check() -> None:
    """Raise ValueError if the folder of DLRover's network check belongs to another user.

    It cannot be moved, since DLRover's own processes write into it.
    """
    from dlrover.python.common.constants import ConfigPath

    folder = Path(ConfigPath.NETWORK_CHECK_DATA_DIR)
    with contextlib.suppress(PermissionError):
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK | os.X_OK) and folder.stat().st_uid == os.getuid():
            return
    raise ValueError(
        f"--network-check writes into {folder}, which is another user's here: leave it out on a machine that several share"
    )
