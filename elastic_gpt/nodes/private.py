"""Where DLRover's own files go: a folder of this process's user alone, for a machine may have several users.

DLRover 0.6.1 keeps event logs, sockets and metrics in /tmp/dlrover and /tmp/ckpt_sock, which belong
to whoever came first: every other user's master and agents end with a PermissionError when they are
imported.
"""

import contextlib
import os
import tempfile
from pathlib import Path

VARIABLE = "DLROVER_EVENT_FILE_DIR"  # DLRover's own; the rest has no setting and goes into the same folder


def keep_dlrover_files_private() -> None:
    """Call it before anything of DLRover is imported. A folder that the environment names already is taken."""
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
    """Raise ValueError where the folder of DLRover's network check is another user's.

    It cannot be moved: the processes that write into it are started with DLRover's own idea of
    where it is.
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
