"""A run's life on disk: folder, events and state; creating, finding, export and import; the queue; grids; targets.

A run is a folder and nothing else knows about it: no database, no server. No torch.
"""

from mole.core.names import check_name
from mole.core.paths import device_lock_path, home, runs_dir
from mole.runs.archive import export, import_run
from mole.runs.inputs import check_inputs
from mole.runs.queue import (
    QUEUE_LIMIT,
    acquire_device,
    ahead_of,
    check_room,
    device_of,
    device_user,
    enqueue,
    move,
    place_in_queue,
    reorder,
    spawn,
    start,
    stop,
    waiting_runs,
    wake_queued,
)
from mole.runs.run import STATES, Run
from mole.runs.store import (
    absolute,
    create,
    delete,
    folder_names,
    get,
    is_unlisted,
    list_runs,
    unlisted_name,
)
from mole.runs.targets import load_target, locate

__all__ = [
    "QUEUE_LIMIT",
    "STATES",
    "Run",
    "absolute",
    "acquire_device",
    "ahead_of",
    "check_inputs",
    "check_name",
    "check_room",
    "create",
    "delete",
    "device_lock_path",
    "device_of",
    "device_user",
    "enqueue",
    "export",
    "folder_names",
    "get",
    "home",
    "import_run",
    "is_unlisted",
    "list_runs",
    "load_target",
    "locate",
    "move",
    "place_in_queue",
    "reorder",
    "runs_dir",
    "spawn",
    "start",
    "stop",
    "unlisted_name",
    "waiting_runs",
    "wake_queued",
]
