"""A Space with ZeroGPU on this machine: the service that hands out GPUs, and what stands in for the GPU itself.

with DeviceApi(gpus=2) as api:                       # serve(space_command(), port, home, **space(api, port, home))
    assert all(call.seconds <= 120 for call in api.calls)

Real: the package `spaces`, which shows `cuda` in the studio's process, keeps what is put there on the disk, asks for a
GPU with the visitor's token, and forks a worker for each call. `DeviceApi` answers as the platform does: it queues,
refuses what is above a visitor's quota, and ends a worker whose time is up.

Standing in, on a machine without CUDA only (`python tests/zerogpu.py app/main.py` instead of `python app/main.py`): the
version of CUDA that `spaces` reads on import, and in the forked worker the CPU for `cuda`. In the studio's own process
nothing does: `spaces` raises there when CUDA is used, and so does this PyTorch.
"""

from __future__ import annotations

import itertools
import json
import os
import runpy
import signal
import sys
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

ROOT = Path(__file__).resolve().parents[1]
SPACE_ID = "someone/mole-studio"
LONGEST = 120
PAGE = 4096


@dataclass
class Call:
    """A call for which a GPU was asked: the seconds asked for, the visitor's token, the fork's process; when it ran."""

    task: int
    seconds: int
    visitor: str
    gpu: int = -1
    pid: int = 0
    begun: float = 0.0
    ended: float = 0.0
    failed: bool = False
    killed: bool = False


@dataclass
class DeviceApi:
    """ZeroGPU's service on a port of its own, in this process.

    Attributes:
        gpus: so many calls have a GPU at a time; the others wait.
        slower: so many times slower than a GPU is what stands in for it: calls may take that much longer.
        quota: seconds that a call may ask for; one above them is refused as a visitor's used-up quota.
        reuse: a worker that has ended its call takes the next one of the same function on its GPU.
        calls: those that got a GPU, in this order.
        refused: those that did not.
        started: how often a studio has reported that it is ready.
    """

    gpus: int = 1
    slower: float = 1.0
    quota: int = LONGEST
    reuse: bool = False
    calls: list[Call] = field(default_factory=list)
    refused: list[Call] = field(default_factory=list)
    started: int = 0

    def __post_init__(self) -> None:
        self._free = list(range(self.gpus))
        self._idle: dict[int, Call] = {}
        self._tokens: dict[str, Call] = {}
        self._numbers = itertools.count()
        self._changed = threading.Condition()
        api = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                split = urlsplit(self.path)
                given = {name: values[0] for name, values in parse_qs(split.query).items()}
                getattr(api, "answer_" + split.path.strip("/").replace("-", "_"))(self, given)

            def log_message(self, *_: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True

    def __enter__(self) -> DeviceApi:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._server.shutdown()
        self._server.server_close()
        for call in [*self._tokens.values(), *self._idle.values()]:  # they would outlive the studio
            end(call.pid)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    def busy(self) -> int:
        """How many calls have a GPU now."""
        with self._changed:
            return len(self._tokens)

    def answer_startup_report(self, handler: BaseHTTPRequestHandler, given: dict[str, str]) -> None:
        self.started += 1
        answer(handler, 200)

    def answer_schedule(self, handler: BaseHTTPRequestHandler, given: dict[str, str]) -> None:
        call = Call(int(given["taskId"]), int(given["durationSeconds"]), given.get("token", ""))
        if call.seconds > self.quota:
            self.refused.append(call)
            answer(handler, 429, json.dumps({"left": 0, "wait": 3600.0}))
            return
        with self._changed:
            if self._free:
                answer(handler, 200, json.dumps(self._take(call)))
                return
            handler.send_response(200)
            handler.send_header("Content-Type", "text/event-stream")
            handler.end_headers()
            while not self._free:
                self._changed.wait()
            event = f"event: succeeded\ndata: {json.dumps(self._take(call))}\n\n"
        handler.wfile.write(event.encode())

    def _take(self, call: Call) -> dict[str, Any]:
        """The first free GPU for a call; its idle worker goes on with the same function, else it is ended."""
        call.gpu, call.begun, token = self._free.pop(0), time.monotonic(), f"call-{next(self._numbers)}"
        self._tokens[token] = call
        self.calls.append(call)
        before = self._idle.pop(call.gpu, None)
        idle = before is not None and before.task == call.task
        if before is not None and idle:
            call.pid = before.pid
        elif before is not None:
            end(before.pid)
        if idle:  # a new worker's time begins once it is there
            self._start_clock(token)
        return {"idle": idle, "nvidiaIndex": call.gpu, "nvidiaUUID": f"MIG-{call.gpu}", "allowToken": token}

    def _start_clock(self, token: str) -> None:
        """Begin the time that the call was given."""
        timer = threading.Timer(self._tokens[token].seconds * self.slower, self._time_is_up, [token])
        timer.daemon = True
        timer.start()

    def answer_allow(self, handler: BaseHTTPRequestHandler, given: dict[str, str]) -> None:
        with self._changed:
            call = self._tokens.get(given["allowToken"])
            if call is not None:
                call.pid = int(given["pid"])
                self._start_clock(given["allowToken"])
        answer(handler, 404 if call is None else 200)

    def answer_release(self, handler: BaseHTTPRequestHandler, given: dict[str, str]) -> None:
        failed = given["fail"].lower() == "true"
        answer(handler, 200 if self._give_back(given["allowToken"], failed) else 404)

    def _give_back(self, token: str, failed: bool, kill: bool = False) -> bool:
        with self._changed:
            call = self._tokens.pop(token, None)
            if call is None:
                return False
            call.ended, call.failed, call.killed = time.monotonic(), failed, kill
            if self.reuse and not failed:
                self._idle[call.gpu] = call
            else:
                end(call.pid)
            self._free.append(call.gpu)
            self._changed.notify_all()
        return True

    def _time_is_up(self, token: str) -> None:
        self._give_back(token, failed=True, kill=True)


def end(pid: int) -> None:
    """End a fork of the studio."""
    if pid:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def answer(handler: BaseHTTPRequestHandler, status: int, body: str = "") -> None:
    """Answer in JSON."""
    handler.send_response(status)
    handler.send_header("Content-Type", "application/json")
    handler.send_header("Content-Length", str(len(body)))
    handler.end_headers()
    handler.wfile.write(body.encode())


def has_cuda() -> bool:
    """Whether this PyTorch and this machine have CUDA."""
    import torch

    return torch.version.cuda is not None and torch.cuda.is_available()


def space_command() -> list[str]:
    """What a Space runs."""
    return [sys.executable, str(Path(__file__)), str(ROOT / "app" / "main.py")]


def space(api: DeviceApi, port: int, folder: Path) -> dict[str, str]:
    """The environment of a Space with ZeroGPU; weights wait in a folder beside its home."""
    return {
        "SPACE_ID": SPACE_ID,
        "SPACES_ZERO_GPU": "true",
        "SPACES_ZERO_DEVICE_API_URL": api.url,
        "ZEROGPU_OFFLOAD_DIR": str(folder.parent / "tensors"),
        "GRADIO_SERVER_PORT": str(port),
    }


# ---------------------------------------------------------------------------------------------------------
# Without CUDA


def stand_in() -> None:
    """Let the CPU stand in for CUDA in the forks that `spaces` makes; before `spaces` is imported."""
    import torch
    from torch.overrides import TorchFunctionMode

    class OnCpu(TorchFunctionMode):
        """Computes on the CPU what names `cuda`."""

        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            kwargs = dict(kwargs or {})
            if func is torch.Tensor.pin_memory:  # into whole pages of memory
                size = args[0].numel() * args[0].element_size()
                pages = torch.empty(size + PAGE, dtype=torch.uint8)
                first = -pages.data_ptr() % PAGE
                return pages[first : first + size].view(args[0].dtype).view(args[0].shape).copy_(args[0])
            if func is torch.Tensor.cuda:
                return args[0].clone()
            args = [on_cpu(value) for value in args] if func is torch.Tensor.to else args
            if "device" in kwargs:
                kwargs["device"] = on_cpu(kwargs["device"])
            return func(*args, **kwargs)

    def on_cpu(value: Any) -> Any:
        is_device = isinstance(value, (str, torch.device)) and str(value).startswith("cuda")
        return torch.device("cpu") if is_device else value

    def init(uuid: str) -> None:
        """In a fork, once `spaces` no longer shows a GPU: answer as it did, and compute on the CPU in every thread."""
        os.environ["CUDA_VISIBLE_DEVICES"] = uuid
        run = threading.Thread.run

        def run_on_cpu(thread: threading.Thread) -> None:
            with OnCpu():
                run(thread)

        threading.Thread.run = run_on_cpu  # type: ignore[method-assign]
        OnCpu().__enter__()
        for name, value in shown.items():
            setattr(torch.cuda, name, value)

    if torch.version.cuda is None:
        torch.version.cuda, torch._C._cuda_init = "13.0", None
        torch.cuda._is_in_bad_fork = bool  # one that can be pickled
        torch._C._cuda_getCurrentRawStream = None
    import app  # noqa: F401  as `app/main.py` begins

    from spaces.zero import torch as emulation  # isort: skip

    names = ("is_available", "device_count", "current_device", "synchronize", "get_device_properties", "cudart")
    shown = {name: getattr(torch.cuda, name) for name in names}
    emulation.init = init


if __name__ == "__main__":
    del sys.argv[0]
    sys.path[0] = str(ROOT)
    if not has_cuda():
        stand_in()
    runpy.run_path(sys.argv[0], run_name="__main__")
